"""Arrays in npy and npz files of others: bounded before anything is inflated or allocated, and never unpickled.

numpy itself allocates what a header asks for, and inflates what an archive holds, before it looks at either.
"""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from geoalign.errors import UserError
from geoalign.files.parsing import Failure, check_regular, first_line

MAX_ARRAYS = 256 << 20
"""Bytes of all arrays of a file, unless a caller knows better."""
_SLACK, _RATIO = 64 << 20, 100  # inflated bytes that any archive may have, and more per stored byte
_MAX_MEMBERS, _CHUNK = 1000, 1 << 20

Array = np.ndarray[Any, np.dtype[Any]]


def read_arrays(path: Path, failure: Failure, *, limit: int = MAX_ARRAYS) -> dict[str, Array] | Array:
    """The arrays of an npz by name, or the array of an npy, told by the first bytes.

    The checksums of an npz are compared with its bytes; an npy has none.

    Raises:
        failure: missing, damaged, above ``limit`` bytes, inflating without measure, or holding Python objects.
    """
    size = check_regular(path, failure=failure)
    kind = "npz"
    try:
        with path.open("rb") as stream:
            if stream.read(2) != b"PK":
                kind = "npy"
                stream.seek(0)
                return _read_npy(stream, size, str(path), failure, limit)
            with zipfile.ZipFile(stream) as archive:
                return _read_npz(archive, size, path, failure, limit)
    except UserError:
        raise
    except Exception as problem:  # numpy, zipfile and zlib raise a dozen unrelated types on damaged input
        text = f"{path}: damaged {kind} ({type(problem).__name__}: {first_line(problem)}); write it again"
        raise failure(text) from problem


def _read_npz(archive: zipfile.ZipFile, size: int, path: Path, failure: Failure, limit: int) -> dict[str, Array]:
    members = archive.infolist()
    total, allowed = sum(member.file_size for member in members), min(limit, _SLACK + _RATIO * size)
    if total > allowed or len(members) > _MAX_MEMBERS:
        raise failure(
            f"{path}: {len(members)} arrays of {total:,} bytes in a file of {size:,}; at most {_MAX_MEMBERS} arrays of "
            f"{allowed:,} bytes are read here"
        )
    arrays = {}
    for member in members:
        with archive.open(member) as stream:
            name = member.filename.removesuffix(".npy")
            if name in arrays:
                raise failure(f"{path}: holds {name} twice; write it again")
            arrays[name] = _read_npy(stream, member.file_size, f"{path}: {name}", failure, allowed)
    return arrays


def _read_npy(stream: IO[bytes], size: int, where: str, failure: Failure, limit: int) -> Array:
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise failure(f"{where}: npy version {version} is not read; write it with np.save")
    shape, reversed_order, dtype = readers[version](stream)
    if dtype.hasobject:
        raise failure(f"{where}: holds Python objects, which are never read; write numbers")
    length = math.prod(shape) * dtype.itemsize
    if length != size - stream.tell():
        raise failure(f"{where}: its header asks for {length:,} bytes, it holds {size - stream.tell():,}; damaged")
    if length > limit:
        raise failure(f"{where}: {length:,} bytes, at most {limit:,} are read here")
    data = bytearray(length)
    view, done = memoryview(data), 0
    while done < length:
        if not (part := stream.read(min(_CHUNK, length - done))):
            raise failure(f"{where}: ends early; write it again")
        view[done : done + len(part)] = part
        done += len(part)
    stream.read(1)  # zipfile compares its checksum at the end
    array = np.frombuffer(data, dtype)
    return array.reshape(shape[::-1]).T if reversed_order else array.reshape(shape)

"""Checksums of the safetensors files that geoalign writes: one per tensor in the header, and one over the header.

A tensor is compared when it is read, so that opening a file stays cheap, and what is never read costs nothing. Both
entries must be there or neither: a header that lost one is damaged, one without either is older than this module.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save, save_file
from torch import Tensor

from geoalign.errors import UserError
from geoalign.files.parsing import Failure, parse_json

SKIP_VARIABLE = "GEOALIGN_SKIP_CHECKSUMS"
SKIP_HINT = f"restore it from a copy, or set {SKIP_VARIABLE}=1 to read it as it is"
_TENSORS, _HEADER = "tensors_sha256", "header_sha256"
_LENGTH = 8  # bytes in front of a safetensors header that say how long it is
_noticed: set[str] = set()


def skips_checksums() -> bool:
    """Whether the user asked to read files without comparing checksums."""
    return os.environ.get(SKIP_VARIABLE) == "1"


def digest(tensor: Tensor) -> str:
    """sha256 of type, shape and bytes of a contiguous tensor on the CPU."""
    found = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    if tensor.numel():
        found.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def digest_of(facts: object) -> str:
    """sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def seal(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """``metadata`` with the checksums of itself and of ``tensors`` (contiguous, on the CPU)."""
    sealed = dict(metadata) | {_TENSORS: json.dumps({name: digest(value) for name, value in tensors.items()})}
    return sealed | {_HEADER: digest_of(sealed)}


def save_sealed(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> str:
    """Write a safetensors file with checksums, and return the one over its header, which vouches for all others.

    Tensors must be contiguous and on the CPU. Not atomic by itself. Raises OSError as :func:`write_tensors` does.
    """
    header = seal(tensors, metadata or {})
    write_tensors(tensors, path, header)
    return header[_HEADER]


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write ``tensors`` (contiguous, on the CPU) as safetensors to ``path``, which its caller renames when it is whole.

    Without checksums, for what one process hands another; what stays is written by :func:`save_sealed`.

    Raises OSError when the disk refuses, as every other writer does: safetensors has an error of its own for that.
    """
    try:
        save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
        with path.open("r+b") as file:
            header = file.read(int.from_bytes(file.read(_LENGTH), "little"))
            file.seek(_LENGTH)
            file.write(_in_order(header))
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number) if found else str(error)) from error


def sealed_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """The bytes that :func:`save_sealed` writes."""
    data = save(dict(tensors), seal(tensors, metadata or {}))
    end = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
    return data[:_LENGTH] + _in_order(data[_LENGTH:end]) + data[end:]


def _in_order(header: bytes) -> bytes:
    """A safetensors header of the same length with its metadata sorted by name.

    The library lists them in another order every time, and equal contents are to give equal files.
    """
    facts = json.loads(header)
    if "__metadata__" in facts:
        facts["__metadata__"] = dict(sorted(facts["__metadata__"].items()))
    text = json.dumps(facts, separators=(",", ":"), ensure_ascii=False).encode()
    return text.ljust(len(header)) if len(text) <= len(header) else header


def is_sealed(metadata: Mapping[str, str]) -> bool:
    """Whether a header carries checksums."""
    return _HEADER in metadata


def header_digest(metadata: Mapping[str, str]) -> str:
    """The checksum over a header, "" for files without."""
    return metadata.get(_HEADER, "")


def notice_unsealed(path: object) -> None:
    """Tell, once in a process, that a file of geoalign has no checksums because an older version wrote it."""
    if not _noticed:
        _noticed.add(str(path))
        warnings.warn(f"{path}: written without checksums by an older version, read unchecked", stacklevel=2)


@dataclass(frozen=True, slots=True)
class Seal:
    """The checksums of an opened file."""

    path: Path
    digests: Mapping[str, str]
    failure: Callable[[str], UserError]

    @classmethod
    def read(cls, metadata: Mapping[str, str], names: Collection[str], path: Path, failure: Failure) -> Seal | None:
        """The checksums in ``metadata`` of a file with tensors ``names``; None without any, or if none are wanted.

        Raises:
            failure: the header is not the one that was written.
        """
        if skips_checksums() or not {_TENSORS, _HEADER} & metadata.keys():
            return None
        rest = {key: value for key, value in metadata.items() if key != _HEADER}
        digests = parse_json(metadata.get(_TENSORS, "{}"), path, failure)
        if metadata.get(_HEADER) != digest_of(rest) or digests.keys() != set(names):
            raise failure(f"{path}: damaged (its header differs from its checksum); {SKIP_HINT}")
        return cls(path, digests, failure)

    def check(self, name: str, tensor: Tensor) -> None:
        """Raise unless ``tensor`` is what was written as ``name``."""
        if digest(tensor) != self.digests[name]:
            raise self.failure(f"{self.path}: damaged ({name} differs from its checksum); {SKIP_HINT}")

"""Tensor files: one reader, and one strict comparison of names, shapes and types with what a network needs."""

from __future__ import annotations

import copy
import difflib
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from geoalign.errors import CheckpointError
from geoalign.files.parsing import first_line
from geoalign.files.sealed import SKIP_HINT, Seal, is_sealed, skips_checksums
from geoalign.files.shards import weight_files

Shapes = Mapping[str, tuple[int, ...]]
Rename = Callable[[str], str | None]
_Entry = tuple[tuple[int, ...], str, Callable[[], Tensor]]  # shape, stored type, reader

_FLOATS = {"F32", "BF16", "F16", "float32", "bfloat16", "float16"}
_CHECKED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_SHOWN = 3


class TensorFile:
    """One or more weight files seen as a mapping; tensors are read when asked for, never all at once.

    Accepts ``.safetensors``, torch-saved ``.pth``, ``.pt``, ``.ckpt``, ``.bin`` (plain state dicts, memory-mapped,
    weights only) and folders that hold one safetensors file or a set of shards
    (:func:`geoalign.files.shards.weight_files`). Each file is opened once. A tensor is compared with the
    checksum of its file, where there is one, and with NaN and infinity when it is read.

    Attributes:
        path: the file or folder.
        shapes: of every tensor, by name.
        dtypes: the same for the stored types, as the file spells them.
        metadata: the texts in the header of a safetensors file.

    Raises:
        CheckpointError: missing, empty, truncated, a set without one of its shards, or not a plain state dict.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.metadata = path, dict[str, str]()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._read: dict[str, Callable[[], Tensor]] = {}
        for file, names in weight_files(path).items():
            self._open(file, names)

    def _open(self, file: Path, names: Collection[str] | None) -> None:
        if not file.is_file() or file.stat().st_size == 0:
            raise CheckpointError(f"{file}: no such weight file, or it is empty")
        entries = self._safetensors(file) if file.suffix == ".safetensors" else _torch_state(file)
        if names is not None and (different := sorted(set(names) ^ entries.keys())):
            where = "is not in it" if different[0] in names else "is not listed there"
            raise CheckpointError(
                f"{file}: differs from the index of its set ({different[0]} {where}); download index and shards again"
            )
        for name, (shape, dtype, read) in entries.items():
            if name in self.shapes:
                raise CheckpointError(f"{file}: {name} is also in another file of {self.path}; mixed shards?")
            self.shapes[name], self.dtypes[name], self._read[name] = shape, dtype, read

    def _safetensors(self, file: Path) -> dict[str, _Entry]:
        try:  # the library compares the header with the length of the file: a truncated download ends here
            reader: Any = safe_open(file, framework="pt")
            slices = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118 - no __iter__
        except (SafetensorError, OSError, ValueError) as error:
            text = f"{file}: truncated or not a safetensors file ({error}); delete it and download it again"
            raise CheckpointError(text) from error
        found = reader.metadata() or {}
        seal = Seal.read(found, slices.keys(), file, CheckpointError)
        self.metadata |= found

        def read(name: str) -> Tensor:
            tensor = reader.get_tensor(name)
            if seal is not None:
                seal.check(name, tensor)
            return require_finite(file, name, tensor)

        return {name: (tuple(part.get_shape()), part.get_dtype(), partial(read, name)) for name, part in slices.items()}

    @property
    def sealed(self) -> bool:
        """Whether the file carries checksums (:mod:`geoalign.files.sealed`), as those that geoalign writes do."""
        return is_sealed(self.metadata)

    def renamed(self, rename: Rename) -> TensorFile:
        """The same tensors under other names, without those whose new name is None.

        Raises:
            CheckpointError: two tensors would get one name.
        """
        names = {old: new for old in self.shapes if (new := rename(old)) is not None}
        if len(set(names.values())) < len(names):
            raise CheckpointError(f"{self.path}: holds one tensor under two names; mixed layouts?")
        other = copy.copy(self)
        other.shapes = {new: self.shapes[old] for old, new in names.items()}
        other.dtypes = {new: self.dtypes[old] for old, new in names.items()}
        other._read = {new: self._read[old] for old, new in names.items()}
        return other

    def part(self, prefix: str) -> TensorFile:
        """The tensors whose names begin with ``prefix``, without it."""
        return self.renamed(lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Every (name, tensor), one in memory at a time."""
        for name, read in self._read.items():
            yield name, read()

    def require(self, expected: Shapes, verdict: str, hint: Callable[[Shapes], str] = lambda found: "") -> TensorFile:
        """The file itself if it holds exactly ``expected`` in types that can be used; see :func:`require`.

        Raises:
            CheckpointError: names or shapes differ, or tensors are quantised.
        """
        require(self.path, self.shapes, expected, verdict, hint)
        wrong = sorted(name for name, dtype in self.dtypes.items() if dtype not in _FLOATS)
        if wrong:
            raise CheckpointError(
                f"{self.path}: {len(wrong)} tensors are not float32, bfloat16 or float16, "
                f"first {wrong[0]} ({self.dtypes[wrong[0]]}); quantised files cannot be loaded"
            )
        return self


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def require(
    source: object, found: Shapes, expected: Shapes, verdict: str, hint: Callable[[Shapes], str] = lambda found: ""
) -> None:
    """Raise CheckpointError unless names and shapes of ``found`` are exactly those of ``expected``.

    Args:
        source: named first in the message: a path, or what the tensors are.
        found: what is there.
        expected: what is needed.
        verdict: follows ``source``, such as "does not fit this model".
        hint: a last sentence about what ``found`` seems to be.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    reshaped = [
        f"{name} {list(found[name])} (expected {list(shape)})"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    groups = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    problems = [f"{len(names)} {label}: {_shorten(names)}" for label, names in groups.items() if names]
    if not problems:
        return
    if missing and unexpected and (near := difflib.get_close_matches(missing[0], unexpected, n=1)):
        problems.append(f"{missing[0]} may have been renamed to {near[0]}")
    raise CheckpointError(f"{source} {verdict}: {'; '.join(problems)}. {hint(found)}".rstrip())


def _shorten(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def require_finite(source: object, name: str, tensor: Tensor) -> Tensor:
    """``tensor``, unless it holds NaN or infinity: such weights make every output NaN; raises CheckpointError."""
    if tensor.dtype in _CHECKED and tensor.numel() and not all(torch.isfinite(end) for end in torch.aminmax(tensor)):
        bad = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(
            f"{source}: {name} holds {bad:,} numbers that are NaN or infinite (of {tensor.numel():,}); the run that "
            "made it diverged, or the file is damaged: use an older one"
        )
    return tensor


def _torch_state(file: Path) -> dict[str, _Entry]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(
            f"{file}: truncated, or not a torch file of plain tensors ({first_line(error)})"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{file}: not a plain state dict of tensors; extract the model's state_dict first")
    verify = cache(partial(_verify_zip, file))

    def read(name: str, value: Tensor) -> Tensor:
        verify()
        return require_finite(file, name, value)

    return {
        name: (tuple(value.shape), str(value.dtype).removeprefix("torch."), partial(read, name, value))
        for name, value in state.items()
    }


def _verify_zip(file: Path) -> None:
    """Compare every member with its checksum, which torch writes and does not read; raises CheckpointError."""
    if skips_checksums():
        return
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zipfile and zlib raise unrelated types
        raise CheckpointError(f"{file}: damaged ({first_line(error)}); {SKIP_HINT}") from error
    if damaged:
        raise CheckpointError(f"{file}: damaged ({damaged} differs from its checksum); {SKIP_HINT}")

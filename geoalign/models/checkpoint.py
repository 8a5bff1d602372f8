"""Reading published weights: strict both ways, one tensor at a time, straight into a model on the meta device.

Peak host memory is the model itself plus the tensor in flight; :class:`LoadReport` counts it.
"""

from __future__ import annotations

import copy
import json
import pickle
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from geoalign.config.model import ModelConfig
from geoalign.errors import CheckpointError
from geoalign.models.dit import RetakeDiT
from geoalign.models.layouts import (
    LAYOUTS,
    REDIRECTOR,
    Layout,
    Shapes,
    count,
    identify,
    is_self_attention,
    model_shapes,
    original_names,
)

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
Rename = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a load did.

    Attributes:
        tensors: tensors placed in the model.
        file_bytes: bytes of tensor data read.
        peak_bytes: largest sum of bytes of placed tensors and the tensors being read and cast.
    """

    tensors: int
    file_bytes: int
    peak_bytes: int


class TensorFile:
    """One or more weight files seen as a mapping; tensors are read when asked for, never all at once.

    Accepts ``.safetensors``, torch-saved ``.pth``, ``.pt``, ``.ckpt``, ``.bin`` (plain state dicts, memory-mapped,
    weights only) and folders that hold one safetensors file or a set of shards.

    Raises:
        CheckpointError: missing, empty, truncated, or not a plain state dict.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._prefix = path, ""
        self._where: dict[str, Path] = {}
        self._torch: dict[str, Tensor] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for file in _files(path):
            self._open(file)

    def _open(self, file: Path) -> None:
        if not file.is_file() or file.stat().st_size == 0:
            raise CheckpointError(f"{file}: no such weight file, or it is empty")
        if file.suffix == ".safetensors":
            header = _safetensors_header(file)
            entries = {name: (tuple(entry["shape"]), entry["dtype"]) for name, entry in header.items()}
        else:
            tensors = _torch_state(file)
            self._torch.update(tensors)
            entries = {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()}
        repeated = sorted(entries.keys() & self._where.keys())
        if repeated:
            raise CheckpointError(f"{file}: {repeated[0]} is also in {self._where[repeated[0]].name}; mixed shards?")
        self._where.update(dict.fromkeys(entries, file))
        self.shapes.update({name: shape for name, (shape, _) in entries.items()})
        self.dtypes.update({name: dtype for name, (_, dtype) in entries.items()})

    def part(self, prefix: str) -> TensorFile:
        """The tensors whose names begin with ``prefix``, without it."""
        other = copy.copy(self)
        other._prefix = self._prefix + prefix
        other.shapes = {n.removeprefix(prefix): v for n, v in self.shapes.items() if n.startswith(prefix)}
        other.dtypes = {n.removeprefix(prefix): v for n, v in self.dtypes.items() if n.startswith(prefix)}
        return other

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Every (name, tensor), one in memory at a time."""
        for file in dict.fromkeys(self._where.values()):
            names = [name for name in self.shapes if self._where[self._prefix + name] == file]
            if file.suffix != ".safetensors":
                yield from ((name, self._torch[self._prefix + name]) for name in names)
                continue
            with safe_open(file, framework="pt") as reader:
                yield from ((name, reader.get_tensor(self._prefix + name)) for name in names)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(path.glob("diffusion_pytorch_model*.safetensors")) or sorted(path.glob("*.safetensors"))
    if not found:
        raise CheckpointError(f"{path}: holds no .safetensors file")
    return found


def _safetensors_header(file: Path) -> dict[str, dict]:
    """The header, after checking that the file is as long as it says (a truncated download is)."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > file.stat().st_size:
                raise ValueError("the header is cut off")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if file.stat().st_size != 8 + length + end:
            raise ValueError(f"{8 + length + end} bytes expected, {file.stat().st_size} found")
        with safe_open(file, framework="pt"):
            return header
    except (struct.error, ValueError, KeyError, TypeError, SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: truncated or not a safetensors file ({error}); download it again") from error


def _torch_state(file: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{file}: truncated, or not a torch file of plain tensors ({first})") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{file}: not a plain state dict of tensors; extract the model's state_dict first")
    return dict(state)


def check(source: TensorFile, expected: Shapes, what: str, rename: Rename = lambda name: name) -> None:
    """Compare names, shapes and dtypes of a file with what a model needs, before any data is read.

    Raises:
        CheckpointError: lists the first missing, unexpected and misshapen tensors and says what the file seems to be.
    """
    found = {rename(name): shape for name, shape in source.shapes.items()}
    parts = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "wrong shape": [
            f"{name} {list(found[name])} (needs {list(expected[name])})"
            for name in expected
            if name in found and tuple(found[name]) != tuple(expected[name])
        ],
    }
    if any(parts.values()):
        listed = "; ".join(f"{len(names)} {label}: {', '.join(names[:3])}" for label, names in parts.items() if names)
        raise CheckpointError(f"{source.path} is not {what}: {listed}. {_guess(found)}")
    known = {str(dtype).removeprefix("torch.") for dtype in _FLOATS} | {"F32", "BF16", "F16"}
    wrong = sorted(name for name, dtype in source.dtypes.items() if dtype not in known)
    if wrong:
        raise CheckpointError(
            f"{source.path}: {len(wrong)} tensors are not float32, bfloat16 or float16, "
            f"first {wrong[0]} ({source.dtypes[wrong[0]]}); quantised files cannot be loaded"
        )


def _guess(found: Shapes) -> str:
    name, share = identify(found)
    if share < 0.05:
        return "The file resembles no known layout."
    return f"The file resembles {LAYOUTS[name].title} ({share:.0%} of its tensors)."


def place(
    model: nn.Module,
    source: TensorFile,
    dtype: torch.dtype | None,
    device: torch.device | str = "cpu",
    rename: Rename = lambda name: name,
) -> LoadReport:
    """Move the tensors of a checked file into ``model`` one by one, replacing meta or existing parameters.

    ``dtype`` None keeps the type of every tensor as stored.
    """
    size, peak, read, placed = 0, 0, 0, 0
    parameters = dict(model.named_parameters())
    for name, tensor in source.items():
        target = rename(name)
        old = parameters[target]
        freed = 0 if old.is_meta else old.nbytes
        value = tensor.to(device=device, dtype=dtype or tensor.dtype, copy=True)
        size += value.nbytes
        peak = max(peak, size + tensor.nbytes)
        size -= freed
        read, placed = read + tensor.nbytes, placed + 1
        owner, _, leaf = target.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=old.requires_grad))
    return LoadReport(placed, read, peak)


def load_dit(
    config: ModelConfig, path: Path, *, dtype: torch.dtype | None = torch.float32, device: torch.device | str = "cpu"
) -> tuple[RetakeDiT, LoadReport]:
    """Build a model on the meta device and fill it from a complete checkpoint (original Wan or diffusers names).

    Raises:
        CheckpointError: anything missing, unexpected, misshapen, truncated or quantised.
    """
    with torch.device("meta"):
        model = RetakeDiT(config)
    source = TensorFile(path)
    rename = _renamer(config, source)
    check(source, model_shapes(config), f"a complete checkpoint for {_title(config)}", rename)
    return model, place(model, source, dtype, device, rename)


def load_redirector(
    base: Path,
    delta: Path,
    *,
    dtype: torch.dtype | None = torch.bfloat16,
    device: torch.device | str = "cpu",
    config: ModelConfig = REDIRECTOR,
) -> tuple[RetakeDiT, LoadReport]:
    """Load ReDirector: its base (Wan2.1-Fun-Control-Camera) with the self-attention of the delta file.

    Both files are checked before either is read. Plain Wan2.1-T2V has self-attention of the same names and shapes, so
    a wrong base would load almost silently elsewhere; here the base must have all its own tensors.

    Raises:
        CheckpointError: a wrong base, an incomplete delta, or damaged files.
    """
    shapes = model_shapes(config)
    base_config = config.model_copy(update={"camera": "none", "source": "none"})
    base_file, delta_file = TensorFile(base), TensorFile(delta)
    rename = _renamer(base_config, base_file)
    check(base_file, model_shapes(base_config), f"the base of ReDirector ({_title(base_config)})", rename)
    check(delta_file, {n: s for n, s in shapes.items() if is_self_attention(n)}, "a ReDirector delta")
    with torch.device("meta"):
        model = RetakeDiT(config)
    first = place(model, base_file, dtype, device, rename)
    second = place(model, delta_file, dtype, device)
    peak = max(first.peak_bytes, sum(p.nbytes for p in model.parameters()) + max(p.nbytes for p in model.parameters()))
    return model, LoadReport(len(shapes), first.file_bytes + second.file_bytes, peak)


def layout_of(path: Path) -> tuple[Layout | None, TensorFile]:
    """The published layout that a file matches exactly (None if none does), and the opened file."""
    source = TensorFile(path)
    for layout in LAYOUTS.values():
        if dict(source.shapes) == layout.shapes():
            return layout, source
    return None, source


def _renamer(config: ModelConfig, source: TensorFile) -> Rename:
    """Diffusers names to original names if the file uses them."""
    names = original_names(config)
    diffusers = any(name.startswith("condition_embedder.") for name in source.shapes)
    return (lambda name: names.get(name, name)) if diffusers else (lambda name: name)


def _title(config: ModelConfig) -> str:
    for layout in LAYOUTS.values():
        if model_shapes(layout.config) == model_shapes(config):
            return layout.title
    numbers = count(model_shapes(config))
    return f"a model of {numbers['tensors']} tensors, {numbers['parameters']:,} parameters"

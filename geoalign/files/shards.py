"""Which files of a folder are one model: an index decides, else the names; nothing is guessed between several sets."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from geoalign.errors import CheckpointError
from geoalign.files.parsing import read_json_object

INDEX = ".safetensors.index.json"
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.safetensors")
_PREFERRED = ("diffusion_pytorch_model", "model")
_PICKLED = re.compile(r"(diffusion_pytorch_model|pytorch_model|model)(-\d{5}-of-\d{5})?\.(bin|pth|pt|ckpt)")
"""What a model's own weights are called that are not safetensors."""


def weight_files(path: Path) -> dict[Path, Collection[str] | None]:
    """The files of a model with the tensors that an index lists for each; None where there is no index.

    A file is itself. In a folder, in this order: the set of ``STEM.safetensors.index.json``; ``STEM.safetensors``; the
    shards ``STEM-00001-of-0000N.safetensors``. STEM is ``diffusion_pytorch_model``, else ``model``, else whatever is
    there. Variants beside a set (``STEM.fp16.safetensors``, ``STEM.ema-...``) and hidden files do not belong to it.

    Raises:
        CheckpointError: no safetensors file, a missing shard, shards of several sets, or an index that makes no sense.
    """
    if not path.is_dir():
        return {path: None}
    names = sorted(file.name for file in path.iterdir() if not file.name.startswith(".") and file.is_file())
    indexed = {name.removesuffix(INDEX) for name in names if name.endswith(INDEX)}
    stems = sorted(indexed | {_stem(name) for name in names if name.endswith(".safetensors")})
    chosen = next((stem for stem in _PREFERRED if stem in stems), None)
    pickled = [name for name in names if _PICKLED.fullmatch(name)]
    if not stems or (chosen is None and pickled):  # what else lies there as safetensors is another part
        others = pickled or [name for name in names if name.endswith((".bin", ".pth", ".pt", ".ckpt"))]
        hint = (
            f" but {', '.join(others[:3])}; convert them to safetensors, or download the safetensors" if others else ""
        )
        raise CheckpointError(f"{path}: holds no .safetensors file{' of the model' * bool(stems)}{hint}")
    wanted = [chosen] if chosen else [stem for stem in stems if not any(stem.startswith(f"{o}.") for o in stems)]
    variants = {stem.partition(".")[0] for stem in wanted}
    if len(wanted) > 1 and len(variants) == 1:
        raise CheckpointError(
            f"{path}: holds several variants ({', '.join(wanted)}); keep one, or give the file itself"
        )
    found: dict[Path, Collection[str] | None] = {}
    for stem in wanted:
        found |= _indexed(path, path / f"{stem}{INDEX}") if stem in indexed else _by_name(path, stem, names)
    return found


def _stem(name: str) -> str:
    match = _SHARD.fullmatch(name)
    return match["stem"] if match else name.removesuffix(".safetensors")


def _indexed(folder: Path, index: Path) -> dict[Path, Collection[str] | None]:
    weight_map = read_json_object(index, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: holds no weight_map; download it again")
    shards: dict[Path, set[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or name != Path(name).name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: {tensor} lies in {name!r}, which is no safetensors file of this folder")
        shards.setdefault(folder / name, set()).add(tensor)
    _require_all(sorted(shards), f"which {index.name} lists")
    return dict(sorted(shards.items()))


def _by_name(folder: Path, stem: str, names: Collection[str]) -> dict[Path, Collection[str] | None]:
    if f"{stem}.safetensors" in names:
        return {folder / f"{stem}.safetensors": None}
    totals = sorted({match["total"] for name in names if (match := _SHARD.fullmatch(name)) and match["stem"] == stem})
    if len(totals) > 1:
        raise CheckpointError(
            f"{folder}: holds shards of several sets (of {' and of '.join(str(int(total)) for total in totals)}) and "
            f"no {stem}{INDEX} that says which belong to the model; remove the others"
        )
    count = int(totals[0])
    if not 1 <= count <= 10_000:
        raise CheckpointError(f"{folder}: {stem} claims to have {count} shards")
    shards = [folder / f"{stem}-{number:05d}-of-{totals[0]}.safetensors" for number in range(1, count + 1)]
    _require_all(shards, f"one of {count} shards")
    return dict.fromkeys(shards)


def _require_all(shards: Collection[Path], what: str) -> None:
    if missing := [shard for shard in shards if not shard.is_file()]:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(f"{missing[0]}: is missing{more}, {what}; download it again")

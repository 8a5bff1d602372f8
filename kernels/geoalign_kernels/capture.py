"""Saves real inputs of an op while a program runs, and calls the op on them again.

    GEOALIGN_CAPTURE=op:first:last[:folder] geoalign train ...     calls number first..last of ``op`` (from 0) to files
    python profiling/replay.py captures/op-00000.safetensors

One file per call: tensors as ``arg<i>``; the op, the other arguments and the strides in the metadata. A file holds
everything that the call depends on but the device. Writing needs ``safetensors``; nothing else of the package does.
"""

from __future__ import annotations

import collections
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ENV = "GEOALIGN_CAPTURE"
_calls: collections.Counter[str] = collections.Counter()


def record(op: str, args: tuple[Any, ...]) -> None:
    """Writes this call of ``op`` if the environment asks for it; called before the implementation runs.

    Raises:
        ValueError: GEOALIGN_CAPTURE is not op:first:last[:folder].
    """
    text = os.environ.get(ENV, "")
    if not text:
        return
    wanted, first, last, folder = parse(text)
    if op != wanted:
        return
    number = _calls[op]
    _calls[op] += 1
    if first <= number <= last:
        save(folder / f"{op}-{number:05d}.safetensors", op, args)


def parse(text: str) -> tuple[str, int, int, Path]:
    """(op, first call, last call, folder) of the variable's text."""
    op, *rest = text.split(":", 3)
    if len(rest) < 2 or not (rest[0].isdigit() and rest[1].isdigit()):
        raise ValueError(f"{ENV}={text!r}: write op:first:last or op:first:last:folder, e.g. qk_norm_rotary:0:2")
    return op, int(rest[0]), int(rest[1]), Path(rest[2] if len(rest) > 2 else "captures")


def save(path: Path, op: str, args: tuple[Any, ...]) -> None:
    """Writes one call; the file appears whole or not at all."""
    from safetensors.torch import save_file

    tensors = {f"arg{i}": a.detach().cpu().clone().contiguous() for i, a in enumerate(args) if isinstance(a, Tensor)}
    plain = [None if isinstance(a, Tensor) else _plain(a) for a in args]
    strides = {f"arg{i}": a.stride() for i, a in enumerate(args) if isinstance(a, Tensor)}
    # The coefficient table and the like live on the host even when the op runs on a GPU.
    host = [f"arg{i}" for i, a in enumerate(args) if isinstance(a, Tensor) and a.device.type == "cpu"]
    details = {"op": op, "arguments": plain, "strides": strides, "host": host if len(host) < len(tensors) else []}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata={"call": json.dumps(details)})
    os.replace(temporary, path)


def load(path: Path, device: torch.device | str) -> tuple[str, tuple[Any, ...]]:
    """(op, arguments) of a saved call, on ``device``, in the layout they had."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        call = json.loads(file.metadata()["call"])
        args = [getattr(torch, a["dtype"]) if isinstance(a, dict) else a for a in call["arguments"]]
        for name in file.keys():  # noqa: SIM118 - the handle is not a mapping
            place = "cpu" if name in call["host"] else device
            args[int(name.removeprefix("arg"))] = _in_layout(file.get_tensor(name).to(place), call["strides"][name])
    return call["op"], tuple(args)


def _plain(value: Any) -> Any:
    """An argument as JSON holds it; a dtype becomes its name."""
    return {"dtype": str(value).removeprefix("torch.")} if isinstance(value, torch.dtype) else value


def _in_layout(value: Tensor, stride: list[int]) -> Tensor:
    if tuple(stride) == value.stride() or 0 in stride:  # an expanded tensor is kept dense: same values
        return value
    return torch.empty_strided(value.shape, stride, dtype=value.dtype, device=value.device).copy_(value)

"""What ``check`` needs to know of a kernel to compile it as a launch on a GPU would.

Types: ``*bf16`` is a 16-byte aligned pointer, ``i32/16`` an integer divisible by 16 (Triton finds both out by itself at
a launch), ``None`` an absent operand.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Type = str | None | tuple[str, ...]
DENSE = ("i32/16", "i32/16")  # batch and token strides of [B, S, 1536]
PHASE = ("i32", "i32", "i32")  # batch, token and head strides of [B, S, 12, 42]


class Spill(NamedTuple):
    """Bytes of spill stores and loads that ptxas may need, and why they are worth it."""

    reason: str
    bytes: int


class Narrow(NamedTuple):
    """Global memory instructions that cannot move 16 bytes a lane, and why."""

    reason: str
    loads: int
    stores: int = 0


@dataclass(frozen=True)
class KernelConfig:
    """One kernel with the argument types, constants and launch options of a production launch."""

    path: str
    """``module:kernel`` below geoalign_kernels.ops"""
    label: str
    arguments: Mapping[str, Type]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]
    mma: Mapping[str, str] = field(default_factory=dict)
    """Tensor-core opcodes that must appear, per target, joined by +."""
    narrow: tuple[Narrow, ...] = ()
    """Accesses below 16 bytes; all others must be full."""
    narrow_by_target: Mapping[int, tuple[Narrow, ...]] = field(default_factory=dict)
    """More of them at some targets."""
    by_target: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    """Constants that differ between targets."""
    options_by_target: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    """Launch options that differ between targets."""
    spills: Mapping[str, Spill] = field(default_factory=dict)
    """Targets at which registers may spill, none unless listed."""
    not_applicable: Mapping[int, str] = field(default_factory=dict)
    """Targets that this kernel is not made for, and why."""

    @property
    def targets(self) -> tuple[int, ...]:
        """Targets it is compiled for."""
        return tuple(target for target in (80, 90) if target not in self.not_applicable)

    @property
    def kernel_name(self) -> str:
        """``op.kernel``, e.g. ``qk_norm_rotary.forward``."""
        module, _, kernel = self.path.partition(":")
        return f"{module.partition('.')[0]}.{kernel.removesuffix('_kernel')}"

    def launch_options(self, target: int) -> dict[str, Any]:
        """Warps, stages and compiler options of a launch on ``target``."""
        return {**self.options, **self.options_by_target.get(target, {})}

    def constants_for(self, target: int) -> dict[str, Any]:
        """Compile-time arguments of a launch on ``target``."""
        return {**self.constants, **self.by_target.get(target, {})}

    def flops(self, target: int) -> float:
        """Of one iteration of the main loop, by the convention of attention kernels; 0 for kernels of rows."""
        given = self.constants_for(target)
        return 4.0 * given["BM"] * given["BN"] * given["HEAD"] if self.mma else 0.0

    def kernel(self) -> Any:
        """The jitted function."""
        module, _, kernel = self.path.partition(":")
        return getattr(importlib.import_module(f"geoalign_kernels.ops.{module}"), kernel)

    def source_arguments(self, target: int) -> tuple[dict[str, Any], dict[Any, Any], dict[Any, Any]]:
        """(signature, constants, attributes) as ``triton.compiler.ASTSource`` wants them, in the kernel's order."""
        given = self.constants_for(target)
        signature: dict[str, Any] = {}
        constants: dict[Any, Any] = {}
        attributes: dict[Any, Any] = {}
        for index, name in enumerate(self.kernel().arg_names):
            kind = None if name in given else self.arguments[name]
            if kind is None:
                signature[name] = "constexpr"
                constants[(index,)] = given.get(name)
                continue
            parts = kind if isinstance(kind, tuple) else (kind,)
            plain = tuple(part.removesuffix("/16") for part in parts)
            signature[name] = plain if isinstance(kind, tuple) else plain[0]
            for place, part in enumerate(parts):
                if part.startswith("*") or part.endswith("/16"):
                    path = (index, place) if isinstance(kind, tuple) else (index,)
                    attributes[path] = [["tt.divisibility", 16]]
        return signature, constants, attributes


def each(kind: Type, *names: str) -> dict[str, Type]:
    """The same type for several arguments."""
    return dict.fromkeys(names, kind)

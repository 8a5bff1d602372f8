"""``accelerate``: finds a known network in a module, checks that the fused block computes what its block does, patches.

Levels: "lossless" changes no bit (rotary tables are kept); "rounding" is the same mathematics with other roundings.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from geoalign_kernels.dispatch import BackendUnavailableError
from geoalign_kernels.dropin import diffsynth_wan, diffusers_wan
from geoalign_kernels.dropin.parts import Core, Patch
from geoalign_kernels.ops.attention import cores, exact_only, resolve_attention

Level = Literal["lossless", "rounding"]
LEVELS = ("lossless", "rounding")
_MARK = "_geoalign_level"
_BLOCKS: tuple[tuple[tuple[str, ...], tuple[str, ...], ModuleType], ...] = (
    (diffusers_wan.BLOCK, diffusers_wan.PARTS, diffusers_wan),
    (diffsynth_wan.PLAIN_BLOCK, diffsynth_wan.PARTS, diffsynth_wan),
    (diffsynth_wan.CAMERA_BLOCK, diffsynth_wan.PARTS, diffsynth_wan),
)
# Relative L2 difference of one block's output that is rounding: far below what another formula would give.
_ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class UnknownNetwork(ValueError):
    """The module holds no network that the adapters know, or one whose block computes something else."""


class Handle:
    """What ``accelerate`` did to one network. Made by it alone.

    Attributes:
        network: the network that was patched, inside whatever wraps it.
        level: "lossless" or "rounding".
        core: the attention core by name, or None where it is resolved by device and dtype at the first call.
    """

    def __init__(self, network: nn.Module, level: Level, core: Core, rows: Sequence[tuple[str, str, str]]) -> None:
        self.network, self.level, self.core = network, level, core.name
        self._rows, self._patches = list(rows), list[Patch]()

    def report(self) -> list[dict[str, str]]:
        """One row per part: ``part``, what ``runs`` there ("left alone" where nothing was changed), and ``why``."""
        return [dict(zip(("part", "runs", "why"), row, strict=True)) for row in self._rows]

    def window(self) -> AbstractContextManager[None]:
        """Refuse quantised attention inside: for steps whose log-probability is taken, and for their replay."""
        return exact_only()

    def remove(self) -> None:
        """Put every part back; the network computes the bits that it did before.

        Raises:
            RuntimeError: something else replaced a patched part afterwards; undo that first. Nothing is removed then.
        """
        foreign = next((patch for patch in self._patches if not patch.is_ours), None)
        if foreign is not None:
            raise RuntimeError(
                f"{type(foreign.owner).__name__}.{foreign.name} was replaced after accelerate(): undo that first"
            )
        for patch in reversed(self._patches):
            patch.undo()
        self._patches.clear()

    def _apply(self, patches: Sequence[Patch]) -> None:
        for patch in patches:
            patch.apply()
            self._patches.append(patch)


def accelerate(
    module: nn.Module, *, level: Level = "rounding", attention: str = "auto", compile: bool = False
) -> Handle:
    """Run the Wan network inside ``module`` on the fused ops, until ``handle.remove()``.

    Parameters, their names, buffers and submodules stay as they are: ``state_dict``, LoRA (before or after this call),
    gradient checkpointing, ``torch.compile``, DDP and FSDP go on working. Only attributes of instances are set.

    Args:
        module: diffusers' ``WanTransformer3DModel``, or the Wan DiT of DiffSynth or ReDirector, by itself or wrapped
            (PEFT, DDP). Wrap into FSDP after this call.
        level: "lossless" changes no bit: rotary tables are kept for each video shape, no more. "rounding" fuses norms,
            modulation, rotary embedding, residuals and attention; outputs and gradients differ by rounding.
        attention: core of exact attention (``resolve_attention``): "auto" takes the first that runs for the device and
            dtype; a name is checked now. Read at level "rounding" only.
        compile: run the fused blocks through ``torch.compile``; all blocks of a network share one graph.

    Raises:
        UnknownNetwork: no known network inside, or its block computes something else than the fused one; says what was
            expected.
        ValueError: unknown level or core, ``compile`` at level "lossless", or a network that is accelerated already.
        BackendUnavailableError: a core that is named cannot run here.
    """
    if level not in LEVELS:
        raise ValueError(f"level '{level}': choose one of {', '.join(LEVELS)}")
    if compile and level == "lossless":
        raise ValueError("compile=True changes bits: use level='rounding'")
    network, adapter = _find(module)
    core = _core(network, attention)
    if level == "lossless":
        return _lossless(network, adapter, core)
    handle = Handle(network, level, core, [*adapter.rows(network), ("attention core", _name_of(core, network), "")])
    checked = _verify(network, adapter, core)
    handle._rows.append(("check of block 0 against its own code", *checked))
    handle._apply([Patch(network, _MARK, level), *adapter.patches(network, core, compile)])
    return handle


def _lossless(network: nn.Module, adapter: ModuleType, core: Core) -> Handle:
    kept = adapter.caches(network)
    rows = [("rotary tables", "kept for each video shape", "")] if kept else []
    why = "a cache of text keys would outlive LoRA switches and writes to .data, which nothing announces"
    rows.append(("everything else", "left alone", f"every fused op rounds differently; {why}"))
    handle = Handle(network, "lossless", core, rows)
    handle._apply([Patch(network, _MARK, "lossless"), *kept])
    return handle


def _find(module: nn.Module) -> tuple[nn.Module, ModuleType]:
    reasons = []
    for candidate in module.modules():
        blocks = getattr(candidate, "blocks", None)
        if not isinstance(blocks, nn.ModuleList) or len(blocks) == 0:
            continue
        if _MARK in candidate.__dict__:
            raise ValueError(f"{type(candidate).__name__} is accelerated already: use its handle, or remove() it first")
        name, parameters = type(candidate).__name__, tuple(inspect.signature(type(blocks[0]).forward).parameters)[1:]
        adapter = next(
            (a for names, parts, a in _BLOCKS if parameters == names and all(hasattr(blocks[0], p) for p in parts)),
            None,
        )
        if adapter is None:
            reasons.append(f"{name} has blocks of {type(blocks[0]).__name__}({', '.join(parameters)})")
            continue
        reason = adapter.obstacle(candidate)
        if not reason:
            return candidate, adapter
        reasons.append(f"{name}: {reason}")
    expected = "; ".join(f"{a.NAME} with blocks forward({', '.join(names)})" for names, _, a in _BLOCKS)
    found = "; ".join(reasons) or f"{type(module).__name__} has no list of blocks"
    raise UnknownNetwork(f"accelerate knows: {expected}. Found: {found}")


def _core(network: nn.Module, attention: str) -> Core:
    if attention == "auto":
        return Core(None)
    if attention not in cores.CORES:
        raise ValueError(f"attention='{attention}': choose auto or one of {', '.join(cores.CORES)}")
    matrix = _matrix(network)
    # Under autocast float32 weights meet attention in bfloat16.
    reasons = [cores.why_not(attention, matrix.device, dtype) for dtype in (matrix.dtype, torch.bfloat16)]
    if all(reasons):
        raise BackendUnavailableError(f"attention core '{attention}' was asked for: {reasons[0]}")
    return Core(attention)


def _matrix(network: Any) -> Tensor:
    """A weight whose device and dtype are those of the products: tables and norms may be kept in float32."""
    return next(parameter for parameter in network.blocks[0].parameters() if parameter.dim() == 2)


def _name_of(core: Core, network: nn.Module) -> str:
    if core.name:
        return core.name
    matrix = _matrix(network)
    return f"auto: {resolve_attention(matrix.device, matrix.dtype)} for {matrix.dtype} on {matrix.device.type}"


@torch.no_grad()
def _verify(network: Any, adapter: ModuleType, core: Core) -> tuple[str, str]:
    """Run block 0 both ways on small random input: a version whose formula changed must not be accelerated.

    Raises:
        UnknownNetwork: the results differ by more than rounding.
    """
    block = network.blocks[0]
    parameter = _matrix(network)
    whole = all(type(p) is nn.Parameter and p.numel() and not p.is_meta for p in block.parameters())
    if not whole or parameter.dtype not in _ROUNDING:
        return "not done", "its parameters are sharded, quantised or not there yet"
    generator = torch.Generator(parameter.device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=parameter.device, dtype=torch.float32).to(parameter.dtype)

    plain, fused = adapter.probe(network, randn)
    modes = [(part, part.training) for part in block.modules()]
    block.eval()  # a dropout of LoRA would draw from the caller's generator
    trial = [patch for patch in adapter.patches(network, core, False) if patch.owner in {*block.modules()}]
    try:
        before = block(*plain)
        for patch in trial:
            patch.apply()
        try:
            after = block(*fused)
        finally:
            for patch in reversed(trial):
                patch.undo()
    finally:
        for part, training in modes:
            part.training = training
    difference = float((after - before).double().norm() / before.double().norm())
    if not difference <= _ROUNDING[parameter.dtype]:
        raise UnknownNetwork(
            f"{type(network).__name__}: block 0 differs from the fused block by {difference:.1e} (relative), more than "
            f"rounding: this version of {type(block).__module__} computes something that the adapter does not know"
        )
    return "agrees", f"relative difference {difference:.1e} in {parameter.dtype}"

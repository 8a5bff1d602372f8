"""An approximate twin of a network for steps that take no log-probability: 8-bit attention, int8 frozen linears."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from geoalign.errors import ConfigError
from geoalign.install import install
from geoalign.models.dit import RetakeDiT
from geoalign.models.execution import Execution
from geoalign.models.layers import Block
from geoalign_kernels import ProbedInt8Attention
from geoalign_kernels.ops.attention.probe import Mode


def fast_twin(model: RetakeDiT, *, attention: Sequence[Mode], threshold: float, linears: bool) -> RetakeDiT:
    """A network with the very parameters of ``model`` that runs them faster and less exactly.

    Args:
        model: the exact network; updates of its trained parameters are seen by the twin.
        attention: quantised modes in the order of preference, each layer by a probe; none: exact attention.
        threshold: relative error of attention's output up to which the probe accepts a mode.
        linears: replace frozen linears of the blocks by 8-bit weights and activations; this copies their weights.

    Raises:
        ConfigError: int8 linears without torchao.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    execution = replace(model.execution)
    if attention:
        execution.probe = ProbedInt8Attention(threshold, modes=attention)
    twin = _copy(model, execution, shared)
    if linears:
        _quantise(twin)
    return twin


def in_dtype(model: RetakeDiT, dtype: torch.dtype) -> RetakeDiT:
    """A copy of ``model`` with weights and matrix products in ``dtype``."""
    return _copy(model, replace(model.execution, dtype=dtype), {}).to(dtype)


def _copy(model: RetakeDiT, execution: Execution, shared: Mapping[int, Any]) -> RetakeDiT:
    """A copy with an execution of its own and the ``shared`` objects (by id); the execution of ``model`` must not be
    copied deeply, because it may hold a process group."""
    return copy.deepcopy(model, {**shared, id(model.execution): execution})


def attention_modes(twin: RetakeDiT) -> list[Mode] | None:
    """What the probe chose for each block of ``twin``; None while it has yet to measure one, or without a probe."""
    modes = [block.self_attn.mode for block in twin.blocks]
    return None if None in modes else cast(list[Mode], modes)


def set_attention_modes(twin: RetakeDiT, modes: Sequence[str]) -> bool:
    """Run each block of ``twin`` in a mode that was measured before; False, and measure anew, where they do not fit."""
    probe = twin.execution.probe
    if probe is None or len(modes) != len(twin.blocks) or not {*modes} <= {*probe.modes, "exact"}:
        return False
    probe.settle(cast(list[Mode], modes))
    for block, mode in zip(cast("list[Block]", twin.blocks), modes, strict=True):
        block.self_attn.mode = cast(Mode, mode)
    return True


def forget_attention_modes(twin: RetakeDiT) -> None:
    """Measure the blocks of ``twin`` anew, if it has a probe: its inputs are others now."""
    if twin.execution.probe is None:
        return
    twin.execution.probe = ProbedInt8Attention(twin.execution.probe.threshold, modes=twin.execution.probe.modes)
    for block in cast("list[Block]", twin.blocks):
        block.self_attn.mode = None


def _quantise(model: RetakeDiT) -> None:
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError as error:
        raise ConfigError(f"ode.linears=int8 needs torchao ({install('gpu')}): {error}") from error

    def frozen(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and not any(p.requires_grad for p in module.parameters())

    for block in model.blocks:
        for part in (block.ffn, block.cross_attn):
            quantize_(part, Int8DynamicActivationInt8WeightConfig(), filter_fn=frozen)

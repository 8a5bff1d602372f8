"""Which parameters are trained, their optimizer, its schedule and its state by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from geoalign.config.training import OptimConfig
from geoalign.errors import CheckpointError, ConfigError
from geoalign.install import install
from geoalign.models.dit import RetakeDiT


def freeze_all_but(model: RetakeDiT, pattern: str) -> dict[str, nn.Parameter]:
    """Freeze every parameter whose name does not match ``pattern``; return the trained ones by name.

    Raises:
        ConfigError: nothing matches, or a parameter whose output is kept with the condition would miss its gradient.
    """
    expression = re.compile(pattern)
    trained = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(bool(expression.search(name)))
        if parameter.requires_grad:
            trained[name] = parameter
    if not trained:
        some = ", ".join(name for name, _ in list(model.named_parameters())[:3])
        raise ConfigError(f"optim.trainable {pattern!r} matches no parameter (names look like: {some})")
    if cached := [name for name in trained if model.is_cached(name)]:
        raise ConfigError(
            f"optim.trainable {pattern!r} matches {cached[0]} ({len(cached)} such): what it computes is kept with the "
            "condition and gets no gradient; train self-attention, feed-forward or modulation only"
        )
    return trained


def build_adamw(values: Mapping[str, nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW with one parameter group per configured pattern and a last one for the rest.

    Raises:
        ConfigError: a pattern matches no trained parameter, or 8-bit states are asked for without torchao.
    """
    groups = parameter_groups(values, config)
    if config.states == "int8":
        try:
            from torchao.optim import AdamW8bit
        except ImportError as error:
            raise ConfigError(f"optim.states=int8 needs torchao ({install('gpu')}): {error}") from error
        return AdamW8bit(groups, lr=config.lr, betas=config.betas, eps=config.eps)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, foreach=False)


def parameter_groups(values: Mapping[str, nn.Parameter], config: OptimConfig) -> list[dict[str, Any]]:
    """Groups for an optimizer; ``peak_lr`` is what :func:`set_learning_rate` scales.

    Raises:
        ConfigError: a pattern matches no trained parameter.
    """
    patterns = [(group.pattern, group.lr, group.weight_decay) for group in config.groups]
    patterns.append(("", config.lr, config.weight_decay))
    members: list[list[nn.Parameter]] = [[] for _ in patterns]
    for name, parameter in values.items():
        index = next(i for i, (pattern, _, _) in enumerate(patterns) if re.search(pattern, name))
        members[index].append(parameter)
    for (pattern, _, _), parameters in zip(patterns[:-1], members, strict=False):
        if not parameters:
            raise ConfigError(f"optim.groups: pattern {pattern!r} matches no trained parameter")
    return [
        {"params": parameters, "lr": lr, "peak_lr": lr, "weight_decay": decay}
        for (_, lr, decay), parameters in zip(patterns, members, strict=True)
        if parameters
    ]


def set_learning_rate(optimizer: torch.optim.Optimizer, config: OptimConfig, iteration: int, iterations: int) -> float:
    """Set every group's rate for ``iteration`` (from 0, a pure function of it); return the factor on the peak rates."""
    factor = min(1.0, (iteration + 1) / config.warmup) if config.warmup else 1.0
    if config.schedule == "linear":
        factor *= 1 - iteration / iterations
    for group in optimizer.param_groups:
        rate = group["peak_lr"] * factor
        if isinstance(group["lr"], Tensor):  # torchao compiles its step and wants a tensor to stay a tensor
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    return factor


def optimizer_state(
    optimizer: torch.optim.Optimizer, values: Mapping[str, nn.Parameter]
) -> dict[str, dict[str, Tensor]]:
    """The optimizer's tensors by parameter name (empty before the first update).

    A quantised state ``key`` is stored as its parts ``key.codes``, ``key.scale``, ...
    """
    return {
        name: dict(item for key, value in optimizer.state[p].items() for item in _parts(key, value))
        for name, p in values.items()
        if p in optimizer.state
    }


@torch.no_grad()
def load_optimizer_state(
    optimizer: torch.optim.Optimizer, values: Mapping[str, nn.Parameter], saved: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Take over :func:`optimizer_state`.

    Raises:
        CheckpointError: states of other parameters, or of another kind of optimizer.
    """
    if unknown := sorted(saved.keys() - values.keys()):
        raise CheckpointError(f"optimizer state of parameters that are not trained: {', '.join(unknown[:3])}")
    for name, entry in saved.items():
        value = values[name]
        state = {}
        for key in dict.fromkeys(part.partition(".")[0] for part in entry):
            quantised = [part for part in entry if part.startswith(f"{key}.")]
            if not quantised:
                state[key] = entry[key].to(value.device if entry[key].dim() else "cpu", copy=True)
                continue
            if not hasattr(optimizer, "_new_buffer"):
                raise CheckpointError(f"the optimizer state of {name} is quantised; resume with optim.states=int8")
            state[key] = optimizer._new_buffer(value, key == "exp_avg")
            for part in quantised:
                getattr(state[key], part.partition(".")[2]).copy_(entry[part])
        optimizer.state[value] = state


def _parts(key: str, value: Tensor) -> list[tuple[str, Tensor]]:
    if isinstance(value, DTensor) or not hasattr(value, "__tensor_flatten__"):
        return [(key, value)]
    return [(f"{key}.{part}", getattr(value, part)) for part in value.__tensor_flatten__()[0]]

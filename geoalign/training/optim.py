"""The trained parameters: which ones, their learning rates, the schedule and the moving average."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from geoalign.config.training import OptimConfig
from geoalign.errors import ConfigError


def freeze_all_but(model: nn.Module, pattern: str) -> dict[str, nn.Parameter]:
    """Freeze every parameter whose name does not match ``pattern``; return the trained ones by name.

    Raises:
        ConfigError: nothing matches.
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
    return trained


def build_adamw(trained: Mapping[str, nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with one parameter group per configured pattern and a last one for the rest.

    Raises:
        ConfigError: a pattern matches no trained parameter.
    """
    patterns = [(group.pattern, group.lr, group.weight_decay) for group in config.groups]
    patterns.append(("", config.lr, config.weight_decay))
    members: list[list[nn.Parameter]] = [[] for _ in patterns]
    for name, parameter in trained.items():
        index = next(i for i, (pattern, _, _) in enumerate(patterns) if re.search(pattern, name))
        members[index].append(parameter)
    for (pattern, _, _), parameters in zip(patterns[:-1], members, strict=False):
        if not parameters:
            raise ConfigError(f"optim.groups: pattern {pattern!r} matches no trained parameter")
    groups = [
        {"params": parameters, "lr": lr, "peak_lr": lr, "weight_decay": decay}
        for (_, lr, decay), parameters in zip(patterns, members, strict=True)
        if parameters
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, foreach=False)


def set_learning_rate(optimizer: torch.optim.Optimizer, config: OptimConfig, iteration: int, iterations: int) -> float:
    """Set every group's rate for ``iteration`` (from 0, a pure function of it); return the factor on the peak rates."""
    factor = min(1.0, (iteration + 1) / config.warmup) if config.warmup else 1.0
    if config.schedule == "linear":
        factor *= 1 - iteration / iterations
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return factor


class MovingAverage:
    """Exponential moving average of the trained parameters, in fp32.

    ``decay`` 0 keeps no copies: the average is the parameters themselves.
    """

    def __init__(self, trained: Mapping[str, nn.Parameter], decay: float) -> None:
        self.trained, self.decay = trained, decay
        self.average = {name: p.detach().float().clone() for name, p in trained.items()} if decay else {}

    @torch.no_grad()
    def update(self) -> None:
        """Blend the current parameters in."""
        for name, average in self.average.items():
            average.lerp_(self.trained[name].float(), 1 - self.decay)

    def state(self) -> dict[str, Tensor]:
        """The averaged values by parameter name (the parameters themselves without an average)."""
        return self.average or {name: p.detach() for name, p in self.trained.items()}

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange parameters and average in place; call it twice around an evaluation."""
        for name, average in self.average.items():
            current = self.trained[name].detach().float().clone()
            self.trained[name].copy_(average)
            average.copy_(current)

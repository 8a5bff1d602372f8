"""The answers of all rewards as one table, in which one failing scorer never biases the others (rule R4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from geoalign.rewards.running.turns import Scored


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of R videos.

    Attributes:
        scores: reward key -> ``[R]`` float32, 0 where invalid or lost.
        valid: ``[R]`` bool, False if any scorer failed on the sample (infrastructure failures only).
        lost: ``[R]`` bool, True if some reward could read nothing in a valid sample (content failures).
        parts: physical quantities for people, ``[R]`` each.
        diagnostics: further named ``[R]`` values.
        failures: scorer -> number of samples it failed on; a sample that two scorers failed on counts for both.
        seconds: scorer -> seconds.
    """

    scores: Mapping[str, Tensor]
    valid: Tensor
    lost: Tensor
    parts: Mapping[str, Tensor]
    diagnostics: Mapping[str, Tensor]
    failures: Mapping[str, int]
    seconds: Mapping[str, float]


def merged(scored: Scored, usable: Tensor | None = None) -> Scores:
    """What the rewards say of R videos as one table; a sample that any reward failed on is invalid, and one that
    any reward could not read is lost.

    Args:
        scored: the answers of all rewards.
        usable: ``[R]`` bool, False for samples that already failed (NaN latents); they stay invalid.
    """
    outputs = scored.outputs
    device, count = next((o.valid.device, len(o.valid)) for o in outputs.values())
    valid = torch.ones(count, dtype=torch.bool, device=device) if usable is None else usable.to(device, copy=True)
    lost = torch.zeros_like(valid)
    scores: dict[str, Tensor] = {}
    parts: dict[str, Tensor] = {}
    diagnostics: dict[str, Tensor] = {}
    failures: dict[str, int] = {"policy": int((~valid).sum())}
    for name, output in outputs.items():
        failures[name] = int((~output.valid).sum())
        valid &= output.valid
        lost |= output.lost
        scores |= output.scores
        parts |= output.parts
        diagnostics |= {f"{name}/{key}": value for key, value in output.diagnostics.items()}
    lost &= valid
    scores = {key: torch.where(valid & ~lost, value, torch.zeros_like(value)) for key, value in scores.items()}
    return Scores(scores, valid, lost, parts, diagnostics, failures, scored.seconds)

"""Reward settings: which scorers run and when failures stop a run (weights: see ``advantage.weights``)."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from geoalign.config.base import Section


class RewardConfig(Section):
    """One scorer."""

    kind: str
    """Registered scorer: ``geometry``, ``source_consistency``, ``videoalign``, ``hpsv3``."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the scorer; an unknown one is an error that lists the known ones."""


class FailureConfig(Section):
    """What happens when a scorer or a clip fails (rule: masked, counted, never scored 0)."""

    max_invalid_fraction: float = Field(0.25, gt=0, le=1)
    """The run stops when more than this share of an iteration's samples is invalid."""
    timeout_s: float = Field(600.0, gt=0)
    """Longest time that one scorer may take for one batch, in seconds."""

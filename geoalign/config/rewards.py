"""Reward settings: which scorers run and when failures stop a run (weights: see ``advantage.weights``)."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from geoalign.config.base import Section


class RewardConfig(Section):
    """One scorer."""

    kind: str
    """Registered scorer: ``geometry``, ``source_consistency``, ``videoalign``, ``hpsv3``; ``package.module:Class`` or
    the name of an entry point in ``geoalign.rewards``: your own code, which is run (docs/api.md)."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the scorer; an unknown one is an error that lists the known ones."""
    placement: Literal["inline", "worker"] = "inline"
    """Where it runs: in the training process, or in a process of its own that survives crashes and time-outs."""
    python: str | None = None
    """Interpreter of the worker's environment (with geoalign's own requirements); unset: the one of the run."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Extra environment variables of the worker, for instance ``CUDA_VISIBLE_DEVICES``."""

    @model_validator(mode="after")
    def _worker_settings_need_a_worker(self) -> Self:
        if self.placement == "inline" and (self.python is not None or self.environment):
            raise ValueError("python and environment belong to a process of its own: set placement to worker")
        return self


class ScoringConfig(Section):
    """How decoding and scoring of an iteration's videos are laid out; no setting changes what is scored."""

    chunk: int | None = Field(None, ge=1)
    """Videos that are decoded and scored at a time; unset: those of one group that the rank has."""
    beside_decode: bool = False
    """Score a chunk on a side stream (CPU: a thread) while the next one is decoded. Two chunks are then in memory."""
    take_turns: bool = False
    """Keep the weights of inline scorers in page-locked host memory and bring those of one at a time to the device: the
    memory of the largest scorer instead of all, for a copy per scorer and chunk."""


class FailureConfig(Section):
    """What happens when a scorer, a clip or an update fails (rule: masked, counted, never scored 0)."""

    max_invalid_fraction: float = Field(0.25, gt=0, le=1)
    """The run stops when more than this share of an iteration's samples is invalid."""
    max_skipped_updates: int = Field(3, ge=1)
    """The run stops when every update of this many iterations in a row was skipped, because no gradient was finite."""
    timeout_s: float | None = Field(None, gt=0)
    """Longest time in seconds that one scorer may take for one batch; unset: 600 for workers, none for inline scorers.
    A late worker is killed and started again. A late inline scorer cannot be killed: it stays invalid until it returns,
    and on a GPU it may hold up the others; give a scorer that may hang a worker. An inline scorer's first batch of a
    shape may take ten times as long (native code is built, graphs are captured).
    """
    retries: int = Field(1, ge=0)
    """How often a batch that raises is scored again before its samples are scored one by one."""

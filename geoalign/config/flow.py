"""Configuration of the sampler, its stochastic window, the advantages and the objective."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from geoalign.config.base import Section

SdeVariant = Literal["flow", "dance", "cps", "longcat_truncated", "linear"]
TailGrid = Literal["schedule", "sigma"]
OdeSolver = Literal["euler", "dpm2m"]
WindowKind = Literal["progressive", "random", "exp_decay", "fixed"]
StdMode = Literal["batch_max", "batch_rms", "group", "global"]
LossWeight = Literal["longcat", "exact_inverse", "guard", "tempflow", "none"]
LONGCAT_FLATTENS: tuple[SdeVariant, ...] = ("flow", "longcat_truncated")
"""The samplers whose steps the loss weight ``longcat`` evens out."""


def _assumed(why: str) -> dict[str, Any]:
    return {"paper": "assumed", "why": why}


class FlowConfig(Section):
    """Rectified-flow sampler: time grid, stochastic step inside the window, deterministic solver outside."""

    TAIL: ClassVar[tuple[str, ...]] = ("tail_grid", "tail_ratio", "tail_steps", "tail_solver")
    """Fields that only the steps after the window read."""

    steps: int = Field(25, ge=2, json_schema_extra={"paper": "published", "why": "T = 25 sampling steps"})
    """Sampling steps T of the full time grid."""

    shift: float = Field(
        5.0,
        gt=0,
        json_schema_extra=_assumed("the default of Wan2.1 and of ReDirector inference; alternative 3"),
    )
    """Time shift m: sigma = m u / (1 + (m - 1) u) for u from 1 to 0."""

    sde: SdeVariant = Field(
        "flow", json_schema_extra=_assumed("the paper builds on MixGRPO, which uses Flow-SDE; alternatives selectable")
    )
    """Stochastic step of the window: Flow-SDE, Dance-SDE, coefficient-preserving (CPS), Flow-SDE with capped noise, or
    noise linear in sigma (flow_grpo's Wan path, there with eta 1)."""

    eta: float = Field(0.7, gt=0, json_schema_extra=_assumed("MixGRPO and Flow-GRPO use 0.7; LongCat-Video uses 1"))
    """Noise level of the stochastic step (for CPS at most 1)."""

    eta_by_step: tuple[float, ...] = ()
    """Noise level of steps 0, 1, ...; later steps use ``eta``."""

    noise_cap: float = Field(0.45, gt=0, json_schema_extra=_assumed("LongCat-Video; read by longcat_truncated only"))
    """Largest noise standard deviation of one step, for ``sde: longcat_truncated``."""

    tail_grid: TailGrid = "schedule"
    """Where the steps after the window lie: on the time grid, or uniform in sigma, which CHANGES the videos."""

    tail_ratio: float = Field(1.0, gt=0, le=1)
    """Share of the time grid kept after the window (MixGRPO-Flash). Below 1 it CHANGES the videos that are rewarded."""

    tail_steps: int | None = Field(None, ge=1)
    """Number of steps after the window, instead of a ratio; at most as many as the time grid has there."""

    tail_solver: OdeSolver = "euler"
    """Solver of the steps after the window, and of all steps of ``geoalign benchmark``; those before the window, of
    held-out evaluation and of ``geoalign sample`` are Euler steps."""

    guidance: float = Field(
        1.0,
        ge=1,
        json_schema_extra=_assumed("off: the 130 hours leave no room for two passes; ReDirector infers at 5"),
    )
    """Classifier-free guidance in rollout and learner alike; above 1 every velocity takes two passes."""

    t_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision to which the timestep (1000 sigma) that the network sees is rounded, in rollout and learner alike."""

    def tail_count(self, window_stop: int) -> int:
        """Steps after a window that ends before step ``window_stop``."""
        full = self.steps - window_stop
        if self.tail_steps is not None:
            return min(self.tail_steps, full)
        if self.tail_ratio == 1.0:
            return full
        # MixGRPO-Flash keeps a share of the nodes, and n nodes are n - 1 steps; the relative slack undoes the rounding
        # of products such as 20 * 0.4 that fall just below an integer.
        return max(int((full + 1) * self.tail_ratio * (1 + 1e-12)) - 1, 1)

    def with_exact_tail(self) -> Self:
        """The same sampler with the whole time grid after the window, in Euler steps."""
        return self.model_copy(update={name: type(self).model_fields[name].default for name in self.TAIL})

    @field_validator("eta_by_step")
    @classmethod
    def _positive(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(eta <= 0 for eta in value):
            raise ValueError(f"eta_by_step must hold positive numbers, got {list(value)}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.sde == "cps" and max(self.eta, *self.eta_by_step, 0.0) > 1:
            raise ValueError("sde: cps needs eta and eta_by_step in (0, 1]: 1 already replaces all noise")
        # A resolved configuration names every default, so only another value shows that somebody meant it.
        if self.sde != "longcat_truncated" and self.noise_cap != type(self).model_fields["noise_cap"].default:
            raise ValueError(
                f"noise_cap {self.noise_cap} is read by sde: longcat_truncated only, not by {self.sde}; remove it or "
                "change sde"
            )
        if self.tail_steps is not None and self.tail_ratio < 1:
            raise ValueError(
                f"tail_steps {self.tail_steps} and tail_ratio {self.tail_ratio} both set the tail's length; remove one"
            )
        if len(self.eta_by_step) > self.steps:
            raise ValueError(f"eta_by_step has {len(self.eta_by_step)} entries for {self.steps} steps")
        return self


class WindowConfig(Section):
    """Which consecutive sampling steps are stochastic and trained, as a pure function of the iteration."""

    kind: WindowKind = Field("progressive", json_schema_extra=_assumed("MixGRPO's default schedule"))
    """How the window moves: step by step, at random, staying ever shorter at late steps, or not at all."""

    start: int = Field(0, ge=0, json_schema_extra=_assumed("MixGRPO starts at the noisiest step"))
    """First window start; also the lowest one of ``random``."""

    size: int = Field(4, ge=1, json_schema_extra=_assumed("MixGRPO; 2 to 6 were alike in its ablation"))
    """Number of consecutive stochastic steps."""

    stride: int = Field(1, ge=1, json_schema_extra=_assumed("MixGRPO; a stride of `size` makes windows disjoint"))
    """Steps by which the window advances."""

    interval: int = Field(
        25, ge=1, json_schema_extra=_assumed("MixGRPO; with 140 iterations the window start then reaches step 5 only")
    )
    """Iterations that one position lasts (for ``exp_decay``: at the positions up to ``decay_start``)."""

    end: Literal["roll_back", "clip"] = "roll_back"
    """After the last position: begin again at ``start``, or stay at the largest start."""

    max_start: int | None = Field(None, ge=0)
    """Largest window start; None: the largest that leaves the last step deterministic."""

    decay_rate: float = Field(0.1, ge=0)
    """``exp_decay``: the interval shrinks by exp(-decay_rate) per step after ``decay_start``."""

    decay_start: int = Field(13, ge=0)
    """``exp_decay``: last step that keeps the full interval."""

    def misfit(self, steps: int) -> str:
        """Why no window fits into ``steps`` sampling steps, of which the last is deterministic; empty if one does."""
        limit = steps - 1 - self.size
        if self.start > limit:
            return (
                f"window.start {self.start} + window.size {self.size} reaches the last of flow.steps {steps} steps, "
                "which must stay deterministic; lower window.start or window.size, or raise flow.steps"
            )
        if self.max_start is not None and not self.start <= self.max_start <= limit:
            return f"window.max_start {self.max_start} must lie between window.start {self.start} and {limit}"
        return ""


class AdvantageConfig(Section):
    """From rewards to advantages: per reward key, inside each group, combined after normalisation (eq. 5)."""

    std: StdMode = Field(
        "batch_max",
        json_schema_extra=_assumed(
            "eq. 5 prints max(sigma_group, eps), which is group, but cites LongCat-Video, whose rule is the largest "
            "group deviation. In one run of the embedded default that left 0.317 m of error, group 0.289 m "
            "(docs/log.md, 2026-11-29)"
        ),
    )
    """Denominator: largest or root-mean-square group deviation of the batch, own deviation of the group (eq. 5 as
    printed), or deviation of the whole batch."""

    floor: float | None = Field(None, gt=0)
    """Smallest denominator, in every mode (the epsilon of eq. 5, whose value is not printed); None means 1e-4."""

    floors: dict[str, float] = Field(default_factory=dict)
    """Smallest denominator of single reward keys, in the unit of that reward."""

    quantile: float = Field(1.0, gt=0, le=1)
    """``batch_max``: quantile of the group deviations that serves as the maximum; below 1 guards against one outlier.
    """

    weights: dict[str, float] = Field(
        default_factory=dict, json_schema_extra=_assumed("unit weights, as LongCat-Video")
    )
    """Weight lambda of each reward key in the sum of advantages; keys not named weigh 1."""

    clip: float | None = Field(5.0, gt=0, json_schema_extra=_assumed("all public trainers clip advantages at 5"))
    """Bound on the magnitude of the summed advantage; None: no bound."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.quantile < 1 and self.std != "batch_max":
            raise ValueError(f"quantile is read by std: batch_max only, not by {self.std}")
        if any(value <= 0 for value in self.floors.values()):
            raise ValueError("floors must hold positive numbers")
        return self

    def floor_of(self, key: str) -> float:
        """The smallest denominator of reward ``key``."""
        return self.floors.get(key, 1e-4 if self.floor is None else self.floor)


class ObjectiveConfig(Section):
    """The clipped surrogate with time weights (eq. 7)."""

    clip: float = Field(
        1e-4, gt=0, json_schema_extra=_assumed("MixGRPO; meaningful because log-probabilities are element means")
    )
    """Clip range of the probability ratio."""

    loss_weight: LossWeight = Field("longcat", json_schema_extra=_assumed("eq. 7 names w_t and cites LongCat-Video"))
    """Time weight w_t of a window step; ``longcat`` is made for ``flow.sde`` ``flow`` and ``longcat_truncated``, and
    refused for the others."""

    weight_norm: Literal["none", "window_mean1"] = "none"
    """Divide w_t by its mean over the window, so that gradient norms are comparable between windows."""

    kl_weight: float = Field(0.0, ge=0, json_schema_extra={"paper": "published", "why": "no KL term"})
    """Weight of the KL divergence to the initial policy; above 0 costs one reference forward per window step."""

"""The objective (eq. 7): time-weighted clipped surrogate over the window, optionally with a KL term to a reference."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from geoalign.config.flow import ObjectiveConfig
from geoalign.errors import UsageError
from geoalign.flow.table import NEARLY_ONE, StepTable


def loss_weights(table: StepTable, config: ObjectiveConfig) -> Tensor:
    """Time weights w_t of the window steps: [K] float64, from the same table as the steps themselves.

    With D = sigma - sigma' and the step x' = a x + b v + c eps, the gradient of the log-probability to v is
    proportional to |b| / c, which grows about a hundredfold from the first step to the last. The choices:

    - longcat: sqrt(sigma / ((1 - sigma) D)), LongCat-Video's weight (arXiv 2510.22200), with sigma_1 in 1 - sigma at
      sigma = 1; it cancels |b| / c of an uncapped Flow-SDE up to a constant.
    - exact_inverse: c / |b|, which cancels it for every sampler.
    - guard: c / D, the factor that GRPO-Guard's loss has at ratio 1 (its own ratio normalisation is not included).
    - tempflow: c, the injected noise (TempFlow-GRPO, arXiv 2508.04324).
    - none: 1.

    Raises:
        UsageError: the table has no window.
    """
    if table.window is None:
        raise UsageError("loss_weights needs a table with a stochastic window")
    steps = list(table.window.steps)
    sigma, after = table.sigmas[:-1][steps], table.sigmas[1:][steps]
    delta = sigma - after
    _, b, c, _ = table.coefficients[steps].unbind(1)
    match config.loss_weight:
        case "longcat":
            headroom = 1.0 - torch.where(sigma < NEARLY_ONE, sigma, after)
            weights = (sigma / (headroom * delta)).sqrt()
        case "exact_inverse":
            weights = c / b.abs()
        case "guard":
            weights = c / delta
        case "tempflow":
            weights = c.clone()
        case "none":
            weights = torch.ones_like(c)
    return weights / weights.mean() if config.weight_norm == "window_mean1" else weights


@dataclass(frozen=True, slots=True)
class RatioStats:
    """Statistics of the ratio over valid samples; scalars on the device, to be added over steps and micro-batches.

    Attributes:
        count: number of (sample, step) pairs.
        ratio_sum, ratio_min, ratio_max: of the ratio.
        log_ratio_abs_max: largest magnitude of the log-ratio, 0 before the first update.
        approx_kl_sum: sum of (ratio - 1) - log ratio, the low-variance estimate of KL(old || new).
        clipped_high, clipped_low: pairs whose gradient the clip removed, by side.
    """

    count: Tensor
    ratio_sum: Tensor
    ratio_min: Tensor
    ratio_max: Tensor
    log_ratio_abs_max: Tensor
    approx_kl_sum: Tensor
    clipped_high: Tensor
    clipped_low: Tensor

    @staticmethod
    def empty(device: torch.device | str = "cpu") -> RatioStats:
        """Statistics of nothing."""
        zero, infinity = torch.zeros((), device=device), torch.full((), float("inf"), device=device)
        count = torch.zeros((), dtype=torch.int64, device=device)
        return RatioStats(count, zero, infinity, -infinity, zero, zero, count, count)

    def __add__(self, other: RatioStats) -> RatioStats:
        joined = {}
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            join = torch.minimum if field.name.endswith("_min") else torch.maximum
            joined[field.name] = join(mine, theirs) if field.name.endswith(("_min", "_max")) else mine + theirs
        return RatioStats(**joined)

    def summary(self) -> dict[str, float]:
        """Plain numbers for the metrics file; all ratios are 1 if nothing was counted."""
        count = float(self.count)
        if count == 0:
            return {"ratio_mean": 1.0, "ratio_min": 1.0, "ratio_max": 1.0, "log_ratio_abs_max": 0.0,
                    "approx_kl": 0.0, "clip_fraction_high": 0.0, "clip_fraction_low": 0.0}  # fmt: skip
        return {
            "ratio_mean": float(self.ratio_sum) / count,
            "ratio_min": float(self.ratio_min),
            "ratio_max": float(self.ratio_max),
            "log_ratio_abs_max": float(self.log_ratio_abs_max),
            "approx_kl": float(self.approx_kl_sum) / count,
            "clip_fraction_high": float(self.clipped_high) / count,
            "clip_fraction_low": float(self.clipped_low) / count,
        }


@dataclass(frozen=True, slots=True)
class LossOutput:
    """``loss``: differentiable scalar, this call's share of the total; ``stats``: ratio statistics, detached."""

    loss: Tensor
    stats: RatioStats


def clipped_surrogate(
    log_prob: Tensor,
    log_prob_old: Tensor,
    advantage: Tensor,
    *,
    clip: float,
    weight: float,
    denominator: float,
    valid: Tensor | None = None,
) -> LossOutput:
    """-weight / denominator * sum_i min(r_i A_i, clip(r_i, 1 - clip, 1 + clip) A_i), r = exp(log_prob - log_prob_old).

    The denominator is the number of (valid sample, window step) pairs of the whole update, over all ranks, steps and
    micro-batches; the shares then add up to the same loss under every layout.

    Args:
        log_prob: [B] of the current policy, with graph; element means.
        log_prob_old: [B] of the rollout.
        advantage: [B].
        clip: clip range.
        weight: time weight w_t of this window step.
        denominator: see above.
        valid: [B] bool; False ones contribute neither loss nor gradient nor statistics. Their states must be finite
            all the same (``Rollout.neutralised``): a zero gradient times a NaN activation is NaN.
    """
    keep = torch.ones_like(advantage, dtype=torch.bool) if valid is None else valid
    log_ratio = torch.where(keep, log_prob - log_prob_old, 0.0)
    ratio = log_ratio.exp()
    gain = torch.where(keep, advantage, 0.0).to(ratio)
    surrogate = torch.minimum(ratio * gain, ratio.clamp(1.0 - clip, 1.0 + clip) * gain)
    loss = -(weight / denominator) * surrogate.sum()
    return LossOutput(loss, _ratio_stats(log_ratio.detach(), ratio.detach(), gain, keep, clip))


def _ratio_stats(log_ratio: Tensor, ratio: Tensor, gain: Tensor, keep: Tensor, clip: float) -> RatioStats:
    # Excluded samples have ratio 1, hence they change no sum of (ratio - 1) and no extremum beyond 1.
    return RatioStats(
        count=keep.sum(),
        ratio_sum=torch.where(keep, ratio, 0.0).sum(),
        ratio_min=torch.where(keep, ratio, float("inf")).min(),
        ratio_max=torch.where(keep, ratio, -float("inf")).max(),
        log_ratio_abs_max=log_ratio.abs().max(),
        approx_kl_sum=(torch.expm1(log_ratio) - log_ratio).sum(),
        clipped_high=(keep & (gain > 0) & (ratio > 1.0 + clip)).sum(),
        clipped_low=(keep & (gain < 0) & (ratio < 1.0 - clip)).sum(),
    )


def reference_kl(velocity: Tensor, reference: Tensor, coefficients: Tensor) -> Tensor:
    """KL divergence of one step of the policy from a reference, as an element mean: b^2 mean((v - v_ref)^2) / (2 c^2).

    Both transitions are Gaussians of the same deviation c, whose means differ by b (v - v_ref).

    Args:
        velocity: [B, ...] of the policy, with graph.
        reference: like velocity; detached here.
        coefficients: [4], a row of the table with c > 0.

    Returns:
        [B] in at least float32.
    """
    _, b, c, _ = coefficients.tolist()
    dtype = torch.promote_types(velocity.dtype, torch.float32)
    difference = velocity.to(dtype) - reference.detach().to(dtype)
    return (0.5 * (b / c) ** 2) * difference.square().flatten(1).mean(1)


def kl_loss(kl: Tensor, *, kl_weight: float, weight: float, denominator: float, valid: Tensor | None = None) -> Tensor:
    """kl_weight w_t^2 / denominator * sum_i kl_i; arguments as in ``clipped_surrogate``, kl is [B].

    LongCat-Video squares the policy's weight here: w_t^2 cancels (b / c)^2 as w_t cancels |b| / c.
    """
    kept = kl if valid is None else torch.where(valid, kl, 0.0)
    return (kl_weight * weight**2 / denominator) * kept.sum()

"""The one step table: every sampler step is x' = a x + b v + c eps + d m_prev with float64 host coefficients.

Notation: v is the velocity n - x0 of the rectified flow x_sigma = (1 - sigma) x0 + sigma n, sigma' < sigma the next
noise level, m = x - sigma v the predicted clean latent, m_prev that of the step before, eps standard normal.
Rollout, learner and every kernel read (a, b, c, d) and the timesteps from the same table, so they cannot disagree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from geoalign.config.flow import FlowConfig, OdeSolver, SdeVariant
from geoalign.errors import ConfigError
from geoalign.flow.sigmas import flash_grid, full_grid

Row = tuple[float, float, float, float]
TIMESTEP_SCALE = 1000.0


@dataclass(frozen=True, slots=True)
class StepWindow:
    """The stochastic steps start, ..., stop - 1; never empty."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ConfigError(f"window [{self.start}, {self.stop}) is empty or negative")

    @property
    def size(self) -> int:
        """Number of stochastic steps."""
        return self.stop - self.start

    @property
    def steps(self) -> range:
        """The step indices."""
        return range(self.start, self.stop)


@dataclass(frozen=True, slots=True, eq=False)
class StepTable:
    """All numbers of one trajectory; S is the number of steps actually taken (fewer than T with a coarser tail).

    Attributes:
        sigmas: [S + 1] float64 noise levels, from 1 to 0.
        timesteps: [S] float64, 1000 sigma as the network sees it (rounded if the config says so).
        kind: "ode" or "sde" per step.
        coefficients: [S, 4] float64, columns a, b, c, d.
        window: the stochastic steps; None if there are none.
    """

    sigmas: Tensor
    timesteps: Tensor
    kind: tuple[str, ...]
    coefficients: Tensor
    window: StepWindow | None

    @property
    def num_steps(self) -> int:
        """Network evaluations of one trajectory (NFE)."""
        return len(self.kind)

    def row(self, step: int) -> Tensor:
        """Coefficients [4] of a step."""
        return self.coefficients[step]

    def needs_history(self, step: int) -> bool:
        """Whether the step reads m_prev."""
        return 0 <= step < self.num_steps and bool(self.coefficients[step, 3] != 0)


def build_step_table(config: FlowConfig, window: StepWindow | None = None) -> StepTable:
    """The table of a trajectory that is stochastic inside ``window`` and deterministic elsewhere.

    Steps before the window are Euler steps, steps after it (all of them without a window) use ``config.tail_solver``;
    a multistep solver takes its first history from the last window step. The coarser tail (``config.tail_ratio``)
    exists only after a window.

    Raises:
        ConfigError: the window reaches the last step, which must be deterministic: its noise would stay in the video.
    """
    if window is not None and window.stop > config.steps - 1:
        raise ConfigError(
            f"window [{window.start}, {window.stop}) reaches the last of {config.steps} steps, which must be "
            f"deterministic: use a window that ends at step {config.steps - 1} at most"
        )
    if window is None:
        sigmas = full_grid(config.steps, config.shift)
    else:
        sigmas = flash_grid(config.steps, config.shift, window.stop, config.tail_ratio)
    levels = sigmas.tolist()
    stochastic = window.steps if window is not None else range(0)
    tail_start = stochastic.stop
    rows: list[Row] = []
    for k in range(len(levels) - 1):
        if k in stochastic:
            rows.append(_sde_row(config, levels, k))
        else:
            rows.append(ode_row(config.tail_solver if k >= tail_start else "euler", levels, k))
    return StepTable(
        sigmas=sigmas,
        timesteps=_timesteps(sigmas[:-1], config.t_dtype),
        kind=tuple("sde" if k in stochastic else "ode" for k in range(len(rows))),
        coefficients=torch.tensor(rows, dtype=torch.float64),
        window=window,
    )


def _timesteps(sigmas: Tensor, dtype: str) -> Tensor:
    return (TIMESTEP_SCALE * sigmas).to(getattr(torch, dtype)).to(torch.float64)


def ode_row(solver: OdeSolver, sigmas: list[float], k: int) -> Row:
    """Deterministic step k. DPM-Solver++ of order 1 is the Euler step of this flow, order 2 multistep midpoint.

    Order 2 falls back to order 1 without history and where its log signal-to-noise ratios are infinite: in the first
    two steps and in the last (arXiv 2211.01095, with alpha = 1 - sigma).
    """
    sigma, after = sigmas[k], sigmas[k + 1]
    gain = 1.0
    if solver == "dpm2m" and k > 0 and sigmas[k - 1] < 1.0 and after > 0.0:
        h, h_prev = _log_snr(after) - _log_snr(sigma), _log_snr(sigma) - _log_snr(sigmas[k - 1])
        gain = 1.0 + 0.5 * h / h_prev
    if gain == 1.0:
        return 1.0, after - sigma, 0.0, 0.0
    # x' = (sigma'/sigma) x + (1 - sigma'/sigma) (gain m + (1 - gain) m_prev), with m = x - sigma v substituted.
    share = 1.0 - after / sigma
    return after / sigma + share * gain, -sigma * share * gain, 0.0, share * (1.0 - gain)


def _log_snr(sigma: float) -> float:
    return math.log((1.0 - sigma) / sigma)


def _sde_row(config: FlowConfig, sigmas: list[float], k: int) -> Row:
    eta = config.eta_by_step[k] if k < len(config.eta_by_step) else config.eta
    return _SDE_ROWS[config.sde](config, sigmas, k, eta)


def _flow_level(sigmas: list[float], k: int, eta: float) -> float:
    # eta sqrt(sigma / (1 - sigma)) diverges at sigma = 1; sigma_1 replaces it in the denominator, and nowhere else.
    sigma = sigmas[k]
    headroom = 1.0 - (sigma if sigma < 1.0 else sigmas[k + 1])
    return eta * math.sqrt(sigma / headroom)


def _score_row(sigma: float, after: float, level: float) -> Row:
    """One Euler-Maruyama step of dx = (v + s^2 / (2 sigma) (x + (1 - sigma) v)) dsigma + s dW with level s."""
    delta = sigma - after
    pull = level * level * delta / (2.0 * sigma)
    return 1.0 - pull, -delta - pull * (1.0 - sigma), level * math.sqrt(delta), 0.0


def _flow_row(config: FlowConfig, sigmas: list[float], k: int, eta: float) -> Row:
    return _score_row(sigmas[k], sigmas[k + 1], _flow_level(sigmas, k, eta))


def _dance_row(config: FlowConfig, sigmas: list[float], k: int, eta: float) -> Row:
    return _score_row(sigmas[k], sigmas[k + 1], eta)


def _truncated_row(config: FlowConfig, sigmas: list[float], k: int, eta: float) -> Row:
    cap = config.noise_cap / math.sqrt(sigmas[k] - sigmas[k + 1])
    return _score_row(sigmas[k], sigmas[k + 1], min(_flow_level(sigmas, k, eta), cap))


def _cps_row(config: FlowConfig, sigmas: list[float], k: int, eta: float) -> Row:
    # x' = (1 - sigma') x0 + r n + c eps with r^2 + c^2 = sigma'^2: the total noise level stays on the schedule.
    sigma, after = sigmas[k], sigmas[k + 1]
    angle = eta * math.pi / 2.0
    kept, fresh = after * max(math.cos(angle), 0.0), after * math.sin(angle)
    return (1.0 - after) + kept, (1.0 - sigma) * kept - sigma * (1.0 - after), fresh, 0.0


_SDE_ROWS: dict[SdeVariant, Callable[[FlowConfig, list[float], int, float], Row]] = {
    "flow": _flow_row,
    "dance": _dance_row,
    "cps": _cps_row,
    "longcat_truncated": _truncated_row,
}

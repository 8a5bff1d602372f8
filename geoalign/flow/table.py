"""The one step table: every sampler step is x' = a x + b v + c eps + d m_prev with float64 host coefficients.

Notation: v is the velocity n - x0 of the rectified flow x_sigma = (1 - sigma) x0 + sigma n, sigma' < sigma the next
noise level, m = x - sigma v the predicted clean latent, m_prev that of the step before, eps standard normal.
Rollout, learner and every kernel read (a, b, c, d) and the timesteps from the same table, so they cannot disagree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from geoalign.config.flow import FlowConfig, OdeSolver, SdeVariant
from geoalign.errors import ConfigError
from geoalign.flow.sigmas import full_grid, grid_with_tail

Row = tuple[float, float, float, float]
TIMESTEP_SCALE = 1000.0
NEARLY_ONE = 1.0 - 1e-5
"""Levels from here on count as 1: UniPC writes its first one as 1 - 1e-6."""


@dataclass(frozen=True, slots=True)
class StepSet:
    """The stochastic steps of a trajectory in ascending order; never empty.

    Raises:
        ConfigError: no step, a negative one, or steps out of order.
    """

    steps: Sequence[int]

    def __post_init__(self) -> None:
        if not self.steps or self.steps[0] < 0 or any(b <= a for a, b in pairwise(self.steps)):
            raise ConfigError(f"stochastic steps {list(self.steps)}: give at least one, ascending, from 0")

    @staticmethod
    def of(steps: Iterable[int]) -> StepSet | None:
        """The set of ``steps`` in any order; consecutive ones are a ``StepWindow``, none are None."""
        ordered = sorted(set(steps))
        if not ordered:
            return None
        start, stop = ordered[0], ordered[-1] + 1
        return StepWindow(start, stop) if len(ordered) == stop - start else StepSet(tuple(ordered))

    @property
    def start(self) -> int:
        """The first stochastic step: all before it are shared by a group."""
        return self.steps[0]

    @property
    def stop(self) -> int:
        """One past the last stochastic step."""
        return self.steps[-1] + 1

    @property
    def size(self) -> int:
        """Number of stochastic steps."""
        return len(self.steps)


class StepWindow(StepSet):
    """The consecutive stochastic steps start, ..., stop - 1; never empty."""

    def __init__(self, start: int, stop: int) -> None:
        if not 0 <= start < stop:
            raise ConfigError(f"window [{start}, {stop}) is empty or negative")
        super().__init__(range(start, stop))


@dataclass(frozen=True, slots=True, eq=False)
class StepTable:
    """All numbers of one trajectory; S is the number of steps actually taken (fewer than T with a coarser tail).

    Attributes:
        sigmas: [S + 1] float64 noise levels, from 1 to 0.
        timesteps: [S] float64, 1000 sigma as the network sees it (rounded if the config says so).
        kind: "ode" or "sde" per step.
        coefficients: [S, 4] float64, columns a, b, c, d.
        window: the stochastic steps, consecutive (``StepWindow``) or not; None if there are none.
    """

    sigmas: Tensor
    timesteps: Tensor
    kind: tuple[str, ...]
    coefficients: Tensor
    window: StepSet | None

    @property
    def num_steps(self) -> int:
        """Network evaluations of one trajectory (NFE)."""
        return len(self.kind)

    def row(self, step: int) -> Tensor:
        """Coefficients [4] of a step."""
        return self.coefficients[step]

    def same_steps(self, other: StepTable) -> bool:
        """Whether both take the same steps at the same levels."""
        pairs = ((self.coefficients, other.coefficients), (self.timesteps, other.timesteps))
        return all(torch.equal(mine, theirs) for mine, theirs in pairs)

    def needs_history(self, step: int) -> bool:
        """Whether the step reads m_prev."""
        return 0 <= step < self.num_steps and bool(self.coefficients[step, 3] != 0)

    @staticmethod
    def from_sigmas(
        sigmas: Tensor | Sequence[float],
        timesteps: Tensor | Sequence[float],
        *,
        sde: SdeVariant = "flow",
        eta: float = 0.7,
        stochastic: Iterable[int] = (),
        noise_cap: float = 0.45,
    ) -> StepTable:
        """The table of another scheduler's grid: Euler steps, stochastic at the steps named.

        Unlike ``build_step_table`` it takes any set of stochastic steps, the last one included, because peers train
        that one too; its noise then stays in the result.

        Args:
            sigmas: [S + 1] noise levels, falling from at most 1 to exactly 0 (a diffusers scheduler's ``sigmas``).
            timesteps: [S] what the network is given, as it is (integers under UniPC).
            sde: form of the stochastic steps.
            eta: their noise level, as in ``FlowConfig``; 1 for the ``linear`` SDE of flow_grpo.
            stochastic: their indices in 0..S-1; none: a table for ``FlowSampler.sample``.
            noise_cap: read by ``longcat_truncated`` only.

        Raises:
            ConfigError: levels that do not fall to 0, a wrong number of timesteps, an index beyond the grid, or a
                stochastic step without noise (CPS at the last step).
        """
        levels, times = _numbers(sigmas), _numbers(timesteps)
        window = StepSet.of(stochastic)
        _check_grid(levels, times, window)
        noisy = () if window is None else window.steps
        rows = [
            sde_row(sde, *levels[k : k + 2], second=levels[1], eta=eta, noise_cap=noise_cap)
            if k in noisy
            else ode_row("euler", levels, k)
            for k in range(len(times))
        ]
        if silent := [k for k in noisy if not rows[k][2] > 0.0]:
            raise ConfigError(
                f"steps {silent} add no noise under sde {sde} and eta {eta}: leave them out of stochastic"
            )
        return _table(torch.tensor(levels, dtype=torch.float64), torch.tensor(times, dtype=torch.float64), rows, window)


def build_step_table(config: FlowConfig, window: StepSet | None = None) -> StepTable:
    """The table of a trajectory that is stochastic inside ``window`` and deterministic elsewhere.

    Deterministic steps before the window's end are Euler steps, steps after it (all of them without a window) use
    ``config.tail_solver``; a multistep solver takes its first history from the last window step. A tail of its own
    (``config.tail_grid``, ``tail_ratio``, ``tail_steps``) exists only after a window.

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
        count = config.tail_count(window.stop)
        sigmas = grid_with_tail(config.steps, config.shift, window.stop, count, config.tail_grid)
    levels = sigmas.tolist()
    stochastic, tail_start = ((), 0) if window is None else (window.steps, window.stop)
    rows: list[Row] = []
    for k in range(len(levels) - 1):
        if k in stochastic:
            eta = config.eta_by_step[k] if k < len(config.eta_by_step) else config.eta
            noise = {"second": levels[1], "eta": eta, "noise_cap": config.noise_cap}
            rows.append(sde_row(config.sde, *levels[k : k + 2], **noise))
        else:
            rows.append(ode_row(config.tail_solver if k >= tail_start else "euler", levels, k))
    return _table(sigmas, _timesteps(sigmas[:-1], config.t_dtype), rows, window)


def has_exact_tail(table: StepTable, config: FlowConfig) -> bool:
    """Whether a table of :func:`build_step_table` takes the steps of the same sampler with an exact tail."""
    return table.same_steps(build_step_table(config.with_exact_tail(), table.window))


def _table(sigmas: Tensor, timesteps: Tensor, rows: list[Row], window: StepSet | None) -> StepTable:
    stochastic = () if window is None else window.steps
    return StepTable(
        sigmas=sigmas,
        timesteps=timesteps,
        kind=tuple("sde" if k in stochastic else "ode" for k in range(len(rows))),
        coefficients=torch.tensor(rows, dtype=torch.float64),
        window=window,
    )


def _numbers(values: Tensor | Sequence[float]) -> list[float]:
    return torch.as_tensor(values, dtype=torch.float64).tolist()


def _check_grid(sigmas: list[float], timesteps: list[float], window: StepSet | None) -> None:
    if len(sigmas) < 2 or sigmas[0] > 1.0 or sigmas[-1] != 0.0 or any(b >= a for a, b in pairwise(sigmas)):
        raise ConfigError(f"sigmas must fall from at most 1 to exactly 0 (append 0 if it is missing), got {sigmas}")
    if len(timesteps) != len(sigmas) - 1:
        raise ConfigError(
            f"{len(sigmas)} sigmas make {len(sigmas) - 1} steps, but there are {len(timesteps)} timesteps"
        )
    if window is not None and window.stop > len(timesteps):
        raise ConfigError(
            f"stochastic step {window.stop - 1} lies beyond the last of {len(timesteps)} steps, counted from 0"
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


def sde_row(sde: SdeVariant, sigma: float, after: float, *, second: float, eta: float, noise_cap: float = 0.45) -> Row:
    """One stochastic step from level ``sigma`` to ``after``.

    Args:
        sde: its form.
        sigma, after: the levels, 1 >= sigma > after >= 0.
        second: level of the grid's second node, which Flow-SDE takes for a first level of 1 and the linear SDE for the
            largest noise.
        eta: noise level. noise_cap: read by ``longcat_truncated`` only.
    """
    return _SDE_ROWS[sde](_Step(sigma, after, second), eta, noise_cap)


class _Step(NamedTuple):
    """The levels that a stochastic row depends on."""

    sigma: float
    after: float
    second: float


def _flow_level(step: _Step, eta: float) -> float:
    # eta sqrt(sigma / (1 - sigma)) diverges at sigma = 1; sigma_1 replaces it in the denominator, and nowhere else.
    headroom = 1.0 - (step.sigma if step.sigma < NEARLY_ONE else step.second)
    return eta * math.sqrt(step.sigma / headroom)


def _score_row(step: _Step, level: float) -> Row:
    """One Euler-Maruyama step of dx = (v + s^2 / (2 sigma) (x + (1 - sigma) v)) dsigma + s dW with level s."""
    delta = step.sigma - step.after
    pull = level * level * delta / (2.0 * step.sigma)
    return 1.0 - pull, -delta - pull * (1.0 - step.sigma), level * math.sqrt(delta), 0.0


def _flow_row(step: _Step, eta: float, noise_cap: float) -> Row:
    return _score_row(step, _flow_level(step, eta))


def _dance_row(step: _Step, eta: float, noise_cap: float) -> Row:
    return _score_row(step, eta)


def _truncated_row(step: _Step, eta: float, noise_cap: float) -> Row:
    cap = noise_cap / math.sqrt(step.sigma - step.after)
    return _score_row(step, min(_flow_level(step, eta), cap))


def _linear_row(step: _Step, eta: float, noise_cap: float) -> Row:
    # The level is linear in sigma, from sigma_1 at sigma = 1 to the last level, 0; flow_grpo's Wan path has eta = 1.
    return _score_row(step, eta * step.second * step.sigma)


def _cps_row(step: _Step, eta: float, noise_cap: float) -> Row:
    # x' = (1 - sigma') x0 + r n + c eps with r^2 + c^2 = sigma'^2: the total noise level stays on the schedule.
    sigma, after, _ = step
    angle = eta * math.pi / 2.0
    kept, fresh = after * max(math.cos(angle), 0.0), after * math.sin(angle)
    return (1.0 - after) + kept, (1.0 - sigma) * kept - sigma * (1.0 - after), fresh, 0.0


_SDE_ROWS: dict[SdeVariant, Callable[[_Step, float, float], Row]] = {
    "flow": _flow_row,
    "dance": _dance_row,
    "cps": _cps_row,
    "longcat_truncated": _truncated_row,
    "linear": _linear_row,
}

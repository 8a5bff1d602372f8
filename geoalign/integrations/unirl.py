"""UniRL's sampling step: a strategy with the signature of its ``StepStrategy.denoise``.

``Strategy("flow" | "dance" | "cps" | "flash")`` stands where UniRL takes a strategy object. One difference: the
log-probability of "cps" is the Gaussian density; UniRL's own drops its scale and constant.
"""

from __future__ import annotations

import torch
from torch import Tensor

from geoalign.config.flow import SdeVariant
from geoalign.errors import UsageError
from geoalign.integrations.transition import Generator, Levels, euler, take

SDES: dict[str, SdeVariant] = {"flow": "flow", "dance": "dance", "cps": "cps", "flash": "linear"}
_SILENT = 1e-7


class Strategy:
    """One sampler form; holds no state between steps.

    Args:
        name: UniRL's name of the form. "flash" is the noise linear in sigma, scaled by eta.

    Raises:
        UsageError: another name.
    """

    def __init__(self, name: str = "flow") -> None:
        if name not in SDES:
            raise UsageError(f"strategy '{name}': choose one of {', '.join(SDES)}")
        self.canonical_name, self._sde = name, SDES[name]

    def reset(self) -> None:
        """Nothing to reset."""

    def init_schedule(self, sigmas: Tensor) -> None:
        """Nothing to keep: every step is given its levels."""

    def denoise(
        self,
        noise_pred: Tensor,
        sample: Tensor,
        sigma: Tensor,
        sigma_next: Tensor,
        *,
        eta: float = 1.0,
        prev_sample: Tensor | None = None,
        generator: Generator = None,
        sigma_max: float = 0.99,
        step_index: int = 0,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """One transition, or the log-probability of a stored one.

        Args:
            noise_pred: velocity [B, ...]. sample: [B, ...], in the precision that trajectories are stored in.
            sigma, sigma_next: levels, [] or [B].
            eta: noise level; below 1e-7 the step is deterministic and has no log-probability.
            prev_sample: stored next state; None samples one. generator: of torch, for sampling.
            sigma_max: level of the grid's second node. step_index: not read.

        Returns:
            (next state float32, log-probability [B] or None, mean float32).
        """
        levels = Levels(_numbers(sigma), _numbers(sigma_next), float(sigma_max))
        if eta < _SILENT:
            after = euler(levels, sample, noise_pred)
            return after if prev_sample is None else prev_sample.float(), None, after
        step = take(self._sde, eta, levels, sample, noise_pred, next=prev_sample, generator=generator)
        return step.next, step.log_prob, step.mean


def _numbers(levels: Tensor) -> list[float]:
    return torch.as_tensor(levels).double().reshape(-1).tolist()

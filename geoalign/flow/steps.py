"""``Steps``: what one step of a table does to states. Rollout, replay and plain sampling all go through it.

Shapes in comments: n rows, ... the axes of one latent.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from geoalign.flow.policy import Condition, Velocity, VelocityFn
from geoalign.flow.reuse import TailSource
from geoalign.flow.table import StepTable
from geoalign_kernels import FlowStep, NoiseKey, flow_log_prob, flow_step


@dataclass(frozen=True, slots=True)
class Steps:
    """The steps of one table; holds no state between calls."""

    table: StepTable

    def velocity(self, velocity_fn: VelocityFn, x: Tensor, step: int, cond: Condition) -> Velocity:
        """Of states [n, ...] at the time of ``step``, under their n conditions."""
        return Velocity.of(velocity_fn(x, self._timestep(x, step), cond))

    def take(
        self, x: Tensor, v: Velocity, step: int, *, key: NoiseKey | None = None, m_prev: Tensor | None = None
    ) -> FlowStep:
        """The next states [n, ...]; with ``key`` by a stochastic step, with their log-probabilities [n]."""
        row, uncond = self.table.row(step), v.uncond
        return flow_step(x, v.value, row, key=key, velocity_uncond=uncond, guidance=v.guidance, m_prev=m_prev)

    def log_prob(self, x: Tensor, v: Velocity, x_next: Tensor, step: int) -> Tensor:
        """[n] of next states that were stored, element means, with the graph of ``v``."""
        row = self.table.row(step)
        return flow_log_prob(x, v.value, x_next, row, velocity_uncond=v.uncond, guidance=v.guidance)

    def history(self, x: Tensor, velocity: Velocity, step: int) -> Tensor | None:
        """Predicted clean latent x - sigma v of this step, if the next step reads it."""
        if not self.table.needs_history(step + 1):
            return None
        return x - float(self.table.sigmas[step]) * velocity.combined().to(x.dtype)

    @torch.no_grad()
    def walk(
        self,
        source: VelocityFn | TailSource,
        x: Tensor,
        m_prev: Tensor | None,
        steps: range,
        cond: Condition,
        forwards: Counter[str],
        name: str,
    ) -> tuple[Tensor, Tensor | None]:
        """State and history after deterministic steps; no log-probability is taken, so never with a graph.

        Counts into ``forwards[name]``, and steps that were not evaluated into ``forwards["reused"]``.
        """
        for step in steps:
            if isinstance(source, TailSource):
                velocity, evaluated = source.at(step, x, self._timestep(x, step), cond)
            else:
                velocity, evaluated = self.velocity(source, x, step, cond), True
            forwards[name if evaluated else "reused"] += x.shape[0] * velocity.passes
            used = m_prev if self.table.needs_history(step) else None
            m_prev = self.history(x, velocity, step)
            x = self.take(x, velocity, step, m_prev=used).x_next
        return x, m_prev

    def _timestep(self, x: Tensor, step: int) -> Tensor:
        return torch.full((x.shape[0],), float(self.table.timesteps[step]), dtype=x.dtype, device=x.device)

"""Streaming backward: start the backward from the rollout's own forwards, without a replay.

On the first update after a rollout the ratio is 1 and the clip inactive, so the gradient of the surrogate is
``-sum_j A_j sum_t w_t grad log p_jt / n``: linear in advantages that are not known until all samples are scored.

Shapes in comments: R rows (rollouts of this rank), P numbers of all trained parameters together.
"""

from __future__ import annotations

import sys
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from geoalign.flow.sampler import ObservedStep


class RowGradients:
    """A gradient per rollout, summed while the device goes on, and their weighted sum once the weights are known.

    Memory is taken once and used again by every iteration: one flat vector per rollout in one table, because many
    page-locked blocks would each be rounded up to a power of two, and one for the rollout in hand.

    Args:
        trained: the parameters by name.
        rows: rollouts per iteration.
        where: ``device`` keeps the table beside the parameters, ``host`` in page-locked memory.
    """

    def __init__(self, trained: Mapping[str, nn.Parameter], rows: int, where: Literal["device", "host"]) -> None:
        first = next(iter(trained.values()))
        count, dtype = sum(p.numel() for p in trained.values()), torch.float32
        for parameter in trained.values():
            dtype = torch.promote_types(dtype, parameter.dtype)
        self._shapes = {name: parameter.shape for name, parameter in trained.items()}
        self._current = torch.zeros(count, dtype=dtype, device=first.device)  # [P], of the row in hand
        self._views = self._named(self._current)
        self._row: int | None = None
        self._filled: list[int] = []
        paged = where == "device" or not first.is_cuda
        self._table = torch.empty(  # [R, P]
            rows, count, dtype=dtype, device=first.device if where == "device" else "cpu", pin_memory=not paged
        )

    def add(self, row: int, gradients: Mapping[str, Tensor | None], weight: float) -> None:
        """Add ``weight`` times the gradients of one step; the steps of a row come one after another."""
        if row != self._row:
            self._store()
            self._row = row
        for name, gradient in gradients.items():
            if gradient is not None:
                self._views[name].add_(gradient, alpha=weight)

    def combine(self, coefficients: Tensor) -> dict[str, Tensor]:
        """``sum_j coefficients[j] g_j`` over the rows that were added, by parameter name; then all rows are forgotten.

        A row of coefficient 0 is left out, whatever it holds.
        """
        self._store()
        weights = coefficients.tolist()  # [R]
        total = torch.zeros_like(self._current)  # [P]
        for row in sorted(self._filled):
            if weights[row] != 0.0:
                total.add_(self._table[row].to(total.device, non_blocking=True), alpha=weights[row])
        self._filled.clear()
        return self._named(total)

    def forget(self) -> None:
        """Drop what was added (the iteration goes another way)."""
        self._row = None
        self._current.zero_()
        self._filled.clear()

    def _store(self) -> None:
        if self._row is None:
            return
        assert self._row not in self._filled, "rows must finish one after another"
        # One stream writes, reads and writes again, so nothing is overwritten before it was read.
        self._table[self._row].copy_(self._current, non_blocking=True)
        self._filled.append(self._row)
        self._row = None
        self._current.zero_()

    def _named(self, flat: Tensor) -> dict[str, Tensor]:
        parts = flat.split([shape.numel() for shape in self._shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}


@dataclass(slots=True)
class StreamingBackward:
    """Observer of ``FlowSampler.rollout``: keeps what the backward of every window forward needs.

    Without ``gradients`` every graph is kept until the rewards are known. With it, the backward of a forward of one row
    runs at once with unit advantage, and only the row's gradient is kept; a forward that served several rows (the first
    window step of a shared prefix) is left to the learner, which replays it, so that no graph waits for the rewards.

    Attributes:
        trained: the parameters by name.
        weights: time weight of every window step.
        gradients: where the gradients of rows are kept, or None.
        graphs: window forwards whose graph is kept.
        done: window forwards whose backward has run; ``log_prob`` without graph.
        left: window positions that the learner replays.
        positions: the window positions that are learned from; others are let go.
    """

    trained: Mapping[str, nn.Parameter]
    weights: Sequence[float]
    gradients: RowGradients | None = None
    graphs: list[ObservedStep] = field(default_factory=list)
    done: list[ObservedStep] = field(default_factory=list)
    left: set[int] = field(default_factory=set)
    positions: Container[int] = range(sys.maxsize)

    def __call__(self, step: ObservedStep) -> None:
        """Take one window forward."""
        if step.position not in self.positions:
            return
        if self.gradients is None:
            self.graphs.append(step)
        elif step.rows.stop - step.rows.start > 1:
            self.left.add(step.position)
        else:
            found = torch.autograd.grad(step.log_prob.sum(), list(self.trained.values()), allow_unused=True)
            named = dict(zip(self.trained, found, strict=True))
            self.gradients.add(step.rows.start, named, self.weights[step.position])
            self.done.append(step._replace(log_prob=step.log_prob.detach()))

    @property
    def poisoned(self) -> bool:
        """Whether a kept graph holds a value that is not finite: its backward would spread it to all parameters."""
        return not all(bool(torch.isfinite(step.log_prob).all()) for step in self.graphs)

    def drop(self) -> None:
        """Free everything that is kept."""
        self.graphs.clear()
        self.done.clear()
        if self.gradients is not None:
            self.gradients.forget()

"""Streaming backward: start the backward from the rollout's own forwards, without a replay.

On the first update after a rollout the ratio is 1 and the clip inactive, so the gradient of the surrogate is
``-sum_j A_j sum_t w_t grad log p_jt / n``: linear in advantages that are not known until all samples are scored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(slots=True)
class StreamingBackward:
    """Observer of ``FlowSampler.rollout``: keeps what the backward of every window forward needs.

    A forward that serves several rows (the shared first window step) keeps its graph until the rewards are known. A
    forward of one row does too, unless ``buffers`` are on: its backward then runs at once with unit advantage, and only
    a gradient per sample is kept.

    Attributes:
        trained: the parameters by name.
        weights: time weight of every window step.
        buffers: where a sample's gradient lies: nowhere (graphs are kept), on the parameters' device, or on the host.
    """

    trained: Mapping[str, nn.Parameter]
    weights: Sequence[float]
    buffers: str | None = None
    _graphs: list[tuple[int, slice, Tensor]] = field(default_factory=list)
    _gradients: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    _current: tuple[int, dict[str, Tensor]] | None = None
    _log_probs: list[tuple[int, int, Tensor]] = field(default_factory=list)

    def __call__(self, position: int, rows: slice, log_prob: Tensor) -> None:
        """Take ``log_prob`` ``[rows]`` of window step ``position``, with the graph of its forward."""
        if self.buffers is None or rows.stop - rows.start > 1:
            self._graphs.append((position, rows, log_prob))
            return
        row = rows.start
        names = list(self.trained)
        found = torch.autograd.grad(log_prob.sum(), [self.trained[name] for name in names], allow_unused=True)
        self._log_probs.append((position, row, log_prob.detach()))
        weight = self.weights[position]
        self._add(row, {n: weight * _wide(g) for n, g in zip(names, found, strict=True) if g is not None})

    def graphs(self) -> list[tuple[int, slice, Tensor]]:
        """(position, rows, log_prob) of the kept graphs, which this object then forgets."""
        kept, self._graphs = self._graphs, []
        return kept

    @property
    def poisoned(self) -> bool:
        """Whether a kept graph holds a value that is not finite: its backward would spread it to all parameters."""
        return not all(bool(torch.isfinite(log_prob).all()) for _, _, log_prob in self._graphs)

    def finished(self) -> list[tuple[int, int, Tensor]]:
        """(position, row, log_prob ``[1]``) of the forwards whose backward is done."""
        return self._log_probs

    def combine(self, coefficients: Tensor) -> dict[str, Tensor]:
        """``sum_j coefficients[j] sum_t w_t grad log p_jt`` over the buffered rows, by parameter name.

        A row of coefficient 0 is left out, whatever its buffer holds.
        """
        self._flush()
        total: dict[str, Tensor] = {}
        for row, gradients in sorted(self._gradients.items()):
            weight = float(coefficients[row])
            if weight == 0.0:
                continue
            for name, gradient in gradients.items():
                moved = gradient.to(self.trained[name].device, non_blocking=True)
                total[name] = weight * moved if name not in total else total[name].add_(moved, alpha=weight)
        self._gradients.clear()
        return total

    def _add(self, row: int, gradients: dict[str, Tensor]) -> None:
        """Rows finish one after another, so only the row in hand is summed on the device."""
        if self._current is None or self._current[0] != row:
            self._flush()
            self._current = (row, gradients)
            return
        summed = self._current[1]
        for name, gradient in gradients.items():
            summed[name] = gradient if name not in summed else summed[name].add_(gradient)

    def _flush(self) -> None:
        if self._current is None:
            return
        row, gradients = self._current
        self._current = None
        if self.buffers == "host":
            gradients = {name: _to_host(gradient) for name, gradient in gradients.items()}
        assert row not in self._gradients, "rows must finish one after another"
        self._gradients[row] = gradients


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in page-locked memory, made while the device goes on."""
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)  # read again by the same stream only

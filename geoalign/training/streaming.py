"""Streaming backward: keep the graphs of the window forwards and start the backward from them, without a replay."""

from __future__ import annotations

from torch import Tensor


class StreamingBackward:
    """Observer of ``FlowSampler.rollout``: holds each window step's log-probabilities with the graph of their forward.

    On the first update after a rollout the ratio is 1 and the clip inactive, so the gradient needs no second forward.
    The graphs live until the rewards are known: without recomputation that is every activation of the window, with it
    the block inputs (``levers.recompute``).
    """

    def __init__(self) -> None:
        self._steps: list[tuple[int, slice, Tensor]] = []

    def __call__(self, position: int, rows: slice, log_prob: Tensor) -> None:
        """Keep ``log_prob`` ``[rows]`` of window step ``position``."""
        self._steps.append((position, rows, log_prob))

    def drain(self) -> list[tuple[int, slice, Tensor]]:
        """All kept (position, rows, log_prob), which this object then forgets."""
        steps, self._steps = self._steps, []
        return steps

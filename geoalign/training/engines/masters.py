"""Float32 masters of trained parameters, their accumulated gradients, and their moving average."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class MasterWeights:
    """The parameters that an optimizer updates.

    Where the network computes in float32 or float64, a parameter is its own master. Where it computes in less, a master
    is a float32 copy, which :meth:`publish` rounds back after an update.

    Gradients are taken after every backward, so that sums over samples and steps are formed in float32 at least, and on
    the CPU in float64: there a sum of a few float32 numbers is exact unless they differ more than 2^26-fold, so neither
    the order nor the number of ranks changes it once it is rounded. A GPU would pay for that in memory and traffic.

    Args:
        trained: parameters of the network's graph by name, in the precision of the loaded weights.
        dtype: that the network will compute in; the caller casts it.
        separate: give every parameter a copy, for an optimizer that must not see the graph's own parameters.
    """

    def __init__(self, trained: Mapping[str, nn.Parameter], dtype: torch.dtype, *, separate: bool = False) -> None:
        self.trained = trained
        self.values: dict[str, nn.Parameter] = {}
        self._sums: dict[str, Tensor] = {}
        for name, parameter in trained.items():
            wide = torch.promote_types(parameter.dtype, torch.float32)
            if not separate and parameter.dtype == wide and dtype in (torch.float32, torch.float64):
                self.values[name] = parameter
            else:
                self.values[name] = nn.Parameter(parameter.detach().to(wide, copy=True))
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: self._take(name, p))

    def clear(self) -> None:
        """Forget all gradients."""
        self._sums.clear()
        for value in self.values.values():
            value.grad = None

    def accumulate(self, gradients: Mapping[str, Tensor]) -> None:
        """Add gradients by name."""
        for name, gradient in gradients.items():
            if name in self._sums:
                self._sums[name].add_(gradient)
            else:
                value = self.values[name]
                self._sums[name] = gradient.to(value.device, _sum_dtype(value), copy=True)

    def gradients(self) -> list[Tensor]:
        """One sum of gradients per parameter, zeros where none arrived; float64 on the CPU."""
        return [
            self._sums[name] if name in self._sums else torch.zeros_like(value, dtype=_sum_dtype(value))
            for name, value in self.values.items()
        ]

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the parameters of the graph."""
        for name, value in self.values.items():
            if self.trained[name] is not value:
                self.trained[name].copy_(value)

    def _take(self, name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.accumulate({name: parameter.grad})
        parameter.grad = None


def _sum_dtype(value: Tensor) -> torch.dtype:
    return value.dtype if value.is_cuda else torch.float64


class MovingAverage:
    """Exponential moving average of master weights.

    ``decay`` 0 keeps no copies: the average is the weights themselves.
    """

    def __init__(self, values: Mapping[str, Tensor], decay: float) -> None:
        self.values, self.decay = values, decay
        self.average = {name: value.detach().clone() for name, value in values.items()} if decay else {}

    @torch.no_grad()
    def update(self) -> None:
        """Blend the current weights in."""
        for name, average in self.average.items():
            average.lerp_(self.values[name].detach(), 1 - self.decay)

    def state(self) -> Mapping[str, Tensor]:
        """The averaged weights by name (the weights themselves without an average)."""
        return self.average or {name: value.detach() for name, value in self.values.items()}

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange weights and average in place."""
        for name, average in self.average.items():
            current = self.values[name].detach().clone()
            self.values[name].copy_(average)
            average.copy_(current)

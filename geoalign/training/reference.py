"""The policy that a KL term pulls towards: the base's trained parameters, put in place for its forwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn


class ReferencePolicy:
    """A copy of the trained parameters as they were at construction (frozen ones are shared with the policy).

    Args:
        trained: parameters of the network's graph by name.
    """

    def __init__(self, trained: Mapping[str, nn.Parameter]) -> None:
        self._trained = trained
        self._values = {name: parameter.detach().clone() for name, parameter in trained.items()}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Exchange the parameters for the reference's inside the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, kept in self._values.items():
            parameter = self._trained[name].data
            current = parameter.clone()
            parameter.copy_(kept)
            kept.copy_(current)

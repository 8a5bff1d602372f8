"""The trained state as whole tensors by name: what engines give and take, and what a checkpoint stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Whole tensors by parameter name, alike for every engine and number of ranks.

    Attributes:
        values: trained parameters, at least float32.
        average: their moving average, or the values themselves.
        optimizer: parameter name -> ``exp_avg``, ``exp_avg_sq``, ``step``, ...
    """

    values: Mapping[str, Tensor]
    average: Mapping[str, Tensor]
    optimizer: Mapping[str, Mapping[str, Tensor]]

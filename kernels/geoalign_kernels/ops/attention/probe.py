"""int8 attention where a layer tolerates it, exact attention where it does not, decided by measurement.

Activations of some layers have outliers that int8 scores do not survive (SageAttention, arXiv 2410.02367, reports such
layers). The probe compares both modes on a few blocks of queries of real inputs, once per layer: less than one percent
of the work of the layer at 65,520 tokens.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from geoalign_kernels.ops.attention.op import attention

logger = logging.getLogger("geoalign_kernels")
BLOCK = 128
"""Queries that share an int8 scale: a probe takes whole blocks, so they are quantised as in the full call."""


class ProbedInt8Attention:
    """Attention of the deterministic steps of a network, int8 layer by layer.

    Not for the SDE window: inside `exact_only()` an int8 layer raises like `attention(mode="int8")`.

    Attributes:
        errors: `{layer: relative L2 error of int8}` of the layers seen so far.
        threshold: a layer above it, or with a result that is not finite, stays exact.
    """

    def __init__(self, threshold: float = 2e-2, blocks: int = 2) -> None:
        if threshold <= 0 or blocks < 1:
            raise ValueError(f"threshold must be positive and blocks at least 1, got {threshold} and {blocks}")
        self.threshold = threshold
        self.errors: dict[int, float] = {}
        self._blocks = blocks

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, core: str | None = None
    ) -> Tensor:
        """Output [B, Sq, H, hd] of layer number `layer`; the other arguments as in `attention`.

        The first call of a layer measures it, which waits for the device once.
        """
        if layer not in self.errors:
            self.errors[layer] = error = self._measure(q, k, v, scale, core)
            if self.is_exact(layer):
                logger.warning("layer %d stays exact: int8 attention is off by %.3g there", layer, error)
        mode = "exact" if self.is_exact(layer) else "int8"
        return attention(q, k, v, mode=mode, scale=scale, core=core).out

    def is_exact(self, layer: int) -> bool:
        """Whether a measured layer was found to need exact attention.

        Raises:
            KeyError: the layer has not been called yet.
        """
        return not self.errors[layer] <= self.threshold  # true for NaN as well

    def _measure(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, core: str | None) -> float:
        count = -(-q.shape[1] // BLOCK)
        chosen = sorted({i * count // self._blocks for i in range(min(self._blocks, count))})
        sample = torch.cat([q[:, i * BLOCK : (i + 1) * BLOCK] for i in chosen], dim=1) if chosen else q
        approximate = attention(sample, k, v, mode="int8", scale=scale).out.float()
        exact = attention(sample, k, v, scale=scale, core=core).out.float()
        return float((approximate - exact).norm() / exact.norm().clamp_min(1e-30))

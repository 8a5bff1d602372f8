"""Quantised attention where a layer tolerates it, exact attention where it does not, decided by measurement.

Activations of some layers have outliers that int8 scores do not survive (SageAttention, arXiv 2410.02367, reports such
layers), and fp8 values cost more accuracy again. The probe compares the modes on a few blocks of queries of real
inputs, less than one percent of the work of the layer at 65,520 tokens. Activations change along the denoising, too: a
layer is measured in an early, a middle and a late step, and the worst of them counts.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from geoalign_kernels.ops.attention.op import QUANTISED, attention
from geoalign_kernels.ops.attention.reference import SCALE_BLOCK

logger = logging.getLogger("geoalign_kernels")
Mode = Literal["exact", "int8", "int8_fp8"]
STAGES = 3
"""Early, middle and late steps, by their share of noise."""


class ProbedInt8Attention:
    """Attention of the deterministic steps of a network, quantised layer by layer.

    Not for the SDE window: inside ``exact_only()`` a quantised layer raises like ``attention(mode="int8")``.

    Args:
        threshold: largest relative L2 error that a layer may have.
        blocks: how many blocks of 128 queries are measured; whole blocks, so they are quantised as in the full call.
        modes: quantised modes in the order of preference; a layer takes the first that meets the threshold, e.g.
            ``("int8_fp8", "int8")`` on an H200. A layer that none of them suits, or with a result that is not finite,
            stays exact.

    Attributes:
        errors: ``{layer: worst relative L2 error of the mode measured last}`` of the layers seen so far: the chosen
            one, or the last that was refused.
        chosen: ``{layer: mode}`` likewise; a later step can only make it more exact.
        settled: nothing is measured any more.
    """

    def __init__(self, threshold: float = 2e-2, blocks: int = 2, modes: Sequence[Mode] = ("int8",)) -> None:
        if threshold <= 0 or blocks < 1:
            raise ValueError(f"threshold must be positive and blocks at least 1, got {threshold} and {blocks}")
        if not modes or not set(modes) <= set(QUANTISED):
            raise ValueError(f"modes must name some of {', '.join(QUANTISED)}, got {list(modes)}")
        self.threshold, self.modes = threshold, tuple(modes)
        self.errors: dict[int, float] = {}
        self.chosen: dict[int, Mode] = {}
        self.settled = False
        self._blocks, self._stage = blocks, 0
        self._stages: set[int] = set()
        self._worst: dict[tuple[int, Mode], float] = {}
        self._seen: set[tuple[int, int]] = set()

    def at(self, noise: float) -> None:
        """Say where the next calls stand: the share of noise in their latents, from 1 to 0."""
        self._stage = min(int((1.0 - noise) * STAGES), STAGES - 1)
        self._stages.add(self._stage)

    @property
    def saw_all_stages(self) -> bool:
        """Whether :meth:`at` told of an early, a middle and a late step; equal on ranks that take the same steps."""
        return len(self._stages) == STAGES

    def measures(self, layer: int) -> bool:
        """Whether the next call of a layer measures it: the first one of an early, a middle and a late step."""
        return not self.settled and (layer, self._stage) not in self._seen and self.chosen.get(layer) != "exact"

    def settle(self, modes: Sequence[Mode]) -> None:
        """Take these modes, one per layer, and measure nothing any more."""
        self.chosen, self.settled = dict(enumerate(modes)), True

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, core: str | None = None
    ) -> Tensor:
        """Output [B, Sq, H, hd] of layer number ``layer``; the other arguments as in ``attention``.

        A call that ``measures`` waits for the device once per mode.
        """
        if self.measures(layer):
            self._choose(layer, q, k, v, {"scale": scale, "core": core})
        return attention(q, k, v, mode=self.chosen[layer], scale=scale, core=core).out

    def is_exact(self, layer: int) -> bool:
        """Whether a measured layer was found to need exact attention.

        Raises:
            KeyError: the layer has not been called yet.
        """
        return self.chosen[layer] == "exact"

    def _choose(self, layer: int, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> None:
        count = -(-q.shape[1] // SCALE_BLOCK)
        some = sorted({i * count // self._blocks for i in range(min(self._blocks, count))})
        sample = torch.cat([q[:, i * SCALE_BLOCK : (i + 1) * SCALE_BLOCK] for i in some], dim=1) if some else q
        exact = attention(sample, k, v, **options).out.float()
        self._seen.add((layer, self._stage))
        for mode in self.modes:
            difference = attention(sample, k, v, mode=mode, **options).out.float() - exact
            error = float(difference.norm() / exact.norm().clamp_min(1e-30))
            before = self._worst.get((layer, mode), 0.0)
            # A comparison with NaN is false: one that was found stays.
            self.errors[layer] = self._worst[layer, mode] = before if before >= error or before != before else error
            if self.errors[layer] <= self.threshold:  # false for NaN as well
                self.chosen[layer] = mode
                return
        self.chosen[layer] = "exact"
        logger.warning("layer %d stays exact: %s attention is off by %.3g there", layer, mode, self.errors[layer])

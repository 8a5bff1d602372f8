"""Sizes of the Qwen2-VL bodies that the published scorers were trained on.

Source: config.json of Qwen/Qwen2-VL-2B-Instruct and Qwen/Qwen2-VL-7B-Instruct (Apache-2.0), with the vocabulary rows of
the scorers' checkpoints (151657 rows of the tokenizer plus their special tokens).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class QwenLayout:
    """Everything that fixes parameter names, shapes and arithmetic of a Qwen2-VL without its language head.

    Attributes:
        vision_width, vision_depth, vision_heads, vision_hidden: the vision tower; ``vision_hidden`` is its MLP width.
        width, depth, heads, kv_heads, hidden: the causal text model; ``hidden`` is its gated MLP width.
        rows: rows of the token embedding.
        norm_eps: of the text model's RMS norms.
        rope_base: base of the text model's rotary frequencies.
        patch, temporal_patch, merge: pixels per patch side, frames per patch, patches per token side.
    """

    vision_width: int
    vision_depth: int
    vision_heads: int
    vision_hidden: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    hidden: int
    rows: int
    norm_eps: float = 1e-6
    rope_base: float = 1e6
    patch: int = 14
    temporal_patch: int = 2
    merge: int = 2

    @property
    def patch_values(self) -> int:
        """Numbers per flattened patch (RGB)."""
        return 3 * self.temporal_patch * self.patch**2

    @property
    def factor(self) -> int:
        """Image sides are multiples of this many pixels."""
        return self.patch * self.merge


VIDEOALIGN_BODY = QwenLayout(1280, 32, 16, 5120, 1536, 28, 12, 2, 8960, rows=151660)
HPSV3_BODY = QwenLayout(1280, 32, 16, 5120, 3584, 28, 28, 4, 18944, rows=151658)

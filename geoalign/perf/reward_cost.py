"""FLOPs of the reward models as geoalign runs them: pose path alone, prompts cut after the last token that is read.

``cost.video_cost`` counts the published scorers, which the budget of a whole run starts from; these are ours. One FLOP
is half a multiply-add; causal attention is counted in full, as FLOP counters do.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Stack:
    """Transformer blocks of one kind.

    Attributes:
        width, depth: of the residual stream, in blocks.
        hidden, matrices: the feed-forward's hidden size, and its matrices (3 where it is gated).
        key_width: channels of keys and values together per token; ``2 * width`` without grouped heads.
    """

    width: int
    depth: int
    hidden: int
    matrices: int
    key_width: int

    def flops(self, tokens: int, attended: int) -> float:
        """FLOPs of all blocks on ``tokens`` tokens, each of which attends to ``attended``."""
        linear = 2 * self.width + self.key_width + self.matrices * self.hidden
        return self.depth * (2.0 * tokens * self.width * linear + 4.0 * tokens * attended * self.width)


_RELEASES = MappingProxyType(
    {
        # (encoder, one half of the alternating trunk, whether the class token enters the trunk)
        "v1.1": (Stack(1536, 24, 4096, 3, 3072), Stack(1536, 8, 4096, 3, 3072), True),
        "v1": (Stack(1024, 24, 4096, 2, 2048), Stack(768, 12, 3072, 2, 1536), False),
    }
)
_POSE_HEAD = 784


def pose_path_flops(release: str, frames: int, rows: int = 21, columns: int = 37) -> float:
    """FLOPs of MapAnything's pose path on one scene; half of the trunk attends to all frames, half within a frame."""
    encoder, half, class_token = _RELEASES[release]
    patches = rows * columns
    per_view = patches + class_token
    everywhere = frames * per_view + 1
    head = 2.0 * frames * patches * (half.width * _POSE_HEAD + 6 * _POSE_HEAD**2)
    return (
        2.0 * frames * patches * 3 * 14**2 * encoder.width
        + encoder.flops(frames * (patches + 1), patches + 1)
        + half.flops(everywhere, everywhere)
        + half.flops(frames * per_view, per_view)
        + head
    )


_VISION = Stack(1280, 32, 5120, 2, 2560)
_TEXT = MappingProxyType({"2b": Stack(1536, 28, 8960, 3, 512), "7b": Stack(3584, 28, 18944, 3, 1024)})
_PATCH_VALUES, _WINDOW = 3 * 2 * 14**2, 4


def qwen_flops(size: str, slices: int, patches: int, length: int) -> float:
    """FLOPs of a Qwen2-VL body on one prompt.

    Args:
        size: "2b" (VideoAlign) or "7b" (HPSv3).
        slices: temporal slices of the clip (an image is one).
        patches: patches per slice; attention of the vision tower stays inside a slice.
        length: tokens of the prompt, visual ones included.
    """
    text, merged = _TEXT[size], _WINDOW * _VISION.width
    vision = _VISION.flops(slices * patches, patches) + 2.0 * slices * patches * _PATCH_VALUES * _VISION.width
    merger = 2.0 * slices * patches / _WINDOW * merged * (merged + text.width)
    return vision + merger + text.flops(length, length)

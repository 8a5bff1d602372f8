"""Sizes of the released MapAnything networks, pose path only.

Source: the default configurations of github.com/facebookresearch/map-anything (Apache-2.0), release 1.1 and release 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

FeedForward = Literal["gelu", "swiglu"]


@dataclass(frozen=True, slots=True)
class PoseNetworkLayout:
    """Everything that fixes the parameter names and shapes of a pose-only MapAnything.

    Attributes:
        encoder_width, encoder_depth, encoder_heads, encoder_ffn: the DINOv2 encoder; depth counts the kept blocks.
        encoder_norm: whether the encoder ends in its own layer norm (release 1 keeps it, release 1.1 cuts before it).
        trunk_width, trunk_depth, trunk_heads, trunk_ffn: the alternating-attention trunk. Where ``trunk_width`` differs
            from ``encoder_width`` a linear projection stands between them.
        trunk_layer_scale: whether trunk blocks scale their residual branches.
        class_token_per_view: whether the encoder's class token enters the trunk beside the patches of its view.
        patch: side of a patch in pixels.
        table_side: side of the square grid that the encoder's position table was trained on.
    """

    encoder_width: int
    encoder_depth: int
    encoder_heads: int
    encoder_ffn: FeedForward
    encoder_norm: bool
    trunk_width: int
    trunk_depth: int
    trunk_heads: int
    trunk_ffn: FeedForward
    trunk_layer_scale: bool
    class_token_per_view: bool
    patch: int = 14
    table_side: int = 37

    @property
    def projects(self) -> bool:
        """Whether encoder features are projected to the trunk's width."""
        return self.encoder_width != self.trunk_width


RELEASE_1_1 = PoseNetworkLayout(
    encoder_width=1536,
    encoder_depth=24,
    encoder_heads=24,
    encoder_ffn="swiglu",
    encoder_norm=False,
    trunk_width=1536,
    trunk_depth=16,
    trunk_heads=24,
    trunk_ffn="swiglu",
    trunk_layer_scale=True,
    class_token_per_view=True,
)

RELEASE_1 = PoseNetworkLayout(
    encoder_width=1024,
    encoder_depth=24,
    encoder_heads=16,
    encoder_ffn="gelu",
    encoder_norm=True,
    trunk_width=768,
    trunk_depth=24,
    trunk_heads=12,
    trunk_ffn="gelu",
    trunk_layer_scale=False,
    class_token_per_view=False,
)

LAYOUTS = MappingProxyType({"v1.1": RELEASE_1_1, "v1": RELEASE_1})
"""Layouts by the name used in configuration files."""

HUB_IDS = MappingProxyType(
    {
        ("v1.1", "apache-2.0"): "facebook/map-anything-apache",
        ("v1.1", "cc-by-nc-4.0"): "facebook/map-anything",
        ("v1", "apache-2.0"): "facebook/map-anything-apache-v1",
        ("v1", "cc-by-nc-4.0"): "facebook/map-anything-v1",
    }
)
"""Hugging Face repositories of the released weights by layout and licence."""

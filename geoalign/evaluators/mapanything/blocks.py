"""Transformer blocks with the parameter names of DINOv2, and linear layers that keep an fp32 residual stream.

Precision: matrix weights may be stored in bfloat16. A :class:`CastLinear` rounds its input to the dtype of its weight
and returns that dtype; layer norms, layer scales and the residual stream stay float32. That is what autocast does to
the published network, with the weights rounded once instead of in every call.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geoalign.evaluators.mapanything.layout import FeedForward

LAYER_NORM_EPS = 1e-6


class CastLinear(nn.Linear):
    """A linear layer that computes in the dtype of its weight."""

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in]`` of any float dtype to ``[..., out]`` of the weight's dtype."""
        return F.linear(input.to(self.weight.dtype), self.weight, self.bias)


class Attention(nn.Module):
    """Multi-head self-attention over all tokens of a row, without mask. qkv rows are ordered q, k, v, head by head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = CastLinear(width, 3 * width)
        self.proj = CastLinear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, C]`` to ``[B, N, C]``."""
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))


class GeluFeedForward(nn.Module):
    """Two layers with the exact (erf) GELU between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = CastLinear(width, 4 * width)
        self.fc2 = CastLinear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwigluFeedForward(nn.Module):
    """SiLU-gated feed-forward; gate and value share one matrix. Hidden size 8/3 of the width, rounded up to 8."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = (4 * width * 2 // 3 + 7) // 8 * 8
        self.w12 = CastLinear(width, 2 * hidden)
        self.w3 = CastLinear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    """A learned gain per channel on a residual branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


_FEED_FORWARD = {"gelu": GeluFeedForward, "swiglu": SwigluFeedForward}


class Block(nn.Module):
    """Pre-norm transformer block on a float32 residual stream."""

    def __init__(self, width: int, heads: int, ffn: FeedForward, *, layer_scale: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn = Attention(width, heads)
        self.ls1 = LayerScale(width) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = _FEED_FORWARD[ffn](width)
        self.ls2 = LayerScale(width) if layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, C]`` float32 to ``[B, N, C]`` float32."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))

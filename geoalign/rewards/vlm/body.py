"""Qwen2-VL as a static function: fixed shapes, no host reads, ready for capture in a CUDA graph.

Parameter names are those of the published checkpoints (the layout of transformers before 4.52). Two choices follow how
the scorers were trained, with transformers 4.45: text positions are 0, 1, 2, ... on all three rotary axes, and the
vision tower attends inside one temporal slice. All slices have one length, so that attention is one dense call.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geoalign.errors import UsageError
from geoalign.rewards.vlm.layout import QwenLayout

_VISION_ROPE_BASE = 1e4
_VISION_NORM_EPS = 1e-6


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel pairs (i, i + D/2) of ``[..., S, D]`` by tables ``[S, D]``."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def vision_table(grid: tuple[int, int], layout: QwenLayout) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[h * w, head_dim]`` float32 of one temporal slice, in patch order (merge windows first)."""
    rows, columns, merge = *grid, layout.merge
    if rows % merge or columns % merge:
        raise UsageError(f"a patch grid of {rows} x {columns} is not a multiple of the {merge} x {merge} merge window")
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    places = torch.stack((y, x), dim=-1).view(rows // merge, merge, columns // merge, merge, 2)
    places = places.transpose(1, 2).reshape(-1, 2)  # [S, 2]
    spatial = layout.vision_width // layout.vision_heads // 2
    frequency = 1.0 / (_VISION_ROPE_BASE ** (torch.arange(0, spatial, 2, dtype=torch.float) / spatial))
    angle = (places[..., None].float() * frequency).flatten(1)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def text_table(length: int, layout: QwenLayout) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[L, head_dim]`` float32 of positions 0..L-1, equal on all rotary axes."""
    channels = layout.width // layout.heads
    frequency = 1.0 / (layout.rope_base ** (torch.arange(0, channels, 2, dtype=torch.float) / channels))
    angle = torch.arange(length, dtype=torch.float)[:, None] * frequency
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


class _RmsNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        # Statistics in float32, the gain in the storage dtype, as in training.
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class _VisionAttention(nn.Module):
    def __init__(self, layout: QwenLayout) -> None:
        super().__init__()
        self.heads = layout.vision_heads
        self.qkv = nn.Linear(layout.vision_width, 3 * layout.vision_width)
        self.proj = nn.Linear(layout.vision_width, layout.vision_width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        # The rotation runs in float32 whatever the storage dtype.
        query, key = (_rotate(part.float(), cos, sin).to(x.dtype) for part in (query, key))
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class _VisionMlp(nn.Module):
    def __init__(self, layout: QwenLayout) -> None:
        super().__init__()
        self.fc1 = nn.Linear(layout.vision_width, layout.vision_hidden)
        self.fc2 = nn.Linear(layout.vision_hidden, layout.vision_width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class _VisionBlock(nn.Module):
    def __init__(self, layout: QwenLayout) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(layout.vision_width, eps=_VISION_NORM_EPS)
        self.norm2 = nn.LayerNorm(layout.vision_width, eps=_VISION_NORM_EPS)
        self.attn, self.mlp = _VisionAttention(layout), _VisionMlp(layout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class _PatchEmbed(nn.Module):
    def __init__(self, layout: QwenLayout) -> None:
        super().__init__()
        size = (layout.temporal_patch, layout.patch, layout.patch)
        self.proj = nn.Conv3d(3, layout.vision_width, size, stride=size, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        # Patches do not overlap and are already flat: the convolution is one matrix product.
        weight = self.proj.weight
        return F.linear(patches.to(weight.dtype), weight.flatten(1))


class _Merger(nn.Module):
    def __init__(self, layout: QwenLayout) -> None:
        super().__init__()
        self.window = layout.merge**2
        merged = layout.vision_width * self.window
        self.ln_q = nn.LayerNorm(layout.vision_width, eps=_VISION_NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(merged, merged), nn.GELU(), nn.Linear(merged, layout.width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.ln_q(x)
        return self.mlp(x.reshape(x.shape[0], x.shape[1] // self.window, -1))


class VisionTower(nn.Module):
    """Patches of equal temporal slices to visual tokens."""

    def __init__(self, layout: QwenLayout) -> None:
        super().__init__()
        self.patch_embed = _PatchEmbed(layout)
        self.blocks = nn.ModuleList(_VisionBlock(layout) for _ in range(layout.vision_depth))
        self.merger = _Merger(layout)

    def forward(self, patches: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``patches`` ``[slices, S, patch_values]`` to tokens ``[slices, S / merge^2, width]``."""
        x = self.patch_embed(patches)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.merger(x)


class _TextAttention(nn.Module):
    def __init__(self, layout: QwenLayout) -> None:
        super().__init__()
        self.channels = layout.width // layout.heads
        self.q_proj = nn.Linear(layout.width, layout.width)
        self.k_proj = nn.Linear(layout.width, layout.kv_heads * self.channels)
        self.v_proj = nn.Linear(layout.width, layout.kv_heads * self.channels)
        self.o_proj = nn.Linear(layout.width, layout.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        query, key, value = (
            project(x).unflatten(-1, (-1, self.channels)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class _TextMlp(nn.Module):
    def __init__(self, layout: QwenLayout) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(layout.width, layout.hidden, bias=False)
        self.up_proj = nn.Linear(layout.width, layout.hidden, bias=False)
        self.down_proj = nn.Linear(layout.hidden, layout.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _TextBlock(nn.Module):
    def __init__(self, layout: QwenLayout) -> None:
        super().__init__()
        self.self_attn, self.mlp = _TextAttention(layout), _TextMlp(layout)
        self.input_layernorm = _RmsNorm(layout.width, layout.norm_eps)
        self.post_attention_layernorm = _RmsNorm(layout.width, layout.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class TextModel(nn.Module):
    """The causal text model over embedded tokens."""

    def __init__(self, layout: QwenLayout) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(layout.rows, layout.width)
        self.layers = nn.ModuleList(_TextBlock(layout) for _ in range(layout.depth))
        self.norm = _RmsNorm(layout.width, layout.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``x`` ``[B, L, width]`` to normalised hidden states of the same shape."""
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)


class RewardQwen(nn.Module):
    """A Qwen2-VL body with a reward head in place of the language head.

    Args:
        layout: sizes.
        head: the reward head, computed and stored in float32: near a score of 8 the step of bfloat16 is 0.06.
    """

    def __init__(self, layout: QwenLayout, head: nn.Module) -> None:
        super().__init__()
        self.layout = layout
        self.visual, self.model, self.rm_head = VisionTower(layout), TextModel(layout), head

    def use_matrix_dtype(self, dtype: torch.dtype) -> RewardQwen:
        """Store the body in ``dtype`` and the head in float32; returns self."""
        self.visual.to(dtype)
        self.model.to(dtype)
        self.rm_head.float()
        return self

    def forward(
        self,
        patches: Tensor,
        ids: Tensor,
        visual_index: Tensor,
        pool_index: Tensor,
        vision: tuple[Tensor, Tensor],
        text: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Head outputs at the pooled positions.

        Args:
            patches: ``[B, slices, S, patch_values]`` float32.
            ids: ``[B, L]`` int64; right padding is harmless because attention is causal.
            visual_index: ``[slices * S / merge^2]`` int64, where the visual tokens go (the same for all rows).
            pool_index: ``[B, K]`` int64, read positions.
            vision, text: the tables of :func:`vision_table` and :func:`text_table` (for L).

        Returns:
            ``[B, K, head outputs]`` float32.
        """
        tokens = self.visual(patches.flatten(0, 1), *vision)
        embedded = self.model.embed_tokens(ids)
        embedded = embedded.index_copy(1, visual_index, tokens.reshape(len(ids), -1, tokens.shape[-1]))
        hidden = self.model(embedded, *text)
        picked = hidden.gather(1, pool_index[..., None].expand(-1, -1, hidden.shape[-1]))
        return self.rm_head(picked.float())


def videoalign_head(layout: QwenLayout) -> nn.Module:
    """VideoAlign's head: one number per special token."""
    return nn.Linear(layout.width, 1, bias=False)


def hpsv3_head(layout: QwenLayout, widths: tuple[int, int] = (1024, 16)) -> nn.Module:
    """HPSv3's head: mean and log standard deviation. Dropout, idle here, keeps the published indices 0, 3, 5."""
    first, second = widths
    return nn.Sequential(
        nn.Linear(layout.width, first), nn.ReLU(), nn.Dropout(0.05), nn.Linear(first, second), nn.ReLU(),
        nn.Linear(second, 2),
    )  # fmt: skip

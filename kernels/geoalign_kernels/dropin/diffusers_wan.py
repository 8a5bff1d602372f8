"""diffusers' ``WanTransformer3DModel`` (Wan2.1 and Wan2.2, text or image to video) on the fused ops.

Patched on instances: ``rope.forward`` (angles in place of cosines and sines, cached), the two attention processors and
``forward`` of every block. Modulation per token (Wan2.2 TI2V) keeps the block's own code around the fused attentions.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from geoalign_kernels.dropin.parts import Core, Memo, Patch, cross_attention, heads_of, wide
from geoalign_kernels.ops.attention import attention
from geoalign_kernels.ops.gated_residual import gated_residual
from geoalign_kernels.ops.modulated_norm import modulated_norm
from geoalign_kernels.ops.qk_norm_rotary import qk_norm_rotary
from geoalign_kernels.ops.unrotate_gate_norm import unrotate_gate_norm

NAME = "diffusers WanTransformer3DModel"
BLOCK = ("hidden_states", "encoder_hidden_states", "temb", "rotary_emb")
"""Parameters of a block's forward."""
PARTS = ("norm1", "attn1", "norm2", "attn2", "norm3", "ffn", "scale_shift_table")
ATTENTION = ("to_q", "to_k", "to_v", "to_out", "norm_q", "norm_k", "heads", "processor")
PROCESSOR = "WanAttnProcessor"
TEXT_TOKENS = 512
"""What diffusers takes as the length of the text where image tokens stand before it."""


def obstacle(model: Any) -> str:
    """Why this network is not one that the adapter knows; empty if it is."""
    if not isinstance(getattr(model, "rope", None), nn.Module):
        return "it has no module 'rope'"
    if getattr(model, "_parallel_config", None) is not None:
        return "context parallelism is on, which splits the rotary tables"
    for index, block in enumerate(model.blocks):
        for name in ("attn1", "attn2"):
            attn = getattr(block, name)
            missing = [part for part in ATTENTION if not hasattr(attn, part)]
            if missing:
                return f"blocks.{index}.{name} has no {', '.join(missing)}"
            if type(attn.processor).__name__ != PROCESSOR:
                return f"blocks.{index}.{name} has the processor {type(attn.processor).__name__}, not {PROCESSOR}"
    return ""


class Rotary:
    """``rope.forward``: the module's own tables, kept by shape; as angles for the fused ops."""

    def __init__(self, rope: nn.Module, angles: bool) -> None:
        self.rope, self.angles, self.memo = rope, angles, Memo()

    def __call__(self, hidden_states: Tensor) -> Any:
        """(cos, sin) as diffusers makes them, or angles [S, hd/2] float32 of the grid of ``hidden_states``."""
        sources = tuple(self.rope.buffers())
        key = tuple(hidden_states.shape[2:]), hidden_states.device
        return self.memo.get(key, sources, lambda: self._tables(hidden_states))

    def _tables(self, hidden_states: Tensor) -> Any:
        cosine, sine = type(self.rope).forward(self.rope, hidden_states)
        if not self.angles:
            return cosine, sine
        # From the tables themselves: whatever base or scaling they were made with. Both lie in (-pi, pi].
        return torch.atan2(sine[0, :, 0, 1::2].float(), cosine[0, :, 0, 0::2].float()).contiguous()


class FusedProcessor:
    """Processor of one attention; ``rotary_emb`` are the angles of ``Rotary``."""

    _attention_backend = None
    _parallel_config = None

    def __init__(self, core: Core) -> None:
        self.core = core

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Tensor | None = None,
    ) -> Tensor:
        """As ``WanAttnProcessor``: [B, S, D] in and out.

        Raises:
            RuntimeError: a mask, or a backend that was set behind the back of ``accelerate``.
        """
        if attention_mask is not None or self._attention_backend is not None or self._parallel_config is not None:
            raise RuntimeError(
                "an accelerated WanTransformer3DModel takes no attention mask, backend or context parallelism: choose "
                "the core by accelerate(attention=...), or call handle.remove() first"
            )
        if encoder_hidden_states is None:
            out = self._to_itself(attn, hidden_states, rotary_emb)
        else:
            out = self._to_context(attn, hidden_states, encoder_hidden_states)
        return attn.to_out[1](attn.to_out[0](out.type_as(hidden_states)))

    def _to_itself(self, attn: Any, x: Tensor, angles: Tensor | None) -> Tensor:
        if getattr(attn, "fused_projections", False):
            projected = attn.to_qkv(x).chunk(3, dim=-1)
        else:
            projected = attn.to_q(x), attn.to_k(x), attn.to_v(x)
        q, k, v = (heads_of(part, attn.heads) for part in projected)
        q, k, v = qk_norm_rotary(q, k, v, attn.norm_q.weight, attn.norm_k.weight, angles, eps=attn.norm_q.eps)
        return attention(q, k, v, core=self.core.of(q)).out.flatten(2)

    def _to_context(self, attn: Any, x: Tensor, context: Tensor) -> Tensor:
        fused, pairs = getattr(attn, "fused_projections", False), []
        image = None
        if _has_image(attn):
            image, context = context[:, :-TEXT_TOKENS], context[:, -TEXT_TOKENS:]
        k, v = attn.to_kv(context).chunk(2, dim=-1) if fused else (attn.to_k(context), attn.to_v(context))
        pairs.append((k, v, attn.norm_k))
        if image is not None:
            added = attn.to_added_kv(image).chunk(2, dim=-1) if fused else None
            k, v = (attn.add_k_proj(image), attn.add_v_proj(image)) if added is None else added
            pairs.append((k, v, attn.norm_added_k))
        return cross_attention(attn.to_q(x), pairs, attn.norm_q, attn.heads, self.core)


def block_forward(
    block: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Tensor
) -> Tensor:
    """``WanTransformerBlock.forward`` with its elementwise chains fused.

    Args:
        block: the block. hidden_states: [B, S, D]. encoder_hidden_states: [B, L, D].
        temb: [B, 6, D]; [B, S, 6, D] runs the block's own code.
        rotary_emb: angles [S, hd/2].
    """
    if temb.dim() == 4:
        return type(block).forward(block, hidden_states, encoder_hidden_states, temb, rotary_emb)
    shift, scale, gate, shift_f, scale_f, gate_f = (block.scale_shift_table + wide(temb)).unbind(1)
    u = modulated_norm(hidden_states, scale, shift, block.norm1.eps)
    y = block.attn1(u, None, None, rotary_emb)
    if isinstance(block.norm2, nn.Identity):
        hidden_states = u = gated_residual(hidden_states, y, gate)
    else:
        weight, bias, eps = wide(block.norm2.weight), wide(block.norm2.bias), block.norm2.eps
        hidden_states, u = unrotate_gate_norm(y, hidden_states, gate, weight - 1, bias, eps=eps)
    y = block.attn2(u, encoder_hidden_states, None, None)
    one = torch.ones_like(gate[:1])
    hidden_states, u = unrotate_gate_norm(y, hidden_states, one, scale_f, shift_f, eps=block.norm3.eps)
    return gated_residual(hidden_states, block.ffn(u), gate_f)


def caches(model: Any) -> list[Patch]:
    """What changes no bit: the rotary tables, made once per shape."""
    return [Patch(model.rope, "forward", Rotary(model.rope, angles=False))]


def patches(model: Any, core: Core, compiled: bool) -> list[Patch]:
    """Everything that runs on the fused ops."""
    forward = torch.compile(block_forward, fullgraph=True, dynamic=False) if compiled else block_forward
    found = [Patch(model.rope, "forward", Rotary(model.rope, angles=True))]
    for block in model.blocks:
        found += [Patch(attn, "processor", FusedProcessor(core)) for attn in (block.attn1, block.attn2)]
        found.append(Patch(block, "forward", MethodType(forward, block)))
    return found


def probe(model: Any, randn: Any) -> tuple[list[Any], list[Any]]:
    """Arguments of one block for the comparison that ``accelerate`` makes: plain, fused."""
    block, (t, r, c) = model.blocks[0], model.config.patch_size
    width = block.scale_shift_table.shape[-1]
    video = randn(1, 1, 2 * t, 2 * r, 3 * c)
    tokens = TEXT_TOKENS + 3 if _has_image(block.attn2) else 5
    common = [randn(1, 12, width), randn(1, tokens, width), randn(1, 6, width)]
    cosine, sine = type(model.rope).forward(model.rope, video)
    return [*common, (cosine, sine)], [*common, Rotary(model.rope, angles=True)(video)]


def rows(model: Any) -> list[tuple[str, str, str]]:
    """(part, what runs, why) of the report at level "rounding", the core left out."""
    affine = not isinstance(model.blocks[0].norm2, nn.Identity)
    return [
        ("rope", "the module's tables as angles, kept for each video shape", ""),
        ("blocks.*.norm1 and modulation", "modulated_norm", "per-token modulation (Wan2.2 TI2V) keeps the block's own"),
        ("blocks.*.attn1", "qk_norm_rotary, attention", ""),
        ("blocks.*: residual and norm2", "unrotate_gate_norm" if affine else "gated_residual", ""),
        ("blocks.*.attn2", "rms_norm, attention" + (", summed" if _has_image(model.blocks[0].attn2) else ""), ""),
        ("blocks.*: residual, norm3 and modulation", "unrotate_gate_norm", ""),
        ("blocks.*: last residual", "gated_residual", ""),
        (
            "blocks.*: linears and ffn",
            "left alone",
            "matrix products are the library's; their LoRA, hooks and dtypes too",
        ),
        ("condition_embedder, patch_embedding", "left alone", "once a forward"),
        ("norm_out, proj_out", "left alone", "once a forward, inside the model's own code"),
    ]


def _has_image(attn: Any) -> bool:
    return attn.add_k_proj is not None

"""The Wan DiT of DiffSynth-Studio, and ReDirector's with rotary camera phases, on the fused ops.

Both are known by their parts and by the parameters of their blocks' forward. Patched on instances: ``forward`` of the
two attentions and of every block. Modulation per token keeps the block's own code around the fused attentions.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from geoalign_kernels.angles import rotate, rotation
from geoalign_kernels.dropin.parts import IMAGE_TOKENS, Core, Memo, Patch, cross_attention, heads_of, wide
from geoalign_kernels.ops.attention import attention
from geoalign_kernels.ops.gated_residual import gated_residual
from geoalign_kernels.ops.modulated_norm import modulated_norm
from geoalign_kernels.ops.qk_norm_rotary import qk_norm_rotary
from geoalign_kernels.ops.unrotate_gate_norm import unrotate_gate_norm

NAME = "Wan DiT of DiffSynth or ReDirector"
PLAIN_BLOCK = ("x", "context", "t_mod", "freqs")
CAMERA_BLOCK = ("x", "context", "cam_emb", "t_mod", "freqs")
"""Parameters of a block's forward."""
PARTS = ("norm1", "norm2", "norm3", "self_attn", "cross_attn", "ffn", "modulation")
ATTENTION = ("q", "k", "v", "o", "norm_q", "norm_k", "num_heads")


class Phases(NamedTuple):
    """Camera phases of one layer, [B, S, H, P] each."""

    qk: Tensor
    vo: Tensor


def obstacle(model: Any) -> str:
    """Why this network is not one that the adapter knows; empty if it is."""
    for index, block in enumerate(model.blocks):
        for name in ("self_attn", "cross_attn"):
            missing = [part for part in ATTENTION if not hasattr(getattr(block, name), part)]
            if missing:
                return f"blocks.{index}.{name} has no {', '.join(missing)}"
        if hasattr(block, "projector") or hasattr(block, "cam_encoder"):
            return f"blocks.{index} adds poses to its tokens (ReCamMaster), which this adapter does not do"
    return ""


def _has_cameras(model: Any) -> bool:
    return hasattr(model.blocks[0].self_attn, "rope_phase_qk")


class Settings:
    """What the patched attentions of one network share."""

    def __init__(self, core: Core) -> None:
        self.core, self._memo = core, Memo()

    def angles(self, freqs: Tensor) -> Tensor:
        """Angles [S, hd/2] float32 of complex factors [S, 1, hd/2]; once for all blocks, which get the same object."""
        return self._memo.get("angles", (freqs,), lambda: freqs.angle().flatten(0, 1).float().contiguous())


def camera_phases(attn: Any, cam_emb: Tensor | None) -> Phases | None:
    """Phases that a layer makes of the camera tokens [B, S, D]; None without cameras."""
    if cam_emb is None or not hasattr(attn, "rope_phase_qk"):
        return None
    return Phases(*(heads_of(make(cam_emb), attn.num_heads) for make in (attn.rope_phase_qk, attn.rope_phase_vo)))


def self_attention(
    attn: Any, settings: Settings, x: Tensor, freqs: Tensor, cam_emb: Tensor | None = None, phases: Phases | None = None
) -> Tensor:
    """``SelfAttention.forward``: [B, S, D] after the output projection.

    With ``phases`` (from the fused block) the rotation after the projection is left to what follows.
    """
    turned = camera_phases(attn, cam_emb) if phases is None else phases
    q, k, v = (heads_of(part(x), attn.num_heads) for part in (attn.q, attn.k, attn.v))
    qk, vo = (None, None) if turned is None else turned
    weights = attn.norm_q.weight, attn.norm_k.weight
    angles = settings.angles(freqs)
    q, k, v = qk_norm_rotary(q, k, v, *weights, angles, phase_qk=qk, phase_vo=vo, eps=attn.norm_q.eps)
    y = attn.o(attention(q, k, v, core=settings.core.of(q)).out.flatten(2))
    if turned is None or phases is not None:
        return y
    split = heads_of(wide(y), attn.num_heads)
    return rotate(split, rotation(None, turned.vo, split)).flatten(2).to(y.dtype)


def context_attention(attn: Any, settings: Settings, x: Tensor, y: Tensor) -> Tensor:
    """``CrossAttention.forward``: queries x [B, S, D] to the context y [B, L, D]."""
    image = None
    if getattr(attn, "has_image_input", False):
        image, y = y[:, :IMAGE_TOKENS], y[:, IMAGE_TOKENS:]
    pairs = [(attn.k(y), attn.v(y), attn.norm_k)]
    if image is not None:
        pairs.append((attn.k_img(image), attn.v_img(image), attn.norm_k_img))
    return attn.o(cross_attention(attn.q(x), pairs, attn.norm_q, attn.num_heads, settings.core))


def block_forward(
    block: Any, x: Tensor, context: Tensor, t_mod: Tensor, freqs: Tensor, cam_emb: Tensor | None = None
) -> Tensor:
    """``DiTBlock.forward``: x [B, S, D], context [B, L, D], t_mod [B, 6, D], freqs complex [S, 1, hd/2]."""
    shift, scale, gate, shift_f, scale_f, gate_f = (wide(block.modulation) + wide(t_mod)).unbind(1)
    attn, phases = block.self_attn, camera_phases(block.self_attn, cam_emb)
    u = modulated_norm(x, scale, shift, block.norm1.eps)
    y = attn(u, freqs) if phases is None else attn(u, freqs, phases=phases)
    weight, bias = wide(block.norm3.weight), wide(block.norm3.bias)
    turn = None if phases is None else phases.vo
    common = {"phase": turn, "heads": attn.num_heads, "eps": block.norm3.eps}
    x, u = unrotate_gate_norm(y, x, gate, weight - 1, bias, **common)
    y = block.cross_attn(u, context)
    x, u = unrotate_gate_norm(y, x, torch.ones_like(gate[:1]), scale_f, shift_f, eps=block.norm2.eps)
    return gated_residual(x, block.ffn(u), gate_f)


def plain_block(block: Any, x: Tensor, context: Tensor, t_mod: Tensor, freqs: Tensor) -> Tensor:
    """The forward of DiffSynth's block; modulation per token runs the block's own code."""
    if t_mod.dim() == 4:
        return type(block).forward(block, x, context, t_mod, freqs)
    return block_forward(block, x, context, t_mod, freqs)


def camera_block(
    block: Any, x: Tensor, context: Tensor, cam_emb: Tensor | None, t_mod: Tensor, freqs: Tensor
) -> Tensor:
    """The forward of ReDirector's block; modulation per token runs the block's own code."""
    if t_mod.dim() == 4:
        return type(block).forward(block, x, context, cam_emb, t_mod, freqs)
    return block_forward(block, x, context, t_mod, freqs, cam_emb)


class _Attention:
    """``forward`` of one attention module, bound to it and to the settings of its network."""

    def __init__(self, function: Any, attn: nn.Module, settings: Settings) -> None:
        self.function, self.attn, self.settings = function, attn, settings

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The patched forward."""
        return self.function(self.attn, self.settings, *args, **kwargs)


def caches(model: nn.Module) -> list[Patch]:
    """Nothing: the caller makes the rotary factors, and every other cache would depend on parameters."""
    return []


def patches(model: Any, core: Core, compiled: bool) -> list[Patch]:
    """Everything that runs on the fused ops."""
    forward: Any = camera_block if _has_cameras(model) else plain_block
    forward = torch.compile(forward, fullgraph=True, dynamic=False) if compiled else forward
    settings, found = Settings(core), []
    for block in model.blocks:
        for function, attn in ((self_attention, block.self_attn), (context_attention, block.cross_attn)):
            found.append(Patch(attn, "forward", _Attention(function, attn, settings)))
        found.append(Patch(block, "forward", MethodType(forward, block)))
    return found


def probe(model: Any, randn: Any) -> tuple[list[Any], list[Any]]:
    """Arguments of one block for the comparison that ``accelerate`` makes: plain, fused."""
    block, tokens = model.blocks[0], 12
    width, heads = block.modulation.shape[-1], block.self_attn.num_heads
    angle = torch.linspace(-3, 3, tokens * width // heads // 2, dtype=torch.float64, device=block.modulation.device)
    freqs = torch.polar(torch.ones_like(angle), angle).view(tokens, 1, -1)
    text = IMAGE_TOKENS + 5 if getattr(block.cross_attn, "has_image_input", False) else 5
    cameras = [randn(1, tokens, width)] if _has_cameras(model) else []
    arguments = [randn(1, tokens, width), randn(1, text, width), *cameras, randn(1, 6, width), freqs]
    return arguments, arguments


def rows(model: Any) -> list[tuple[str, str, str]]:
    """(part, what runs, why) of the report at level "rounding", the core left out."""
    cameras = " with camera phases" if _has_cameras(model) else ""
    image = ", summed" if getattr(model.blocks[0].cross_attn, "has_image_input", False) else ""
    return [
        ("blocks.*.norm1 and modulation", "modulated_norm", "per-token modulation (Wan2.2 TI2V) keeps the block's own"),
        ("blocks.*.self_attn", f"qk_norm_rotary{cameras}, attention", "rotary factors as angles"),
        ("blocks.*: residual and norm3", f"unrotate_gate_norm{cameras}", ""),
        ("blocks.*.cross_attn", f"rms_norm, attention{image}", ""),
        ("blocks.*: residual, norm2 and modulation", "unrotate_gate_norm", ""),
        ("blocks.*: last residual", "gated_residual", ""),
        (
            "blocks.*: linears and ffn",
            "left alone",
            "matrix products are the library's; their LoRA, hooks and dtypes too",
        ),
        ("embeddings and head", "left alone", "once a forward, inside the model's own code"),
    ]

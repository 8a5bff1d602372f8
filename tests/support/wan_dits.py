"""Wan DiTs with the parts and signatures of DiffSynth and ReDirector, from their equations: complex128 rotations.

Written from the model's description, not from those projects' code: only the names of parts and of the parameters of
``forward`` are theirs, because that is what ``accelerate`` knows a network by.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

DIM, HEADS = 48, 2
PAIRS = DIM // HEADS // 2
CAMERA_PAIRS = (2 * DIM // HEADS) // 3 // 2
TOKENS, TEXT = 12, 5


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.eps = 1e-6
        self.weight = nn.Parameter(1 + 0.2 * torch.randn(DIM))

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight


def turn(x: Tensor, factors: Tensor) -> Tensor:
    """Adjacent pairs of the heads of x [B, S, D] times complex factors that broadcast to [B, S, H, pairs]."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (HEADS, PAIRS, 2)).contiguous())
    return torch.view_as_real(pairs * factors).flatten(2).to(x.dtype)


def unit(phase: Tensor) -> Tensor:
    """exp(i phase) on the last pairs, 1 on the others."""
    padded = nn.functional.pad(phase.double(), (PAIRS - phase.shape[-1], 0))
    return torch.polar(torch.ones_like(padded), padded)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.transpose(-1, -2) / (DIM // HEADS) ** 0.5).softmax(-1)
    return (scores @ v).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    def __init__(self, cameras: bool) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM) for _ in range(4))
        self.norm_q, self.norm_k = Norm(), Norm()
        if cameras:
            for name in ("rope_phase_qk", "rope_phase_vo"):
                setattr(self, name, nn.Sequential(nn.SiLU(), nn.Linear(DIM, HEADS * CAMERA_PAIRS, bias=False)))

    def forward(self, x: Tensor, freqs: Tensor, cam_emb: Tensor | None = None) -> Tensor:
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(x)), self.v(x)
        if cam_emb is None:
            return self.o(attend(turn(q, freqs), turn(k, freqs), v))
        qk, vo = (unit(make(cam_emb).unflatten(-1, (HEADS, -1))) for make in (self.rope_phase_qk, self.rope_phase_vo))
        return turn(self.o(attend(turn(q, freqs * qk), turn(k, freqs * qk), turn(v, vo.conj()))), vo)


class CrossAttention(nn.Module):
    def __init__(self, has_image_input: bool) -> None:
        super().__init__()
        self.num_heads, self.has_image_input = HEADS, has_image_input
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM) for _ in range(4))
        self.norm_q, self.norm_k = Norm(), Norm()
        if has_image_input:
            self.k_img, self.v_img, self.norm_k_img = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), Norm()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, text = self.norm_q(self.q(x)), y[:, 257:] if self.has_image_input else y
        out = attend(q, self.norm_k(self.k(text)), self.v(text))
        if self.has_image_input:
            out = out + attend(q, self.norm_k_img(self.k_img(y[:, :257])), self.v_img(y[:, :257]))
        return self.o(out)


class Block(nn.Module):
    def __init__(self, cameras: bool, image: bool) -> None:
        super().__init__()
        self.self_attn, self.cross_attn = SelfAttention(cameras), CrossAttention(image)
        self.norm1, self.norm2 = (nn.LayerNorm(DIM, 1e-6, elementwise_affine=False) for _ in range(2))
        self.norm3 = nn.LayerNorm(DIM, 1e-6)
        nn.init.normal_(self.norm3.weight, 1.0, 0.2)
        nn.init.normal_(self.norm3.bias, 0.0, 0.2)
        self.ffn = nn.Sequential(nn.Linear(DIM, 96), nn.GELU("tanh"), nn.Linear(96, DIM))
        self.modulation = nn.Parameter(0.7 * torch.randn(1, 6, DIM))

    def run(self, x: Tensor, context: Tensor, t_mod: Tensor, *attention: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (self.modulation + t_mod).unflatten(-2, (6, 1)).unbind(-3)
        if t_mod.dim() == 4:  # one modulation per token
            parts = shift_a, scale_a, gate_a, shift_f, scale_f, gate_f
            shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (part.squeeze(2) for part in parts)
        x = x + gate_a * self.self_attn(self.norm1(x) * (1 + scale_a) + shift_a, *attention)
        x = x + self.cross_attn(self.norm3(x), context)
        return x + gate_f * self.ffn(self.norm2(x) * (1 + scale_f) + shift_f)


class PlainBlock(Block):
    """Signature of DiffSynth."""

    def forward(self, x: Tensor, context: Tensor, t_mod: Tensor, freqs: Tensor) -> Tensor:
        return self.run(x, context, t_mod, freqs)


class CameraBlock(Block):
    """Signature of ReDirector."""

    def forward(self, x: Tensor, context: Tensor, cam_emb: Tensor | None, t_mod: Tensor, freqs: Tensor) -> Tensor:
        return self.run(x, context, t_mod, freqs, *([] if cam_emb is None else [cam_emb]))


class WanModel(nn.Module):
    """The blocks alone."""

    def __init__(self, cameras: bool, image: bool) -> None:
        super().__init__()
        torch.manual_seed(4)
        kind = CameraBlock if cameras else PlainBlock
        self.blocks = nn.ModuleList(kind(cameras, image) for _ in range(2))

    def forward(self, x: Tensor, context: Tensor, cam_emb: Tensor | None, t_mod: Tensor, freqs: Tensor) -> Tensor:
        for block in self.blocks:
            cameras = (cam_emb,) if isinstance(block, CameraBlock) else ()
            x = block(x, context, *cameras, t_mod, freqs)
        return x


def given(image: bool, per_token: bool = False) -> dict[str, Tensor]:
    """Arguments of one forward, float32; the angles reach 100 radians."""
    generator = torch.Generator().manual_seed(6)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    angle = torch.outer(torch.arange(TOKENS, dtype=torch.float64), torch.logspace(1, -3, PAIRS, dtype=torch.float64))
    return {
        "x": randn(2, TOKENS, DIM),
        "context": randn(2, 257 + TEXT if image else TEXT, DIM),
        "cam_emb": randn(2, TOKENS, DIM),
        "t_mod": randn(2, TOKENS, 6, DIM) if per_token else randn(2, 6, DIM),
        "freqs": torch.polar(torch.ones_like(angle), angle)[:, None],
    }

"""Layers of the retake transformer; parameter names are those of the original Wan2.1 files."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geoalign.config.model import ModelConfig
from geoalign.models.conditioning import CrossKeys, LayerAngles, LayerRotation
from geoalign.models.rope import attention_prologue, axis_pairs, rms_norm, rotate
from geoalign_kernels import unrotate_gate_norm


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """``LayerNorm(x) * (1 + scale) + shift`` in float32, without affine parameters."""
    return torch.addcmul(shift, F.layer_norm(x.float(), x.shape[-1:], eps=eps), 1 + scale)


def sinusoid(timestep: Tensor, dim: int) -> Tensor:
    """Embedding ``[B, dim]`` of timesteps ``[B]``: cosines, then sines, of frequencies ``10000 ** (-2 i / dim)``."""
    half = dim // 2
    frequency = torch.exp(torch.arange(half, device=timestep.device, dtype=torch.float32) * (-math.log(10000.0) / half))
    angle = timestep.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], -1)


class PatchEmbedding(nn.Module):
    """Linear map of non-overlapping patches; the weight has the shape of the equivalent Conv3d."""

    def __init__(self, channels: int, dim: int, patch: tuple[int, int, int]) -> None:
        super().__init__()
        self.patch = patch
        self.weight = nn.Parameter(torch.empty(dim, channels, *patch))
        self.bias = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weight over the flattened patch, zero bias."""
        nn.init.xavier_uniform_(self.weight.flatten(1))
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, T, h, w]`` to ``[B, N, dim]``; latents with fewer channels than the weight count as zero-padded."""
        (t, r, c), channels = self.patch, x.shape[1]
        x = x.unflatten(4, (-1, c)).unflatten(3, (-1, r)).unflatten(2, (-1, t))  # [B, C, T, t, R, r, W, c]
        x = x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)
        weight = self.weight[:, :channels].flatten(1)
        return F.linear(x.to(weight.dtype), weight, self.bias)


class RMSNorm(nn.Module):
    """Holds the weight of a query/key norm; see :func:`geoalign.models.rope.norm_rotate`."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.eps) * self.weight


class SelfAttention(nn.Module):
    """Full attention with q/k norm over all heads jointly, rotary positions and rotary camera phases."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(config.dim, config.eps), RMSNorm(config.dim, config.eps)
        if config.camera == "learned":
            phases = config.heads * 2 * axis_pairs(config.head_dim)[1]
            self.rope_phase_qk = nn.Sequential(nn.SiLU(), nn.Linear(config.dim, phases, bias=False))
            self.rope_phase_vo = nn.Sequential(nn.SiLU(), nn.Linear(config.dim, phases, bias=False))
            nn.init.zeros_(self.rope_phase_qk[1].weight)
            nn.init.zeros_(self.rope_phase_vo[1].weight)
        if config.camera == "geometric":
            # Log-gains of the target's motion per head: translation along three ground-aligned axes, rotation.
            self.camera_gain = nn.Parameter(torch.zeros(config.heads, 4))

    def forward(self, x: Tensor, rotation: LayerRotation | LayerAngles, queries: int) -> Tensor:
        """Attend from the first ``queries`` tokens of ``x`` ``[B, N, dim]`` to all; returns ``[B, queries, dim]``.

        With angles, the rotation of the output is left to :meth:`Block._join`, which fuses it with what follows.
        """
        heads, ahead = self.config.heads, slice(0, queries)
        projected = self.q(x[:, ahead]), self.k(x), self.v(x)
        weights = self.norm_q.weight, self.norm_k.weight
        q, k, v = attention_prologue(*projected, weights, rotation, heads, self.config.eps)
        y = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)))
        y = self.o(y.transpose(1, 2).flatten(2))
        if isinstance(rotation, LayerRotation) and rotation.vo is not None:
            # After the output projection, with its channels viewed as heads (ReDirector's rotary camera encoding).
            y = rotate(y.unflatten(-1, (heads, -1)), rotation.vo[ahead]).flatten(2)
        return y


class CrossAttention(nn.Module):
    """Attention to text tokens and, with an image branch, to CLIP tokens; both share the normalised query."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q, self.k, self.v, self.o = (nn.Linear(config.dim, config.dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(config.dim, config.eps), RMSNorm(config.dim, config.eps)
        if config.image_dim is not None:
            self.k_img, self.v_img = nn.Linear(config.dim, config.dim), nn.Linear(config.dim, config.dim)
            self.norm_k_img = RMSNorm(config.dim, config.eps)

    def prepare(self, text: Tensor, image: Tensor | None) -> CrossKeys:
        """Keys and values of ``[B, L, dim]`` tokens. Softmax over one key is 1, so one text token gives a constant."""
        if text.shape[1] == 1 and image is None:
            return CrossKeys(constant=self.o(self.v(text)))
        pair = self._split(self.norm_k(self.k(text))), self._split(self.v(text))
        if image is None:
            return CrossKeys(text=pair)
        return CrossKeys(
            text=pair, image=(self._split(self.norm_k_img(self.k_img(image))), self._split(self.v_img(image)))
        )

    def forward(self, x: Tensor, keys: CrossKeys) -> Tensor:
        """``x`` ``[B, N, dim]`` queries; the outputs of the two attentions are summed before the output projection."""
        assert keys.text is not None
        q = self._split(self.norm_q(self.q(x)))
        y = F.scaled_dot_product_attention(q, *keys.text)
        if keys.image is not None:
            y = y + F.scaled_dot_product_attention(q, *keys.image)
        return self.o(y.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """Modulated self-attention, cross-attention, modulated feed-forward; norms, modulation and residual are float32."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim) / math.sqrt(config.dim))
        self.self_attn = SelfAttention(config)
        self.norm3 = nn.LayerNorm(config.dim, config.eps)
        self.cross_attn = CrossAttention(config)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim), nn.GELU("tanh"), nn.Linear(config.ffn_dim, config.dim)
        )
        if config.camera == "modulated":
            self.cam_encoder = nn.Linear(12, config.dim)
            self.projector = nn.Linear(config.dim, config.dim)
            nn.init.zeros_(self.cam_encoder.weight)
            nn.init.zeros_(self.cam_encoder.bias)
            nn.init.eye_(self.projector.weight)
            nn.init.zeros_(self.projector.bias)

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        rotation: LayerRotation | LayerAngles,
        keys: CrossKeys,
        poses: Tensor | None,
        keep: int,
    ) -> Tensor:
        """Transform ``x`` ``[B, N, dim]`` and return its first ``keep`` tokens (all but the last block keep N).

        Args:
            x: float32 residual stream.
            time: ``[B, 6, dim]`` float32 time modulation.
            rotation: rotary angles of this layer.
            keys: cross-attention keys of this layer.
            poses: ``[B, N, 12]`` camera poses per token (ReCamMaster), or None.
            keep: tokens whose output is needed.
        """
        dtype = self.ffn[0].weight.dtype
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (self.modulation.float() + time).chunk(6, 1)
        u = modulate(x, shift_a, scale_a, self.config.eps).to(dtype)
        if poses is not None:
            u = u + self.cam_encoder(poses.to(dtype))
        y = self.self_attn(u, rotation, keep)
        if poses is not None:
            y = self.projector(y)
        x, normed = self._join(x[:, :keep], y, gate_a, rotation, needs_norm=keys.constant is None)
        if keys.constant is None:
            assert normed is not None
            x = x + self.cross_attn(normed.to(dtype), keys).float()
        else:
            x = x + keys.constant.float()
        return torch.addcmul(x, gate_f, self.ffn(modulate(x, shift_f, scale_f, self.config.eps).to(dtype)).float())

    def _join(
        self, x: Tensor, y: Tensor, gate: Tensor, rotation: LayerRotation | LayerAngles, needs_norm: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Residual stream after self-attention's output ``y``, and its norm for the cross-attention."""
        weight, bias = self.norm3.weight.float(), self.norm3.bias.float()
        if not needs_norm:
            weight, bias = weight.detach(), bias.detach()
        if isinstance(rotation, LayerAngles):
            phase = None if rotation.phase_vo is None else rotation.phase_vo[:, : x.shape[1]]
            x, normed = unrotate_gate_norm(
                y, x, gate.squeeze(1), weight - 1, bias, phase=phase, heads=self.config.heads, eps=self.config.eps
            )
            return x, normed if needs_norm else None
        x = torch.addcmul(x, gate, y.float())
        return x, F.layer_norm(x, x.shape[-1:], weight, bias, self.config.eps) if needs_norm else None


class Head(nn.Module):
    """Modulated norm and projection of every token to its latent patch (channel fastest)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.head = nn.Linear(config.dim, config.out_channels * math.prod(config.patch))
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / math.sqrt(config.dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """``x`` ``[B, N, dim]`` and ``time`` ``[B, dim]`` to ``[B, N, patch volume * out_channels]``, all float32."""
        shift, scale = (self.modulation.float() + time[:, None]).chunk(2, 1)
        return self.head(modulate(x, shift, scale, self.eps).to(self.head.weight.dtype)).float()


class ImageProjector(nn.Module):
    """CLIP tokens to the model width (Wan2.1 ``img_emb``); its norms keep torch's default epsilon."""

    def __init__(self, image_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(image_dim),
            nn.Linear(image_dim, image_dim),
            nn.GELU(),
            nn.Linear(image_dim, dim),
            nn.LayerNorm(dim),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """``[B, L, image_dim]`` to ``[B, L, dim]``."""
        return self.proj(tokens.to(self.proj[1].weight.dtype))

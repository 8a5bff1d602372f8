"""Layers of the retake transformer; parameter names are those of the original Wan2.1 files."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geoalign.config.model import ModelConfig
from geoalign.models.conditioning import CrossKeys, Phases
from geoalign.models.execution import Execution
from geoalign.models.rope import axis_pairs
from geoalign_kernels import (
    attention,
    gated_residual,
    inside_exact_only,
    modulated_norm,
    qk_norm_rotary,
    rms_norm,
    unrotate_gate_norm,
)
from geoalign_kernels.ops.attention.probe import Mode


def wide(x: Tensor) -> Tensor:
    """``x`` in float32, or as it is if it is float64 (exactness checks run whole models in float64)."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sinusoid(timestep: Tensor, dim: int) -> Tensor:
    """Embedding ``[B, dim]`` of timesteps ``[B]``: cosines, then sines, of frequencies ``10000 ** (-2 i / dim)``."""
    half = dim // 2
    frequency = torch.exp(torch.arange(half, device=timestep.device, dtype=torch.float32) * (-math.log(10000.0) / half))
    angle = timestep.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], -1)


def rounds_freely() -> bool:
    """Whether this step takes no log-probability, so that its kernels may round otherwise than the learner's."""
    return not (torch.is_grad_enabled() or inside_exact_only())


def gelu_in_product(weight: Tensor, u: Tensor) -> bool:
    """Whether a feed-forward of ``u`` may take its GELU into the product: another rounding than the learner's."""
    plain = type(weight) is nn.Parameter  # not one that torchao or FSDP2 has replaced
    return rounds_freely() and plain and u.is_cuda and u.dtype == torch.bfloat16


class Stream(NamedTuple):
    """The residual stream ``x`` ``[B, N, dim]`` float32 between two blocks, and what it may still be owed.

    Where a step :func:`rounds_freely`, the next block's first norm adds the feed-forward's output in the same pass over
    memory. With gradients nothing is owed: recomputation would keep both tensors.
    """

    x: Tensor
    owed: Tensor | None = None
    gate: Tensor | None = None

    def normed(self, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The settled stream, and its modulated norm in ``dtype``."""
        if self.owed is None or self.gate is None:
            return self.x, modulated_norm(self.x, scale, shift, eps, dtype=dtype)
        return unrotate_gate_norm(self.owed, self.x, self.gate, scale, shift, eps=eps, dtype=dtype)

    def settled(self) -> Tensor:
        """The stream with what it was owed."""
        return self.x if self.owed is None or self.gate is None else gated_residual(self.x, self.owed, self.gate)


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
    """Root-mean-square norm over all heads; in self-attention it only holds the weight of the fused prologue."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[B, L, dim]`` tokens."""
        return rms_norm(x, self.weight, self.eps)


class SelfAttention(nn.Module):
    """Full attention with q/k norm over all heads jointly, rotary positions and rotary camera phases."""

    def __init__(self, config: ModelConfig, layer: int, execution: Execution) -> None:
        super().__init__()
        self.config, self.layer, self.execution = config, layer, execution
        self.mode: Mode | None = None
        """What the probe of ``execution`` found; read only with one."""
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

    def learned_phases(self, camera_tokens: Tensor) -> Phases:
        """Phases of this layer from the adapter's tokens ``[B, N, dim]`` (ReDirector's rotary camera encoding)."""
        shape = (self.config.heads, -1)
        return Phases(*(f(camera_tokens).unflatten(-1, shape) for f in (self.rope_phase_qk, self.rope_phase_vo)))

    def forward(self, x: Tensor, position: Tensor | None, phases: Phases | None, queries: int) -> Tensor:
        """Attend from the first ``queries`` tokens of ``x`` ``[B, N, dim]`` to all.

        Args:
            x: normalised tokens.
            position: ``[N, head_dim / 2]`` rotary angles, or None when ``phases.qk`` holds them.
            phases: camera phases, or None.
            queries: tokens whose output is needed.

        Returns:
            ``[B, queries, dim]`` after the output projection; its rotation by ``phases.vo`` is left to
            :func:`geoalign_kernels.unrotate_gate_norm`, which fuses it with what follows.
        """
        projected = self.q(x[:, :queries]), self.k(x), self.v(x)
        q, k, v = (part.unflatten(-1, (self.config.heads, -1)) for part in projected)
        q, k, v = qk_norm_rotary(
            q,
            k,
            v,
            self.norm_q.weight,
            self.norm_k.weight,
            position,
            phase_qk=None if phases is None else phases.qk,
            phase_vo=None if phases is None else phases.vo,
            eps=self.config.eps,
        )
        return self.o(self._attend(q, k, v).flatten(2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention over the tokens of all ranks: ``[B, N, heads, head_dim]`` each, like ``q``."""
        sequence, probe, core = self.execution.sequence, self.execution.probe, self.execution.core
        if sequence is not None:
            q, k, v = (sequence.to_heads(part) for part in (q, k, v))
        if probe is not None and probe.measures(self.layer):
            y = probe(self.layer, q, k, v, core=core)
            self.mode = probe.chosen[self.layer]
        else:
            y = attention(q, k, v, mode="exact" if probe is None or self.mode is None else self.mode, core=core).out
        return y if sequence is None else sequence.to_tokens(y)


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

    def keys(self, text: Tensor, image: Tensor | None) -> CrossKeys:
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

    def __init__(self, config: ModelConfig, layer: int, execution: Execution) -> None:
        super().__init__()
        self.config = config
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim) / math.sqrt(config.dim))
        self.self_attn = SelfAttention(config, layer, execution)
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
        stream: Stream,
        time: Tensor,
        position: Tensor | None,
        camera: Phases | Tensor | None,
        keys: CrossKeys,
        poses: Tensor | None,
        keep: int,
    ) -> Stream:
        """Transform the residual stream and return its first ``keep`` tokens (all but the last block keep N).

        Runs :meth:`compute` as the network's execution says. What hooks this call (FSDP2) stays outside of what is
        compiled or computed again in the backward.

        Args:
            stream: of ``[B, N, dim]`` tokens.
            time: ``[B, 6, dim]`` float32 time modulation.
            position: ``[N, head_dim / 2]`` rotary angles, or None when the camera phases hold them.
            camera: phases of this layer, or the tokens ``[B, N, dim]`` that it makes them of, or None.
            keys: cross-attention keys of this layer. With those of 2 B prompts the last B rows of the result are the
                same samples under the second half of the prompts: what comes before the text runs once.
            poses: ``[B, N, 12]`` camera poses per token (ReCamMaster), or None.
            keep: tokens whose output is needed.
        """
        return self.self_attn.execution.run(self, stream, time, position, camera, keys, poses, keep)

    def learned_phases(self, camera_tokens: Tensor) -> Phases:
        """See :meth:`SelfAttention.learned_phases`."""
        return self.self_attn.learned_phases(camera_tokens)

    def cross_keys(self, text: Tensor, image: Tensor | None) -> CrossKeys:
        """See :meth:`CrossAttention.keys`."""
        return self.cross_attn.keys(text, image)

    def compute(
        self,
        stream: Stream,
        time: Tensor,
        position: Tensor | None,
        camera: Phases | Tensor | None,
        keys: CrossKeys,
        poses: Tensor | None,
        keep: int,
    ) -> Stream:
        """The arithmetic of :meth:`forward`."""
        phases = self.self_attn.learned_phases(camera) if isinstance(camera, Tensor) else camera
        modulation = wide(self.modulation) + time
        x, u = stream.normed(modulation[:, 1], modulation[:, 0], self.config.eps, self._dtype)
        y = self._attend(u, position, phases, poses, keep)
        turn = None if phases is None else phases.vo[:, :keep]
        x, double = x[:, :keep], keys.batch // x.shape[0]
        x, y, modulation = (part.repeat(double, 1, 1) if double > 1 else part for part in (x, y, modulation))
        turn = turn.repeat(double, 1, 1, 1) if turn is not None and double > 1 and turn.shape[0] > 1 else turn
        return self._finish(x, y, modulation, turn, keys)

    @property
    def _dtype(self) -> torch.dtype:
        """Of the matrices."""
        execution: Execution = self.self_attn.execution
        return execution.dtype or next(self.ffn.parameters()).dtype

    def _attend(
        self, u: Tensor, position: Tensor | None, phases: Phases | None, poses: Tensor | None, queries: int
    ) -> Tensor:
        """Output of self-attention for the first ``queries`` tokens, before its rotation and gate."""
        if poses is None:
            return self.self_attn(u, position, phases, queries)
        return self.projector(self.self_attn(u + self.cam_encoder(poses.to(u.dtype)), position, phases, queries))

    def _finish(self, x: Tensor, y: Tensor, modulation: Tensor, turn: Tensor | None, keys: CrossKeys) -> Stream:
        """Rotate and add attention's output ``y``, then cross-attention and feed-forward."""
        dtype, eps = self._dtype, self.config.eps
        common = {"phase": turn, "heads": self.config.heads, "eps": eps, "dtype": dtype}
        _, _, gate_a, shift_f, scale_f, gate_f = modulation.unbind(1)
        if keys.constant is not None:  # nothing stands between the two residual sums: one norm serves the feed-forward
            x, u = unrotate_gate_norm(y, x + wide(keys.constant), gate_a, scale_f, shift_f, **common)
        else:
            weight, bias = wide(self.norm3.weight), wide(self.norm3.bias)
            x, u = unrotate_gate_norm(y, x, gate_a, weight - 1, bias, **common)
            one = torch.ones_like(bias)
            x, u = unrotate_gate_norm(self.cross_attn(u, keys), x, one, scale_f, shift_f, eps=eps, dtype=dtype)
        stream = Stream(x, self._feed_forward(u), gate_f)
        return stream if rounds_freely() else Stream(stream.settled())

    def _feed_forward(self, u: Tensor) -> Tensor:
        """``self.ffn``; in steps that take no log-probability its GELU runs inside the product (cuBLASLt)."""
        into, _, out = self.ffn
        if not gelu_in_product(into.weight, u):
            return self.ffn(u)
        hidden = torch._addmm_activation(into.bias, u.flatten(0, 1), into.weight.T, use_gelu=True)
        return out(hidden.unflatten(0, u.shape[:2]))


class Head(nn.Module):
    """Modulated norm and projection of every token to its latent patch (channel fastest)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.head = nn.Linear(config.dim, config.out_channels * math.prod(config.patch))
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / math.sqrt(config.dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """``x`` ``[B, N, dim]`` and ``time`` ``[B, dim]`` to ``[B, N, patch volume * out_channels]``, all float32."""
        shift, scale = (wide(self.modulation) + time[:, None]).unbind(1)
        return wide(self.head(modulated_norm(x, scale, shift, self.eps, dtype=self.head.weight.dtype)))


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

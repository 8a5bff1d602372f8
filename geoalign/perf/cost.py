"""Analytic cost of the network: FLOPs, memory traffic, activation bytes and seconds of one forward or backward.

Nothing here is a measurement: every second is a *prediction* from the rates of a device profile
(:mod:`geoalign.perf.devices`). One FLOP is half a multiply-add; traffic counts reads and
writes of device memory, every operand once per pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

from geoalign.perf.devices import DeviceProfile

if TYPE_CHECKING:  # the benchmarks run where pydantic is not installed
    from geoalign.config.model import ModelConfig

Kernels = Literal["eager", "compiled", "fused"]
Saved = Literal["inputs", "attention", "all"]

_BF16_BYTES, _LSE_BYTES = 2, 4
_CLIP_TOKENS = 257
_ADAPTER_CHANNELS = 24 * 64
"""Pluecker rays of four frames (24 channels), 8 x 8 pixels unfolded."""
_COMPILED_TRAFFIC = 2.1
"""Memory traffic of compiled real-valued kernels relative to hand-fused ones (assumed)."""
_BACKWARD_OF_ATTENTION = 2.5
"""FLOPs of the attention backward over its forward: five matrix products for two (FlashAttention-2)."""
_BACKWARD_OF_ELEMENTWISE = 2.0
_JOINED = 2.0
"""Fewer bf16 [tokens, dim] tensors to move where a block's norm adds what the last one owes: one read of float32."""
_KEPT_BY_EAGER, _HELD_BY_BACKWARD = 27.2, 36.0
"""In bf16 [tokens, dim] tensors: kept per block without recomputation, and alive while one block goes backward."""


@dataclass(frozen=True, slots=True)
class Speedups:
    """What makes forwards and backwards cheaper than the published eager ones.

    Attributes:
        kernels: memory-bound passes as published (``eager``), compiled with real-valued rotary, or hand-fused.
        cached: adapter output and camera phases are kept per condition.
        pruned: source tokens skip query, output and feed-forward work of the last block, whose result is unused.
        int8_linear: W8A8 products in the frozen linears.
    """

    kernels: Kernels = "eager"
    cached: bool = False
    pruned: bool = False
    int8_linear: bool = False


@dataclass(frozen=True, slots=True)
class Seconds:
    """Predicted seconds of one forward or backward by kind of work."""

    attention: float
    matmul: float
    elementwise: float
    adapter: float = 0.0

    @property
    def total(self) -> float:
        """All kinds."""
        return self.attention + self.matmul + self.elementwise + self.adapter


@dataclass(frozen=True, slots=True)
class Pass:
    """A memory-bound pass of one block, in units of one bf16 [tokens, dim] tensor moved."""

    name: str
    eager: float
    fused: float


@dataclass(frozen=True, slots=True)
class TransformerCost:
    """Work of one sample in a Wan-shaped transformer; the defaults are ReDirector's 1.3B at 81 x 480 x 832.

    Attributes:
        dim, heads, ffn_dim, layers: of the transformer.
        target_tokens, source_tokens: noisy tokens, and clean ones joined to them.
        context_tokens: keys of the cross-attention (text and image).
        phase_channels: camera phases per token and block made by learned linears; 0 without them.
        adapter: whether a Pluecker adapter runs.
    """

    dim: int = 1536
    heads: int = 12
    ffn_dim: int = 8960
    layers: int = 30
    target_tokens: int = 32760
    source_tokens: int = 32760
    context_tokens: int = 512 + _CLIP_TOKENS
    phase_channels: int = 504
    adapter: bool = True

    @classmethod
    def of(cls, model: ModelConfig, frames: int, height: int, width: int) -> Self:
        """The work of ``model`` on videos of that many frames and pixels."""
        target, source = model.tokens(frames, height, width)
        return cls(
            dim=model.dim,
            heads=model.heads,
            ffn_dim=model.ffn_dim,
            layers=model.layers,
            target_tokens=target,
            source_tokens=source,
            context_tokens=model.text_length + (_CLIP_TOKENS if model.image_dim else 0),
            # Rotated pairs of a head apart from those of the time axis.
            phase_channels=model.heads * 2 * (model.head_dim // 6) if model.camera == "learned" else 0,
            adapter=model.pluecker_adapter,
        )

    @property
    def tokens(self) -> int:
        """Tokens of the self-attention."""
        return self.target_tokens + self.source_tokens

    @property
    def stream_bytes(self) -> float:
        """Bytes of one bf16 [tokens, dim] tensor."""
        return float(self.tokens * self.dim * _BF16_BYTES)

    def block_flops(self) -> dict[str, float]:
        """FLOPs of one block's forward by part."""
        n, d = self.tokens, self.dim
        return {
            "self_attention": 4.0 * n * n * d,
            "qkvo": 8.0 * n * d * d,
            "camera_phases": 4.0 * n * d * self.phase_channels,
            "cross_linear": 4.0 * (n + self.context_tokens) * d * d,
            "cross_attention": 4.0 * n * self.context_tokens * d,
            "ffn": 4.0 * n * d * self.ffn_dim,
        }

    def adapter_flops(self) -> float:
        """FLOPs of the Pluecker adapter: a 2 x 2 convolution and two 3 x 3 ones at token resolution."""
        if not self.adapter:
            return 0.0
        return 2.0 * self.tokens * self.dim * (_ADAPTER_CHANNELS * 4 + 2 * 9 * self.dim)

    def forward_flops(self) -> float:
        """FLOPs of one forward."""
        return self.layers * sum(self.block_flops().values()) + self.adapter_flops()

    def backward_flops(self) -> float:
        """FLOPs of one backward that trains the self-attention parameters only (frozen weights get no gradient)."""
        part = self.block_flops()
        attention = _BACKWARD_OF_ATTENTION * (part["self_attention"] + part["cross_attention"])
        return self.layers * (attention + 2 * part["qkvo"] + part["camera_phases"] + part["cross_linear"] + part["ffn"])

    def passes(self) -> tuple[Pass, ...]:
        """Memory-bound passes of one block; the residual stream is float32, two units a pass.

        Eager counts follow the published code: rotary embedding in complex128 with its casts, RMSNorm through float32,
        one kernel per operation, everything in bfloat16. Fused counts are those of ``models/layers.py``: every input
        read and every output written once.
        """
        widening = self.ffn_dim / self.dim
        phases = self.phase_channels / self.dim
        camera = self.phase_channels > 0
        rotary, rotary_with_camera, rotary_value = 22.0, 35.7, 27.3  # passes per tensor in complex128
        return (
            Pass("norm and modulation before attention; others eager", 14.0, 3.0),
            Pass("q and k RMSNorm", 36.0, 0.0),
            Pass("rotary phases of q and k", 2 * (rotary_with_camera if camera else rotary), 4.0 + phases),
            Pass(
                "camera rotation of v and output",
                2 * rotary_value + 4 if camera else 0.0,
                2 + 2 * phases if camera else 0.0,
            ),
            Pass("gates, residuals and the norms behind them", 13.0, 6.0 + 6.0 + 5.0),
            Pass("cross-attention norm, sum and copies", 25.0, 7.0),
            Pass("GELU of the feed-forward hidden layer", 2 * widening, 2 * widening),
        )

    def traffic_bytes(self, kernels: Kernels, *, no_gradient: bool = False) -> float:
        """Bytes that the memory-bound passes of one forward move; ``no_gradient``: as :meth:`forward`."""
        fused = sum(item.fused for item in self.passes())
        if no_gradient:
            fused -= 2 * self.ffn_dim / self.dim
            fused -= _JOINED * (self.layers - 1) / self.layers
        units = {
            "eager": sum(item.eager for item in self.passes()),
            "compiled": _COMPILED_TRAFFIC * fused,
            "fused": fused,
        }
        return self.layers * units[kernels] * self.stream_bytes

    def forward(
        self, device: DeviceProfile, speedups: Speedups, *, attention: str = "exact", no_gradient: bool = False
    ) -> Seconds:
        """Predicted seconds of one forward of one sample.

        Args:
            device, speedups: where and how.
            attention: mode of the self-attention, one that the device has.
            no_gradient: a step outside the window, whose fused feed-forward has its GELU in the product's epilogue and
                leaves its residual to the next block's norm.
        """
        part = self.block_flops()
        frozen = part["cross_linear"] + part["ffn"]
        trained = part["qkvo"] + (0.0 if speedups.cached else part["camera_phases"])
        rate = device.rate_of(attention)
        assert rate is not None, f"{attention} attention does not exist on {device.name}"
        cross = self.layers * part["cross_attention"] / device.attention
        linear = self.layers * (
            trained / device.matmul + frozen / (device.matmul_int8 if speedups.int8_linear else device.matmul)
        )
        elementwise = self.traffic_bytes(speedups.kernels, no_gradient=no_gradient) / device.bandwidth
        # Source keys and values of the last block are still needed: about four fifths of its source work falls away.
        kept = 1.0 - self._unused_share if speedups.pruned else 1.0
        linear_kept = 1.0 - 0.8 * self._unused_share if speedups.pruned else 1.0
        return Seconds(
            attention=self.layers * part["self_attention"] / rate * kept,
            matmul=linear * linear_kept + cross * kept,
            elementwise=elementwise * linear_kept,
            adapter=0.0 if speedups.cached else self.adapter_flops() / device.convolution,
        )

    def backward(self, device: DeviceProfile, speedups: Speedups) -> Seconds:
        """Predicted seconds of one backward of one sample, recomputation not included."""
        part = self.block_flops()
        to_inputs = part["qkvo"] + part["cross_linear"] + part["ffn"]
        to_weights = part["qkvo"] + part["camera_phases"]
        attention = _BACKWARD_OF_ATTENTION * part["self_attention"] / device.attention_backward
        cross = _BACKWARD_OF_ATTENTION * part["cross_attention"] / device.attention_backward
        traffic = _BACKWARD_OF_ELEMENTWISE * self.traffic_bytes(speedups.kernels) / device.bandwidth
        kept = 1.0 - self._unused_share if speedups.pruned else 1.0
        return Seconds(
            attention=kept * self.layers * attention,
            matmul=kept * self.layers * (cross + (to_inputs + to_weights) / device.matmul),
            elementwise=kept * traffic,
        )

    def activation_bytes(self, saved: Saved) -> float:
        """Bytes that the graph of one sample's forward keeps, with bf16 matrices and a pruned last block.

        ``inputs``: what enters the blocks and the head, in float32; ``attention``: also attention outputs and their
        log-sum-exp; ``all``: no recomputation, eager blocks (counted, see ``tests/unit/perf/test_memory.py``).
        """
        stream, targets = self.stream_bytes, self.target_tokens / self.tokens
        if saved == "all":
            return _KEPT_BY_EAGER * self.layers * stream
        attention = stream + self.heads * self.tokens * _LSE_BYTES
        inputs = 2 * stream * (self.layers + targets)
        return inputs + (self.layers - 1 + targets) * attention * (saved == "attention")

    def block_backward_bytes(self) -> float:
        """Most bytes that the recomputation and backward of one eager block hold beside the kept graph (counted)."""
        return _HELD_BY_BACKWARD * self.stream_bytes

    def condition_bytes(self, *, phases: bool) -> float:
        """Bytes kept with one condition: source and camera tokens, cross-attention keys and values, float32 phases."""
        tokens = self.dim * self.source_tokens + self.dim * self.tokens * self.adapter
        keys = 2 * self.layers * self.dim * self.context_tokens
        angles = self.layers * self.tokens * self.phase_channels * phases
        return float(_BF16_BYTES * (tokens + keys) + 4 * angles)

    @property
    def _unused_share(self) -> float:
        """Share of the whole stack that the last block spends on source tokens, whose output nobody reads."""
        return self.source_tokens / self.tokens / self.layers


@dataclass(frozen=True, slots=True)
class VideoCost:
    """Work beside the transformer for one generated video, in FLOPs; the defaults are the paper's at 81 x 480 x 832.

    Attributes:
        decode, encode: Wan video autoencoder.
        scorers: reward name -> FLOPs.
        host_seconds: decoding, resizing and waiting of the scorers' host code (assumed).
    """

    decode: float
    encode: float
    scorers: dict[str, float]
    host_seconds: float

    def seconds(self, device: DeviceProfile, *, hide_host: bool) -> float:
        """Predicted seconds to decode and score one video."""
        host = 0.0 if hide_host else self.host_seconds
        return self.decode / device.convolution + sum(self.scorers.values()) / device.reward + host


def wan_decode_flops(latent_frames: int, rows: int, columns: int) -> float:
    """FLOPs of the Wan 2.1 VAE decoder: 3-D convolutions of four resolution levels, and their upsamplers."""
    frames = (latent_frames, 2 * latent_frames - 1, 4 * latent_frames - 3, 4 * latent_frames - 3)
    channels, inputs = (384, 384, 192, 96), (384, 192, 192, 96)

    def conv3d(level: int, into: int, out: int) -> float:
        return 2.0 * frames[level] * (rows << level) * (columns << level) * into * out * 27

    flops = conv3d(0, 16, 384) + 4 * conv3d(0, 384, 384) + conv3d(3, 96, 3)
    for level in range(4):
        flops += conv3d(level, inputs[level], channels[level]) + 5 * conv3d(level, channels[level], channels[level])
        if level < 3:
            pixels = (rows << level) * (columns << level)
            flops += 2.0 * frames[level + 1] * 4 * pixels * channels[level] * (channels[level] // 2) * 9
            if level < 2:
                flops += 2.0 * frames[level] * pixels * channels[level] * 2 * channels[level] * 3
    return flops


def mapanything_flops(frames: int, rows: int = 21, columns: int = 37) -> float:
    """FLOPs of MapAnything on all frames: 24 encoder and 16 alternating layers of width 1536, and a dense head."""
    dim, hidden, patches = 1536, 4096, rows * columns
    linear = 2.0 * (4 * dim * dim + 3 * dim * hidden) * frames * patches * 40
    local = 4.0 * patches**2 * dim * frames * (24 + 8)
    across = 4.0 * (frames * patches) ** 2 * dim * 8
    return linear + local + across + 0.4e12 * frames


def hpsv3_flops(frames: int, text_tokens: int = 250) -> float:
    """FLOPs of HPSv3 (Qwen2-VL-7B) on every frame: 1,024 image patches, 256 image tokens in one language-model pass."""
    return frames * (2 * 0.675e9 * 1024 + 2 * 6.6e9 * (256 + text_tokens))


def videoalign_flops(sampled_frames: int = 10, text_tokens: int = 500) -> float:
    """FLOPs of VideoAlign (Qwen2-VL-2B) on frames sampled at two a second."""
    return 2 * 0.675e9 * sampled_frames * 1024 + 2 * 1.31e9 * (sampled_frames * 128 + text_tokens)


_ENCODER_OVER_DECODER = 0.595
"""Two residual blocks per level on the way down, three on the way up."""


def video_cost(frames: int, height: int, width: int, scorers: tuple[str, ...], host_seconds: float = 3.0) -> VideoCost:
    """Work beside the transformer; ``scorers`` from mapanything, hpsv3, videoalign."""
    decode = wan_decode_flops((frames - 1) // 4 + 1, height // 8, width // 8)
    known = {
        "mapanything": mapanything_flops(frames),
        "hpsv3": hpsv3_flops(frames),
        "videoalign": videoalign_flops(),
    }
    return VideoCost(decode, _ENCODER_OVER_DECODER * decode, {name: known[name] for name in scorers}, host_seconds)

"""The one retake against the sampler walked by hand: which noise, which condition, guidance, what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from geoalign.config.flow import FlowConfig
from geoalign.config.load import load_config
from geoalign.config.model import ModelConfig
from geoalign.config.schema import Config
from geoalign.config.world import WorldConfig
from geoalign.errors import RunError, UsageError
from geoalign.flow.sampler import FlowSampler, initial_noise
from geoalign.flow.table import build_step_table
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.jobs.evaluate import HeldOut, evaluate
from geoalign.models.conditioning import Conditioning
from geoalign.models.dit import RetakeDiT
from geoalign.policy.open import open_policy
from geoalign.policy.policy import RetakePolicy
from geoalign.policy.retake import retake
from geoalign.types import Encodings, RetakeBatch, SourceClip
from geoalign.world.pairs import paired_videos
from geoalign_kernels import NoiseKey, philox_normal

INITIAL, EVALUATION = 1, 4
"""Streams of the counter-based noise, frozen: another number would give every seed another sample."""
FLOW = FlowConfig(steps=3, shift=5.0)


def embedded(count: int) -> tuple[RetakePolicy, RetakeBatch]:
    policy = open_policy("builtin:tiny_base")
    return policy, paired_videos(WorldConfig(), count, torch.Generator().manual_seed(2), style="real").batch


def walked(policy: RetakePolicy, batch: RetakeBatch, seed: int, stream: int) -> torch.Tensor:
    """A deterministic sample of every row from noise (seed, iteration 0, row, sample 0, step 0, stream)."""
    precomputed = policy.precompute(policy.condition(batch))
    key = NoiseKey(seed, 0, torch.arange(len(batch)), 0, 0, stream)
    latents = FlowSampler(build_step_table(FLOW)).sample(
        policy.velocity, precomputed, philox_normal(policy.latent_shape(batch), key)
    )
    return policy.decode(latents, batch.source.video)


def test_a_sample_starts_from_its_own_stream_of_noise() -> None:
    policy, batch = embedded(1)
    assert torch.equal(retake(policy, batch, FLOW, seed=7), walked(policy, batch, 7, INITIAL))
    assert not torch.equal(retake(policy, batch, FLOW, seed=7), walked(policy, batch, 7, EVALUATION))


def test_an_evaluation_shows_the_same_retakes_for_ever() -> None:
    """Bitwise what a plain sampler makes of stream 4; the first noise seed's videos are kept for the report."""
    policy, _ = embedded(1)
    config = load_config(Config, "smoke", ["eval.noise_seeds=[5,6]", "eval.samples=2"])
    config = config.model_copy(update={"flow": FLOW})
    pairs = HeldOut.build(config).sets["presets"]
    found = evaluate(policy, config, HeldOut({"presets": pairs}))
    assert torch.equal(found.videos["presets"], walked(policy, pairs.batch, 5, EVALUATION))
    assert len(found.numbers["presets"]["psnr_db"]) == 2


def test_what_the_model_needs_and_the_batch_lacks_is_named() -> None:
    policy, batch = embedded(1)
    bare = replace(batch, source=replace(batch.source, ground_plane=None))
    with pytest.raises(UsageError, match=r"ground plane .* --ground-plane nx,ny,nz,d"):
        retake(policy, bare, FLOW, seed=0)
    reads = RetakeDiT(ModelConfig(dim=48, heads=2, layers=1, ffn_dim=48, image_dim=12, source="frames"))
    with pytest.raises(UsageError, match=r"image encoder: set data.prepare.image .* image_encoder/"):
        RetakePolicy(reads, policy.codec).condition(batch)


def test_values_that_are_not_finite_are_an_error_only_where_asked() -> None:
    policy, batch = embedded(1)
    with torch.no_grad():
        policy.model.head.head.weight.fill_(math.nan)
    assert not torch.isfinite(retake(policy, batch, FLOW, seed=0)).all()
    with pytest.raises(RunError, match="the model gave NaN or infinity in 100% of its values"):
        retake(policy, batch, FLOW, seed=0, strict=True)


def test_guidance_is_the_published_combination() -> None:
    """v_neg + 5 (v - v_neg) at every step, by hand; guidance 1 does one pass and ignores the negative text."""
    torch.manual_seed(1)
    config = ModelConfig(
        dim=48, heads=2, layers=2, ffn_dim=64, text_dim=16, text_length=3, freq_dim=32, source="frames",
        camera="modulated", rope_layout="sequential", time_stride=1, space_stride=1,
    )  # fmt: skip
    model = RetakeDiT(config).requires_grad_(False)
    camera = CameraTrajectory.stack([CameraTrajectory.identity(2)])
    source, text, negative = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 3, 16), torch.randn(1, 3, 16)
    plain = Conditioning(source, camera, camera, context=text)
    other = replace(plain, context=negative)
    clip = SourceClip(torch.zeros(1, 2, 3, 4, 4), camera, None, ("clip",))
    batch = RetakeBatch(clip, camera, ("",), Encodings(latents=source, context=text, negative=negative))

    class Latents:
        """A codec that shows the latents themselves."""

        name, frame_rule, latent_channels = "latents", "any", 16

        def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
            return 16, num_frames, height, width

        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            return latents / 100

    with pytest.raises(UsageError, match=r"reads text, and there is none: set data\.prepare\.text"):
        RetakePolicy(model, Latents()).condition(replace(batch, encodings=Encodings(latents=source)))
    calls: list[int] = []
    made = retake(RetakePolicy(model, Latents(), 5.0), batch, FLOW, seed=0, on_pass=calls.append)
    single = retake(RetakePolicy(model, Latents()), batch, FLOW, seed=0)
    assert calls == [2, 2, 2]
    table = build_step_table(FLOW)
    # sigma = 5u / (1 + 4u) for u = 1, 2/3, 1/3, 0 (Wan2.1, shift 5).
    torch.testing.assert_close(
        table.sigmas, torch.tensor([1, 10 / 11, 5 / 7, 0], dtype=torch.float64), atol=1e-6, rtol=0
    )
    for guidance, result in ((5.0, made), (1.0, single)):
        x = initial_noise((16, 2, 4, 4), 0, 0, torch.zeros(1, dtype=torch.int64))
        for sigma, after in zip(table.sigmas[:-1].tolist(), table.sigmas[1:].tolist(), strict=True):
            t = torch.tensor([1000 * sigma])
            v, v_neg = model(x, t, plain), model(x, t, other)
            x = x + (after - sigma) * (v_neg + guidance * (v - v_neg))
        torch.testing.assert_close(result, (x / 100).clamp(-1, 1), atol=1e-6, rtol=1e-5)

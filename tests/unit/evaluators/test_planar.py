"""The weight-free evaluator on true renders: centimetres, never the target, and honest about bad videos."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracle import OracleEvaluator
from torch import Tensor

from geoalign.config.rewards import RewardConfig
from geoalign.config.world import WorldConfig
from geoalign.errors import ConfigError, RewardError, UsageError
from geoalign.evaluators.planar import PlanarAligner
from geoalign.geometry import so3
from geoalign.jobs.evaluate import second_evaluator
from geoalign.models.codec import PatchCodec
from geoalign.rewards.geometry import GeometryReward, SourceConsistencyReward
from geoalign.rewards.registry import build_evaluator, build_rewards
from geoalign.types import SourceClip
from geoalign.world.pairs import PairedVideos, paired_videos

WORLD = WorldConfig()


@pytest.fixture(scope="module")
def pairs() -> PairedVideos:
    return paired_videos(WORLD, 40, torch.Generator().manual_seed(5), paths="presets", style="real")


def errors(pairs: PairedVideos, video: Tensor, aligner: PlanarAligner | None = None) -> tuple[Tensor, Tensor]:
    estimate = (aligner or PlanarAligner())(video, pairs.batch.source).c2w
    target = pairs.batch.target_camera.c2w
    translation = (estimate[..., :3, 3] - target[..., :3, 3]).norm(dim=-1)[:, 1:]
    return translation, torch.rad2deg(so3.relative_angle(estimate[..., :3, :3], target[..., :3, :3]))[:, 1:]


def test_raw_renders_within_two_centimetres(pairs: PairedVideos) -> None:
    for aligner in (PlanarAligner(), second_evaluator()):
        translation, rotation = errors(pairs, pairs.truth, aligner)
        assert translation.mean() < 0.02 and rotation.mean() < 0.1
        assert translation.max() < 0.1


def test_after_the_codec_within_ten_centimetres(pairs: PairedVideos) -> None:
    codec = PatchCodec(16, 5, 3).fit(pairs.truth)
    translation, rotation = errors(pairs, codec.decode(codec.encode(pairs.truth)))
    assert translation.mean() < 0.10 and rotation.mean() < 0.5


def test_pixel_noise_degrades_gently(pairs: PairedVideos) -> None:
    noise = torch.randn(pairs.truth.shape, generator=torch.Generator().manual_seed(0))
    translation, _ = errors(pairs, pairs.truth + 0.1 * noise)
    assert translation.mean() < 0.10


def test_static_video_scores_as_static(pairs: PairedVideos) -> None:
    still = pairs.truth[:, :1].expand_as(pairs.truth)
    estimate = PlanarAligner()(still, pairs.batch.source).c2w
    assert estimate[..., :3, 3].norm(dim=-1).max() < 0.02  # metres


def test_half_speed_scores_half_the_path() -> None:
    """Rendering each path at half its motion must read as half its length (metric awareness)."""
    full = paired_videos(WORLD, 20, torch.Generator().manual_seed(9), style="real")
    from geoalign.world.pairs import LabelBias

    half = paired_videos(WORLD, 20, torch.Generator().manual_seed(9), style="real", bias=LabelBias((-0.6931472,) * 4))
    lengths = [
        PlanarAligner()(p.truth, p.batch.source).c2w[..., :3, 3].diff(dim=1).norm(dim=-1).sum(1) for p in (full, half)
    ]
    assert torch.allclose(lengths[1] / lengths[0], torch.full((20,), 0.5), atol=0.05)


def test_the_estimate_does_not_depend_on_the_target(pairs: PairedVideos) -> None:
    """The evaluator's interface has no target; here the reward's estimate is shown not to change with it."""
    seen: list[Tensor] = []

    class Spy(PlanarAligner):
        def __call__(self, video: Tensor, source: SourceClip):  # type: ignore[no-untyped-def]
            answer = super().__call__(video, source)
            seen.append(answer.c2w)
            return answer

    reward = GeometryReward(Spy())
    few = pairs.batch.select(range(4))
    reward(pairs.truth[:4], few)
    reward(pairs.truth[:4], type(few)(few.source, few.target_camera.scale_translation(3.0), few.prompts))
    assert torch.equal(seen[0], seen[1])


def test_rewards_prefer_the_honest_render(pairs: PairedVideos) -> None:
    """Frozen, black, noise, reversed and wrong-scale videos all lose against the true render, noise never wins (R4)."""
    reward = GeometryReward(PlanarAligner())
    honest = reward(pairs.truth, pairs.batch)
    noise = torch.randn(pairs.truth.shape, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    frozen = pairs.truth[:, :1].expand_as(pairs.truth)
    cheats = {"frozen": frozen, "black": torch.full_like(pairs.truth, -1.0), "noise": noise}
    cheats["reversed"] = pairs.truth.flip(1)
    for name, video in cheats.items():
        output = reward(video, pairs.batch)
        assert bool(output.valid.all()), name
        if name in ("noise", "black"):  # no camera can be read
            assert bool(output.lost.all() and output.scores["trans"].isnan().all()), name
        else:
            assert not bool(output.lost.any()), name
            assert (honest.scores["trans"] - output.scores["trans"]).mean() > 0.3, name
    assert not bool(honest.lost.any())


def test_reward_by_hand() -> None:
    """Eq. 3 and 4 on three frames with errors 1 m / 0.5 m and 10 / 20 degrees, linear weights 1/6, 2/6, 3/6."""
    c2w = torch.eye(4).repeat(3, 1, 1)
    c2w[1, 0, 3], c2w[2, 1, 3] = 1.0, 0.5
    for frame, degrees in ((1, 10.0), (2, 20.0)):
        c2w[frame, :3, :3] = so3.exp(torch.tensor([0.0, torch.pi * degrees / 180, 0.0]))
    pair = paired_videos(WORLD.model_copy(update={"frames": 3}), 1, torch.Generator().manual_seed(0))
    still = pair.batch.target_camera.scale_translation(0.0).scale_rotation(0.0)
    oracle = OracleEvaluator({pair.names[0]: c2w})
    output = GeometryReward(oracle)(pair.truth, type(pair.batch)(pair.batch.source, still, pair.batch.prompts))
    assert torch.isclose(output.scores["trans"], torch.tensor([-(2 / 6 * 1.0 + 3 / 6 * 0.5)]), atol=1e-6).all()
    expected = -torch.deg2rad(torch.tensor([2 / 6 * 10 + 3 / 6 * 20]))
    assert torch.isclose(output.scores["rot"], expected, atol=1e-5).all()
    assert torch.isclose(output.parts["trans_m"], torch.tensor([0.75])).all()


class TestRegistry:
    def test_shared_evaluator_runs_once_per_batch(self, pairs: PairedVideos) -> None:
        configs = {
            "a": RewardConfig(kind="geometry", options={"evaluator": "planar"}),
            "b": RewardConfig(kind="source_consistency", options={"evaluator": "planar"}),
        }
        rewards = build_rewards(configs)
        assert rewards["a"].evaluator is rewards["b"].evaluator  # type: ignore[attr-defined]
        calls = []
        inner = rewards["a"].evaluator.evaluator  # type: ignore[attr-defined]
        rewards["a"].evaluator.evaluator = lambda *args: calls.append(1) or inner(*args)  # type: ignore[attr-defined]
        few, videos = pairs.batch.select(range(2)), pairs.truth[:2]
        for reward in rewards.values():
            reward(videos, few)
        assert len(calls) == 1
        rewards["a"](videos.clone(), few)  # equal values in another tensor are estimated again
        assert len(calls) == 2

    def test_unknown_names_are_explained(self) -> None:
        with pytest.raises(ConfigError, match="did you mean 'geometry'"):
            build_rewards({"x": RewardConfig(kind="geometri")})
        with pytest.raises(ConfigError, match="unknown option 'wieght'"):
            build_rewards({"x": RewardConfig(kind="geometry", options={"evaluator": "planar", "wieght": 1})})
        with pytest.raises(ConfigError, match="more than one reward"):
            one = RewardConfig(kind="geometry", options={"evaluator": "planar"})
            build_rewards({"x": one, "y": one})
        with pytest.raises(ConfigError, match="unknown pose evaluator"):
            build_evaluator("plannar")

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"translation_bound": "abc"}, r"rewards\.x\.options\.translation_bound: input should be a valid number"),
            ({"temporal_weights": "foo"}, "temporal_weights: input should be 'linear'"),
            ({"evaluator": ["planar"]}, "unknown pose evaluator"),
            ({"evaluator_options": 3}, "evaluator_options: input should be a valid dictionary"),
            (
                {"evaluator_options": {"levels": 3}},
                r"options\.evaluator_options\.levels: input should be a valid tuple",
            ),
            ({"evaluator_options": {"levels": [[4, "x"]]}}, r"levels\[0\]\[1\]: input should be a valid integer"),
            ({"evaluator_options": {"reference": "last"}}, "reference: input should be 'same' or 'first'"),
            ({"evaluator_options": {"stepp": 3}}, "did you mean 'step'"),
            ({"translation_bound": math.nan}, "translation_bound > 0"),
            ({"translation_bound": 0}, "translation_bound > 0"),
            ({"min_tracked": 1.5}, "min_tracked"),
            ({"evaluator_options": {"levels": []}}, "at least 1 iteration"),
            ({"evaluator_options": {"step": 0}}, "step >= 1"),
            ({"evaluator": "flow_pnp", "evaluator_options": {"ransac_px": 0.0}}, "ransac_px must be positive"),
        ],
    )
    def test_wrong_values_are_refused_at_building_time(self, options: dict[str, Any], text: str) -> None:
        """In a run they would fail inside the guard, and every sample would leave as invalid."""
        with pytest.raises(UsageError, match=text):
            build_rewards({"x": RewardConfig(kind="geometry", options={"evaluator": "planar"} | options)})

    def test_values_arrive_as_the_declared_types(self) -> None:
        options = {"evaluator": "planar", "translation_bound": 2, "evaluator_options": {"levels": [[4, 2]]}}
        reward: Any = build_rewards({"x": RewardConfig(kind="geometry", options=options)})["x"]
        assert isinstance(reward.translation_bound, float)
        assert reward.evaluator.evaluator.levels == ((4.0, 2),)

    def test_planar_needs_the_plane(self, pairs: PairedVideos) -> None:
        source = pairs.batch.source
        bare = SourceClip(source.video, source.camera, None, source.clip_ids)
        with pytest.raises(UsageError, match="ground plane"):
            PlanarAligner()(pairs.truth, bare)


def test_consistency_prefers_sharp_copies(pairs: PairedVideos) -> None:
    reward = SourceConsistencyReward(PlanarAligner())
    blurred = torch.nn.functional.avg_pool2d(pairs.truth.flatten(0, 1), 9, 1, 4).unflatten(0, pairs.truth.shape[:2])
    sharp = reward(pairs.truth, pairs.batch).scores["consistency"]
    assert (sharp > reward(blurred, pairs.batch).scores["consistency"]).all()


def test_heavy_scorers_name_what_they_need() -> None:
    with pytest.raises(ConfigError, match="needs checkpoint"):
        build_evaluator("mapanything")
    with pytest.raises(ConfigError, match="needs checkpoint, tokenizer"):
        build_rewards({"x": RewardConfig(kind="hpsv3")})
    with pytest.raises(RewardError, match="nowhere"):
        build_evaluator("mapanything", checkpoint="nowhere")

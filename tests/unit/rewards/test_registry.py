"""From configuration to scores: guards, time-outs, worker processes, and what is refused before anything runs."""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from patience import PATIENCE_S
from reward_cases import score_videos
from torch import Tensor

from geoalign.cli import doctor
from geoalign.config.load import load_config
from geoalign.config.rewards import FailureConfig, RewardConfig
from geoalign.config.schema import Config
from geoalign.config.world import WorldConfig
from geoalign.errors import ConfigError, RewardError, UsageError
from geoalign.rewards import registry
from geoalign.rewards.base import RewardOutput
from geoalign.rewards.registry import build_rewards
from geoalign.rewards.running.guard import GuardedReward
from geoalign.rewards.running.worker import WorkerReward
from geoalign.rewards.vlm import templates
from geoalign.types import RetakeBatch, SourceClip
from geoalign.world.pairs import PairedVideos, paired_videos

GEOMETRY = RewardConfig(kind="geometry", options={"evaluator": "planar"})
BAD = 0.75  # the pixel value of a video that the stand-in cannot score
# One thread, as in the tests' own process: sums in another order would differ in the last bit.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


class Fragile:
    """Mean pixel; raises or hangs when a video of the batch starts with the bad value."""

    name, keys = "fragile", ("mean",)
    release = threading.Event()

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def __call__(self, videos: Tensor, batch: RetakeBatch) -> RewardOutput:
        if (videos.flatten(1)[:, 0] == BAD).any():
            if self.fault == "usage":
                raise UsageError("wrong set-up")
            if self.fault == "hang":
                Fragile.release.wait(PATIENCE_S)
            raise RuntimeError("cannot score this")
        return RewardOutput({"mean": videos.flatten(1).mean(1)}, torch.ones(len(videos), dtype=torch.bool))


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(registry.REWARDS, "fragile", f"{__name__}:Fragile")
    Fragile.release.clear()
    yield
    Fragile.release.set()


@pytest.fixture(scope="module")
def pairs() -> PairedVideos:
    return paired_videos(WorldConfig(), 4, torch.Generator().manual_seed(5), paths="presets", style="real")


def damaged(pairs: PairedVideos, index: int = 1) -> Tensor:
    videos = pairs.truth.clone()
    videos[index] = BAD
    return videos


def fragile(fault: str) -> RewardConfig:
    return RewardConfig(kind="fragile", options={"fault": fault})


def test_the_default_guard_changes_no_bit_and_starts_no_thread(
    pairs: PairedVideos, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = {"geometry": GEOMETRY, "consistency": GEOMETRY.model_copy(update={"kind": "source_consistency"})}
    plain = score_videos(build_rewards(configs), pairs.truth, pairs.batch)
    guarded = build_rewards(configs, FailureConfig())
    monkeypatch.setattr(threading.Thread, "start", lambda self: pytest.fail("a thread was started"))
    found = score_videos(guarded, pairs.truth, pairs.batch)
    assert all(isinstance(reward, GuardedReward) for reward in guarded.values())
    for group in ("scores", "parts", "diagnostics"):
        expected, given = getattr(plain, group), getattr(found, group)
        assert list(given) == list(expected) and all(torch.equal(given[key], expected[key]) for key in expected)
    assert found.valid.all() and found.failures == {"policy": 0, "geometry": 0, "consistency": 0}


def test_one_bad_video_is_counted_once_and_singled_out(pairs: PairedVideos) -> None:
    configs = {"fragile": fragile("raise"), "geometry": GEOMETRY}
    rewards = build_rewards(configs, FailureConfig(retries=2))
    found = score_videos(rewards, damaged(pairs), pairs.batch)
    assert found.failures == {"policy": 0, "fragile": 1, "geometry": 0}
    assert found.valid.tolist() == [True, False, True, True]
    good = found.valid
    assert torch.equal(found.scores["mean"][good], damaged(pairs)[good].flatten(1).mean(1))
    counts = rewards["fragile"].counts
    assert (counts.retries, counts.invalid, counts.errors) == (2, 1, {"RuntimeError": 4})  # 3 batches, 1 alone
    unguarded = score_videos(build_rewards(configs), damaged(pairs), pairs.batch)
    assert unguarded.failures["fragile"] == 4  # without a guard the whole batch is lost


def test_a_hanging_scorer_costs_its_own_samples_and_the_time_out(pairs: PairedVideos) -> None:
    configs = {"fragile": fragile("hang"), "geometry": GEOMETRY}
    rewards = build_rewards({"fragile": configs["fragile"]}, FailureConfig(timeout_s=0.2))
    rewards |= build_rewards({"geometry": configs["geometry"]}, FailureConfig())
    found = score_videos(rewards, damaged(pairs), pairs.batch)
    assert found.failures == {"policy": 0, "fragile": 4, "geometry": 0} and not found.valid.any()
    assert rewards["fragile"].counts.timeouts == 1 and rewards["fragile"].counts.retries == 0


def test_wrong_set_up_is_raised_not_masked(pairs: PairedVideos) -> None:
    rewards = build_rewards({"fragile": fragile("usage")}, FailureConfig(retries=3))
    with pytest.raises(UsageError, match="wrong set-up"):
        score_videos(rewards, damaged(pairs), pairs.batch)


def test_a_worker_gives_equal_scores_and_raises_usage_errors(pairs: PairedVideos) -> None:
    worker = GEOMETRY.model_copy(update={"placement": "worker", "environment": ONE_THREAD})
    rewards = build_rewards({"geometry": worker}, FailureConfig(timeout_s=PATIENCE_S))
    inside = rewards["geometry"].reward
    assert isinstance(inside, WorkerReward) and inside.timeout_s == PATIENCE_S and inside.starts == 1
    try:
        assert rewards["geometry"].keys == ("rot", "trans")
        expected = score_videos(build_rewards({"geometry": GEOMETRY}), pairs.truth, pairs.batch)
        found = score_videos(rewards, pairs.truth, pairs.batch)
        for group in ("scores", "parts", "diagnostics"):
            assert all(torch.equal(getattr(found, group)[k], v) for k, v in getattr(expected, group).items())
        assert found.failures == {"policy": 0, "geometry": 0}
        source = pairs.batch.source
        bare = SourceClip(source.video, source.camera, None, source.clip_ids)
        with pytest.raises(UsageError, match="ground plane"):
            rewards["geometry"](pairs.truth, RetakeBatch(bare, pairs.batch.target_camera, pairs.batch.prompts))
        assert inside._process is not None
        inside._process.kill()  # a crash between two batches is repaired
        assert rewards["geometry"](pairs.truth, pairs.batch).valid.all() and inside.starts == 2
    finally:
        inside.close()


def test_a_worker_that_cannot_be_built_says_so_before_the_run(tmp_path: Path) -> None:
    options = {"checkpoint": "x", "tokenizer": "y", "template_folder": str(tmp_path)}
    config = RewardConfig(kind="hpsv3", options=options, placement="worker")
    with pytest.raises(RewardError, match=r"worker of reward hps: RewardError: prompt template .* doctor"):
        build_rewards({"hps": config}, FailureConfig())
    with pytest.raises(RewardError, match="no-such-python cannot be started"):
        build_rewards({"hps": config.model_copy(update={"python": "no-such-python"})}, FailureConfig())
    for wrong, text in (
        ({"checkpoimt": "x"}, "unknown option 'checkpoimt'"),
        (options | {"best_share": "most"}, "best_share: input should be a valid number"),
        (options | {"evaluator_options": {}}, "unknown option 'evaluator_options'"),
    ):
        with pytest.raises(ConfigError, match=text):  # found without starting a process
            build_rewards({"hps": config.model_copy(update={"options": wrong})}, FailureConfig())


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="placement to worker"):
        load_config(Config, "tiny_cpu", ["rewards.geometry.python=python3"])
    placed = load_config(Config, "tiny_cpu", ["rewards.geometry.placement=worker", f"failures.timeout_s={PATIENCE_S}"])
    assert placed.rewards["geometry"].placement == "worker" and placed.failures.timeout_s == PATIENCE_S
    config = RewardConfig(kind="source_consistency", options={"evaluator": "mapanything"})
    with pytest.raises(ConfigError, match=r"measures no residual.*use one of: flow_pnp, planar"):
        build_rewards({"consistency": config})


def test_doctor_fetches_templates(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    doctor.add_parser(parser.add_subparsers(), "")
    monkeypatch.setattr(templates, "fetch", lambda: {"videoalign": Path("/somewhere/videoalign.txt")})
    for flags, read in (([], str.split), (["--json", "-"], lambda text: list(*json.loads(text).items()))):
        args = parser.parse_args(["doctor", "--fetch-rewards", *flags])
        assert args.run(args) == 0
        assert read(capsys.readouterr().out) == ["videoalign", "/somewhere/videoalign.txt"]

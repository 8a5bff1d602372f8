"""Held-out numbers: of which videos and noise seeds a mean is taken, and what a summary makes of earlier runs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from geoalign.config.load import load_config
from geoalign.config.schema import Config
from geoalign.evaluators.base import PoseEstimate
from geoalign.geometry import metrics
from geoalign.jobs import evaluate as job
from geoalign.jobs.train_held_out import held_out_summary
from geoalign.policy.open import open_policy
from geoalign.types import SourceClip


class Told:
    """Answers with the poses it was told, on frames 0, 2 and 4."""

    name = "told"

    def __init__(self, c2w: Tensor) -> None:
        self.c2w, self.indices = c2w[:, [0, 2, 4]], torch.tensor([0, 2, 4])

    def __call__(self, video: Tensor, source: SourceClip) -> PoseEstimate:
        ones = torch.ones(len(video))
        return PoseEstimate(self.c2w, self.indices, ones, 0 * ones)


def test_errors_of_a_subset_of_frames_are_means_over_the_defined_videos() -> None:
    overrides = ["eval.samples=3", "eval.noise_seeds=[5]", "flow.steps=4"]
    config = load_config(Config, "smoke", overrides)
    held_out = job.HeldOut.build(config)
    pairs = held_out.sets["presets"]
    target = pairs.batch.target_camera
    estimate = target.scale_translation(torch.tensor([2.0, 5.0, 1.0])).c2w.clone()
    estimate[2] = math.nan
    policy = open_policy("builtin:tiny_base")
    evaluator = Told(estimate)
    result = job.evaluate(policy, config, job.HeldOut({"presets": pairs}), evaluator)
    numbers = {name: values[0] for name, values in result.numbers["presets"].items()}
    length = target.position[:2, [2, 4]].norm(dim=-1).mean(-1)
    # Twice and five times the motion lie one and four lengths behind the target; 5 x some 3 m is beyond 3 m.
    assert numbers["translation_error_m"] == pytest.approx(float((length * torch.tensor([1.0, 4.0])).mean()), rel=1e-5)
    assert numbers["scale_ratio"] == pytest.approx(3.5, rel=1e-5) == numbers["translation_gain"]
    assert numbers["rotation_error_deg"] == pytest.approx(0, abs=1e-3) == numbers["rot_err_deg"]
    assert numbers["trans_err"] == pytest.approx(0, abs=1e-5)
    # At the end of the clip the two readable videos are one and four times their reach off.
    late = (target.position[:2, 4].norm(dim=-1) * torch.tensor([1.0, 4.0])).mean()
    assert numbers["last_translation_error_m"] == pytest.approx(float(late), rel=1e-5)
    assert numbers["last_rotation_error_deg"] == pytest.approx(0, abs=1e-3)
    seconds = {f"second_{name}" for name in metrics.CAMERA_METRICS[:4]}
    assert numbers.keys() == set(job.METRICS) | seconds and set(job.METRICS) >= set(metrics.CAMERA_METRICS)


def test_the_sampler_of_an_evaluation_is_not_the_tail_of_training() -> None:
    """A run that trains with a coarse second-order tail is measured by the same Euler steps as the exact run."""
    policy = open_policy("builtin:tiny_base")

    def measured(*tail: str) -> Tensor:
        config = load_config(Config, "smoke", ["eval.samples=2", "eval.noise_seeds=[5]", "flow.steps=5", *tail])
        held_out = job.HeldOut({"presets": job.HeldOut.build(config).sets["presets"]})
        return job.evaluate(policy, config, held_out).videos["presets"]

    exact = measured()
    assert torch.equal(measured("flow.tail_solver=dpm2m", "flow.tail_ratio=0.4"), exact)
    assert not torch.equal(measured("flow.steps=4"), exact)


def test_the_picture_is_judged_along_its_own_camera() -> None:
    """A true render along a wrong path: far from the truth, perfect along its own camera; a flat one is flat."""
    config = load_config(Config, "smoke", ["eval.samples=4"])
    pairs = job.HeldOut.build(config).sets["presets"]
    asked = job.scaled_request(pairs.batch, torch.tensor([0.5, 0.5, 0.5, 0.5])).target_camera.c2w
    frames, tracked = torch.arange(5), torch.tensor([1.0, 0.5, 0.5, 0.0])
    estimate = PoseEstimate(asked, frames, tracked, 0 * tracked)
    energy = float(job._gradient_energy(pairs.truth[:, 1:]).mean())

    def judged(video: Tensor) -> dict[str, float]:
        found = job._picture_quality(video, estimate, pairs, energy)
        return {name: float(values.mean()) for name, values in found.items()}

    found = judged(pairs.along(asked))
    assert found["own_camera_psnr_db"] == pytest.approx(10 * math.log10(4e12))  # errors below 1e-12 count as that
    assert found["psnr_db"] < 35 and found["explained_share"] == 0.5
    assert 0.8 < found["gradient_energy"] < 1.25  # another view of the same map
    assert (
        judged(pairs.truth)["gradient_energy"] == pytest.approx(1) and judged(0 * pairs.truth)["gradient_energy"] == 0
    )


def test_an_oracle_changes_what_is_asked_and_not_what_is_measured() -> None:
    config = load_config(Config, "smoke", ["eval.samples=2"])
    batch = job.HeldOut.build(config).sets["random"].batch
    camera, plane = batch.target_camera, batch.source.ground_plane
    assert plane is not None
    half = job.scaled_request(batch, 0.5).target_camera
    assert torch.allclose(half.position, 0.5 * camera.position) and torch.equal(half.rotation, camera.rotation)
    per_axis = job.scaled_request(batch, torch.tensor([2.0, 0.5, 1.0, 0.25])).target_camera
    gains = metrics.axis_gains(per_axis.c2w, camera.c2w, plane)
    assert torch.allclose(gains, torch.tensor([2.0, 0.5, 1.0, 0.25], dtype=torch.float64), atol=1e-5)
    by_frame = torch.ones(5, 4)
    by_frame[3] = 2.0
    moved = job.scaled_request(batch, by_frame).target_camera
    assert torch.allclose(moved.position[:, 3], 2 * camera.position[:, 3], atol=1e-5)
    assert torch.allclose(moved.c2w[:, [0, 1, 2, 4]], camera.c2w[:, [0, 1, 2, 4]], atol=1e-6)


def test_a_summary_averages_what_is_defined() -> None:
    """Two noise seeds; in the second, ``random`` has no scale (None in a checkpoint)."""
    before = {kind: {"translation_gain": [1.0, 2.0]} for kind in ("presets", "random")}
    after = {"presets": {"translation_gain": [1.0, 2.0]}, "random": {"translation_gain": [3.0, None]}}
    found = held_out_summary({"before": before}, after)
    assert found["held_out_per_noise_seed"]["mean"]["after"] == {"translation_gain": [2.0, 2.0]}
    assert {kind: stages["after"]["translation_gain"] for kind, stages in found["held_out"].items()} == {
        "presets": 1.5,
        "random": 3.0,
        "mean": 2.0,
    }
    nothing = held_out_summary({}, {"presets": {"trans_err": [None, math.nan]}})
    assert math.isnan(nothing["held_out"]["presets"]["after"]["trans_err"])


def test_a_run_that_began_with_the_old_name_compares_gain_with_gain() -> None:
    found = held_out_summary(
        {"before": {"presets": {"scale_ratio": [1.4], "second_scale_ratio": [1.3]}}},
        {"presets": {"scale_ratio": [1.1], "translation_gain": [1.0], "second_translation_gain": [0.9]}},
    )["held_out"]["presets"]
    assert found["before"] == {"translation_gain": 1.4, "second_translation_gain": 1.3}
    assert found["after"] == {"scale_ratio": 1.1, "translation_gain": 1.0, "second_translation_gain": 0.9}

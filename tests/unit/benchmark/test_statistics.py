"""Intervals, tests and camera errors against scipy and against what is written down here by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial.transform import Rotation

from geoalign.benchmark.measure import PUBLISHED_TRANS_ERR, camera_reading
from geoalign.benchmark.statistics import difference, estimate, paired_p
from geoalign.geometry import so3
from geoalign.geometry.presets import PRESETS, preset
from geoalign.geometry.trajectory import CameraTrajectory


def made_up(seed: int, clips: int, cases: int) -> dict[tuple[str, str], float]:
    draw = np.random.default_rng(seed)
    return {
        (f"clip{c}", f"clip{c}_{i}"): float(draw.normal(c * 0.1, 1)) for c in range(clips) for i in range(cases + c % 2)
    }


def test_the_interval_resamples_clips_as_scipy_does() -> None:
    """Clips of 4 and 5 cases; scipy's own resampler over the clips' numbers, the mean written here."""
    values = made_up(0, 9, 4)
    found = estimate(values, 4000)
    groups = [[v for (clip, _), v in values.items() if clip == f"clip{c}"] for c in range(9)]
    assert found.mean == pytest.approx(np.mean(list(values.values())), abs=1e-12)
    assert (found.cases, found.clips) == (len(values), 9)
    reference = stats.bootstrap(
        (np.arange(9),), lambda picked: np.mean(np.concatenate([groups[int(c)] for c in picked])), vectorized=False,
        n_resamples=4000, method="percentile", rng=np.random.default_rng(5),
    ).confidence_interval  # fmt: skip
    # Two sets of 4,000 resamples: an end of the interval is a quantile at 2.5 %, whose standard error is about
    # sqrt(0.025 * 0.975 / 4000) / density = 0.0025 / (0.058 / sd) = 0.043 sd; four of them, twice.
    spread = 8 * 0.043 * (reference.high - reference.low) / 3.92
    assert found.low == pytest.approx(reference.low, abs=spread)
    assert found.high == pytest.approx(reference.high, abs=spread)
    assert estimate(values, 4000) == found


def test_fewer_than_two_clips_have_a_mean_and_no_interval() -> None:
    one = estimate({("a", "1"): 2.0, ("a", "2"): 4.0, ("a", "3"): math.nan}, 100)
    assert (one.mean, one.cases, one.clips) == (3.0, 2, 1) and math.isnan(one.low) and math.isnan(one.high)
    none = estimate({("a", "1"): math.nan}, 100)
    assert math.isnan(none.mean) and none.cases == 0


def test_the_paired_test_is_scipys_over_clip_means_and_counts_what_is_lost() -> None:
    base, method = made_up(1, 8, 3), {key: value + 0.4 for key, value in made_up(2, 8, 3).items()}
    keys = list(base)
    base[keys[0]] = math.nan  # failed for one, for the other, and for both
    method[keys[4]] = math.nan
    base[keys[9]] = method[keys[9]] = math.nan
    found = difference(method, base, 500)
    kept = [key for key in keys if math.isfinite(base[key] + method[key])]
    means = [
        np.mean([method[key] - base[key] for key in kept if key[0] == clip])
        for clip in sorted({key[0] for key in kept})
    ]
    assert found.lost == 3 and found.estimate.cases == len(keys) - 3
    assert found.p == stats.wilcoxon(means).pvalue
    assert found.estimate.mean == pytest.approx(np.mean([method[key] - base[key] for key in kept]), abs=1e-12)
    # By hand: five differences of one sign, of which one of the 2^5 sign patterns is as extreme on either side.
    assert paired_p([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 32)
    assert math.isnan(paired_p([0.0, 0.0, 0.0])) and math.isnan(paired_p([1.0]))


def public_scores(estimated: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """RotErr and TransErr from their definitions: loops over pairs, and scipy's rotation fit for the Sim(3)."""
    frames = len(wanted)
    angles = []
    for i in range(frames):
        for j in range(frames):
            if i != j:
                ours = Rotation.from_matrix(estimated[i, :3, :3].T @ estimated[j, :3, :3])
                true = Rotation.from_matrix(wanted[i, :3, :3].T @ wanted[j, :3, :3])
                angles.append((ours.inv() * true).magnitude())
    p, t = estimated[:, :3, 3], wanted[:, :3, 3]
    a, b = p - p.mean(0), t - t.mean(0)
    turn, _ = Rotation.align_vectors(b, a)
    scale = (b * turn.apply(a)).sum() / (a**2).sum()
    residual = np.linalg.norm(scale * turn.apply(a) - b, axis=-1).mean()
    extent = max(np.linalg.norm(x - y) for x in t for y in t)
    return math.degrees(np.mean(angles)), residual / (extent + 1e-6)


def jittered(path: CameraTrajectory, seed: int, size: float) -> CameraTrajectory:
    generator = torch.Generator().manual_seed(seed)
    twist = size * torch.randn(path.num_frames, 6, dtype=torch.float64, generator=generator)
    return CameraTrajectory.build(path.c2w.double() @ so3.se3_exp(twist))


@pytest.mark.parametrize("name", [*PRESETS, "random"])
def test_roterr_and_transerr_are_the_published_ones(name: str) -> None:
    if name == "random":
        twist = torch.randn(9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        wanted = CameraTrajectory.build(so3.se3_exp(twist))
    else:
        wanted = preset(name, 9, speed=4.0, dtype=torch.float64)
    found = jittered(wanted, 1, 0.05)
    reading = camera_reading(found.c2w, torch.arange(9), wanted)
    rotation, translation = public_scores(found.c2w.numpy(), wanted.c2w.numpy())
    assert reading.status == "ok"
    # float64 throughout: arccos near 1 loses half the digits of an angle of 0.1, 1e-8; in degrees 6e-7.
    assert reading.metrics["rot_err_deg"] == pytest.approx(rotation, abs=1e-6)
    if "pan" in name or "tilt" in name:
        # The fit scales every path onto a point, so this is 0 whatever the camera did: no number of ours shows it.
        assert reading.metrics[PUBLISHED_TRANS_ERR] == pytest.approx(0, abs=1e-6)
        assert math.isnan(reading.metrics["trans_err"])
    else:
        assert reading.metrics[PUBLISHED_TRANS_ERR] == pytest.approx(translation, abs=1e-7)
    distance = np.linalg.norm(
        (np.linalg.inv(found.c2w[0]) @ found.c2w.numpy())[:, :3, 3]
        - (np.linalg.inv(wanted.c2w[0]) @ wanted.c2w.numpy())[:, :3, 3],
        axis=-1,
    )
    assert reading.by_frame["position_m"] == pytest.approx(distance, abs=1e-9)
    assert reading.metrics["translation_error_m"] == pytest.approx(distance[1:].mean(), abs=1e-9)


def test_a_subset_of_frames_is_compared_with_those_frames() -> None:
    wanted = preset("zoom_in", 9, dtype=torch.float64)
    frames = torch.tensor([0, 4, 8])
    twice = wanted.scale_translation(2.0).c2w[frames]
    reading = camera_reading(twice, frames, wanted)
    assert reading.status == "ok" and reading.by_frame["frames"] == [0, 4, 8]
    assert reading.metrics["scale_ratio"] == pytest.approx(2.0) == reading.metrics["translation_gain"]
    assert reading.by_frame["position_m"] == pytest.approx(wanted.position[frames].norm(dim=-1).tolist(), abs=1e-12)


def test_a_camera_that_was_lost_is_a_failure_and_a_still_one_that_was_asked_for_is_not() -> None:
    wanted, still = preset("pan_right", 5, dtype=torch.float64), torch.eye(4, dtype=torch.float64).repeat(5, 1, 1)
    lost = camera_reading(still, torch.arange(5), wanted)
    assert lost.status == "failed" and "the same pose for every frame" in lost.cause
    assert camera_reading(still, torch.arange(5), CameraTrajectory.build(still)).status == "ok"
    broken = camera_reading(still * math.nan, torch.arange(5), wanted)
    assert broken.status == "failed" and "not finite" in broken.cause

"""Speed rescaling: the truncated Gaussian against scipy, peak speeds per mode, unwrapping and every guard."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from geoalign.errors import ConfigError, DataError
from geoalign.geometry import so3
from geoalign.geometry.rescale import (
    RescaleSettings,
    SpeedLaw,
    rescale,
    truncated_gaussian,
    unwrap_rotations,
    yaw_span_deg,
)
from geoalign.geometry.trajectory import DEFAULT_INTRINSICS, CameraTrajectory

LAWS = ((1.0, 0.4, 0.2, 1.6), (12.0, 6.0, 2.0, 30.0), (0.0, 1.0, 2.5, 9.0), (0.0, 1.0, -9.0, -2.5))


@pytest.mark.parametrize("law", LAWS)
def test_truncated_gaussian_equals_scipy(law: tuple[float, ...]) -> None:
    mean, std, low, high = law
    oracle = stats.truncnorm((low - mean) / std, (high - mean) / std, loc=mean, scale=std)
    u = (np.arange(2000) + 0.5) / 2000
    tau = truncated_gaussian(u, *law)
    assert np.abs(tau - oracle.ppf(u)).max() < 1e-9 * max(abs(high), abs(low))
    draws = truncated_gaussian(np.random.default_rng(7).random(4000), *law)
    # Kolmogorov's test at a fixed seed; p is uniform under the hypothesis, so 0.01 fails only for a wrong law.
    assert stats.kstest(draws, oracle.cdf).pvalue > 0.01


def test_truncated_gaussian_far_in_the_tails_and_at_the_edges() -> None:
    u = np.linspace(0, 1, 101)
    for low, high in ((40.0, 41.0), (1000.0, 1001.0), (-41.0, -40.0)):
        tau = truncated_gaussian(u, 0.0, 1.0, low, high)
        assert np.isfinite(tau).all() and (np.diff(tau) >= 0).all()
        assert tau.min() >= low and tau.max() <= high
        # The inverse works on log p of size x^2 / 2, whose rounding moves x by a relative 1e-12 at most.
        assert abs(tau[0] - low) < 1e-11 * abs(low) and abs(tau[-1] - high) < 1e-11 * abs(high)
    # The tail beyond a is nearly exponential with rate a: the median lies ln 2 / a above it (to order 1/a^3).
    assert abs(truncated_gaussian(0.5, 0.0, 1.0, 40.0, 50.0) - 40 - math.log(2) / 40) < 2 / 40**3
    assert truncated_gaussian(0.3, 5.0, 0.0, 0.0, 1.0) == 1 and truncated_gaussian(0.3, 5.0, 1.0, 2.0, 2.0) == 2
    with pytest.raises(ConfigError):
        truncated_gaussian(0.5, 0.0, 1.0, 2.0, 1.0)
    with pytest.raises(ConfigError):
        truncated_gaussian(0.5, 0.0, -1.0, 0.0, 1.0)


def path(rotvec: torch.Tensor, step: torch.Tensor) -> CameraTrajectory:
    lens = torch.tensor(DEFAULT_INTRINSICS, dtype=torch.float64).expand(len(step) + 1, 4)
    return CameraTrajectory.from_increments(rotvec.double(), step.double(), lens)


def walk(yaw_deg: float = 40.0, frames: int = 81, unit: float = 7.0) -> CameraTrajectory:
    """A walk forward that turns by ``yaw_deg`` in all, in an arbitrary unit."""
    rotvec = torch.tensor([0.0, math.radians(yaw_deg) / (frames - 1), 0.0]).expand(frames - 1, 3)
    return path(rotvec, torch.tensor([0.0, 0.0, unit]).expand(frames - 1, 3))


def game_window(seed: int, frames: int = 81) -> CameraTrajectory:
    """Smooth, yaw-dominated motion as in games: a random-walk yaw rate with a little pitch and roll."""
    generator = np.random.default_rng(seed)
    smooth = np.exp(-0.5 * (np.arange(-20, 21) / 8) ** 2)
    noise = generator.normal(size=(frames + 80, 3))
    rate = np.stack([np.convolve(noise[:, k], smooth / np.linalg.norm(smooth), "valid") for k in range(3)], -1)
    rate = rate[: frames - 1] * np.radians([0.25, 1.6, 0.05]) + np.radians([0.0, generator.normal() * 0.8, 0.0])
    step = 0.05 * np.stack([0.2 * rate[:, 1], 0.1 * rate[:, 0], 1 + 0.2 * rate[:, 2]], -1)
    return path(torch.from_numpy(rate), torch.from_numpy(step))


LOOSE = {"max_yaw_deg": 1e9, "max_path_m": 1e9}


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_speeds_equal_tau_after_rescaling(seed: int, u: float, v: float) -> None:
    for mode in ("unwrapped", "egocentric"):
        result = rescale(game_window(seed), (u, v), RescaleSettings(mode=mode, **LOOSE))  # type: ignore[arg-type]
        assert abs(result.peak_translation / result.tau_translation - 1) < 1e-9
        if "rotation_cap" not in result.adjusted and "speed" not in result.rejected:
            assert abs(result.peak_rotation / result.tau_rotation - 1) <= 0.02
        gram = so3.matmul(result.trajectory.rotation.mT, result.trajectory.rotation)
        assert (gram - torch.eye(3, dtype=torch.float64)).abs().max() < 1e-9


def test_unwrapping_keeps_simulated_game_windows_below_the_bound() -> None:
    crossed, rejected, literal_jumps = 0, 0, 0
    uniforms = np.random.default_rng(0).random((150, 2))
    for seed in range(150):
        window = game_window(seed)
        crosses = bool((unwrap_rotations(window.rotation).norm(dim=-1) > math.pi).any())
        crossed += crosses
        result = rescale(window, uniforms[seed], RescaleSettings(**LOOSE))
        bad = bool({"speed", "full_turn"} & set(result.rejected))
        rejected += bad
        assert bad or result.peak_rotation <= 1.02 * result.tau_rotation
        literal = rescale(window, uniforms[seed], RescaleSettings(mode="paper", **LOOSE))
        literal_jumps += literal.peak_rotation > 2 * literal.tau_rotation
        if not crosses:
            assert literal.peak_rotation <= 1.571 * literal.tau_rotation  # supremum pi/2 of the scaled geodesic
    # The simulation must exercise what it is for, and rejections stay rare exceptions.
    assert crossed >= 5 and literal_jumps >= 3
    assert rejected <= crossed // 2


def test_modes_agree_on_a_turn_about_one_axis_and_literal_jumps_past_180() -> None:
    results = {mode: rescale(walk(), (0.5, 0.5), RescaleSettings(mode=mode)) for mode in ("paper", "unwrapped")}  # type: ignore[arg-type]
    assert torch.allclose(results["paper"].trajectory.c2w, results["unwrapped"].trajectory.c2w, atol=1e-9)
    egocentric = rescale(walk(), (0.5, 0.5), RescaleSettings(mode="egocentric"))
    assert torch.allclose(egocentric.trajectory.rotation, results["paper"].trajectory.rotation, atol=1e-9)
    spin = walk(yaw_deg=240.0)
    assert rescale(spin, (0.5, 0.3), RescaleSettings(mode="unwrapped")).peak_rotation < 1.0001 * 12
    assert rescale(spin, (0.5, 0.3), RescaleSettings(mode="paper")).peak_rotation > 100


def test_egocentric_motion_stays_aligned_with_the_view() -> None:
    result = rescale(walk(90.0), (0.5, 0.1), RescaleSettings(mode="egocentric"))
    _, step = result.trajectory.increments()
    assert (step[:, :2].abs().max() < 1e-12) and (step[:, 2] > 0).all()
    crab = rescale(walk(90.0), (0.5, 0.1), RescaleSettings(mode="unwrapped")).trajectory.increments()[1]
    assert crab[-1, 0].abs() > 0.1 * crab[-1].norm()


def test_unwrapped_vectors_continue_past_pi() -> None:
    vectors = unwrap_rotations(walk(500.0).rotation)
    expected = torch.linspace(0, math.radians(500), 81, dtype=torch.float64)
    assert torch.allclose(vectors[:, 1], expected, atol=1e-6)
    assert abs(yaw_span_deg(walk(500.0)) - 500) < 1e-5  # steps are written in float32


def test_units_are_metres_and_degrees_per_second_at_the_stated_rate() -> None:
    settings = RescaleSettings(fps=10.0, translation=SpeedLaw(0.5, 0, 0, 9), rotation=SpeedLaw(6.0, 0, 0, 90))
    result = rescale(walk(), (0.5, 0.5), settings)
    rotvec, step = result.trajectory.increments()
    assert torch.allclose(step.norm(dim=-1), torch.tensor(0.05, dtype=torch.float64))
    assert torch.allclose(torch.rad2deg(rotvec.norm(dim=-1)), torch.tensor(0.6, dtype=torch.float64))
    assert result.accepted and abs(result.path_m - 4) < 1e-9 and abs(result.yaw_deg - 48) < 1e-6


def test_the_unit_of_the_input_does_not_matter() -> None:
    a, b = (rescale(walk(unit=unit), (0.2, 0.7), RescaleSettings()) for unit in (1e-7, 1e4))
    assert torch.allclose(a.trajectory.c2w, b.trajectory.c2w, atol=1e-9)


def jittered() -> CameraTrajectory:
    """A tripod with independent position noise: steps reverse instead of flowing."""
    position = 1e-4 * torch.randn(81, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rotation = walk(0.4).rotation
    return CameraTrajectory.build(so3.rigid(rotation, position))


def with_step(rotation_deg: float = 0.0, metres: float = 0.0) -> CameraTrajectory:
    rotvec, step = walk(frames=81).increments()
    rotvec[40, 1] += math.radians(rotation_deg)
    step[40, 2] += metres
    return path(rotvec, step)


@pytest.mark.parametrize(
    ("window", "adjusted", "rejected"),
    [
        (walk(40.0), (), ()),
        (walk(0.0), ("static_rotation",), ()),
        (walk(4.0), ("rotation_cap",), ()),
        (jittered(), ("static_rotation", "static_translation"), ()),
        (CameraTrajectory.identity(81), ("static_rotation", "static_translation"), ()),
        (with_step(metres=80.0), (), ("outlier_translation",)),
        (with_step(rotation_deg=6.0), (), ("outlier_rotation",)),
        (with_step(rotation_deg=30.0), (), ("outlier_rotation", "raw_step")),
    ],
)
def test_guards(window: CameraTrajectory, adjusted: tuple[str, ...], rejected: tuple[str, ...]) -> None:
    result = rescale(window, (0.3, 0.5), RescaleSettings())
    assert result.adjusted == adjusted and result.rejected == rejected
    if "static_translation" in adjusted:
        assert result.path_m == 0 and result.scale_translation == 0


@settings(max_examples=60)
@given(
    st.sampled_from(("paper", "unwrapped", "egocentric")),
    st.sampled_from((0.0, 1e-300, 0.02)),
    st.sampled_from((0.0, 1e-12, 0.5, 90.0, 360.0)),
    st.sampled_from((0.0, 1e-12, 1.0)),
    st.sampled_from((0.0, 1e-9, 12.0, 16 * 180.0, 16 * 360.0)),
)
def test_no_bound_divides_by_zero(mode: str, static: float, turn: float, unit: float, tau: float) -> None:
    """Whatever is 0, or a whole turn a frame: a path that does not turn is kept as it is, all numbers are finite."""
    law = RescaleSettings(mode=mode, static_rotation_deg=static, rotation=SpeedLaw(tau, 0, tau, tau))  # type: ignore[arg-type]
    result = rescale(walk(turn, unit=unit), (0.3, 0.5), law)
    found = (result.scale_translation, result.scale_rotation, result.peak_rotation, result.path_m, result.yaw_deg)
    assert all(map(math.isfinite, found)) and bool(result.trajectory.c2w.isfinite().all())
    if turn == 0:
        assert "static_rotation" in result.adjusted and result.scale_rotation == 1
    if result.accepted and mode != "paper" and not result.adjusted:
        assert abs(result.peak_rotation - tau) <= 0.02 * tau


def test_distance_guards() -> None:
    assert rescale(walk(), (0.99, 0.5), RescaleSettings()).rejected == ("path",)
    assert rescale(walk(), (0.1, 0.99), RescaleSettings()).rejected == ("yaw",)


def test_wrong_input_is_refused() -> None:
    with pytest.raises(DataError):
        rescale(CameraTrajectory.stack([walk(), walk()]), (0.5, 0.5), RescaleSettings())
    with pytest.raises(DataError):
        rescale(walk(frames=2), (0.5, 0.5), RescaleSettings())

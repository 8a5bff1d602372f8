"""The geometry reward on cameras that are known exactly, told by an oracle in place of an evaluator."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import OracleEvaluator
from torch import Tensor

from geoalign.errors import UsageError
from geoalign.evaluators.base import PoseEvaluator
from geoalign.geometry import so3
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.rewards.base import RewardOutput
from geoalign.rewards.geometry import GeometryReward
from geoalign.rewards.running.guard import check_output
from geoalign.training.trainer import _mean_of_defined
from geoalign.types import RetakeBatch, SourceClip

FRAMES = 3


def batch_of(target: Tensor) -> RetakeBatch:
    """Conditions ``a``, ``b``, ... with the target paths ``[B, F, 4, 4]`` and no pixels worth reading."""
    count, frames = target.shape[:2]
    video = torch.zeros(count, frames, 3, 2, 2)
    camera = CameraTrajectory.build(torch.eye(4).expand(count, frames, 4, 4).contiguous())
    source = SourceClip(video, camera, None, tuple("abcdefg"[:count]))
    return RetakeBatch(source, CameraTrajectory.build(target), ("",) * count)


def path(metres: tuple[float, ...], degrees: tuple[float, ...]) -> Tensor:
    """Camera ``[F, 4, 4]`` at ``metres`` along x, turned by ``degrees`` about y."""
    turn = torch.deg2rad(torch.tensor(degrees))[:, None] * torch.tensor([0.0, 1.0, 0.0])
    return so3.rigid(so3.exp(turn), torch.tensor(metres)[:, None] * torch.tensor([1.0, 0.0, 0.0]))


TARGETS = torch.stack([path((0, 1, 2), (0, 10, 20)), path((0, -0.5, -1), (0, 0, -5))])


def test_a_perfect_camera_has_no_error_in_any_world_frame() -> None:
    """The oracle's world is moved and turned; re-basing removes that, to a few roundings of metres and radians."""
    world = so3.rigid(so3.exp(torch.tensor([0.3, -0.2, 0.1])), torch.tensor([5.0, -2.0, 7.0]))
    oracle = OracleEvaluator({name: so3.compose(world, poses) for name, poses in zip("ab", TARGETS, strict=True)})
    assert isinstance(oracle, PoseEvaluator)
    out = GeometryReward(oracle)(torch.zeros(2, FRAMES, 3, 2, 2), batch_of(TARGETS))
    assert out.valid.all() and not out.lost.any()
    for key in ("trans", "rot"):
        # Positions of size 9 m have a rounding step of 1e-6.
        torch.testing.assert_close(out.scores[key], torch.zeros(2), rtol=0, atol=5e-6)
    torch.testing.assert_close(out.parts["scale_ratio"], torch.ones(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(out.cameras, TARGETS, rtol=0, atol=5e-6)


def test_a_target_that_stands_still_has_errors_and_no_scale() -> None:
    """The camera slides 1 and 2 m where it should only turn: errors as usual, a ratio of nothing is not a number."""
    targets = torch.stack([path((0, 0, 0), (0, 10, 20)), TARGETS[0]])
    oracle = OracleEvaluator(dict(zip("ab", torch.stack([TARGETS[0], TARGETS[0]]), strict=True)))
    out = GeometryReward(oracle)(torch.zeros(2, FRAMES, 3, 2, 2), batch_of(targets))
    assert out.valid.all() and torch.isnan(out.parts["scale_ratio"]).tolist() == [True, False]
    torch.testing.assert_close(out.parts["trans_m"], torch.tensor([1.5, 0.0]), rtol=0, atol=1e-6)
    values, valid = torch.tensor([math.nan, 2.0, 4.0, 9.0]), torch.tensor([True, True, True, False])
    assert _mean_of_defined(values, valid) == 3.0 and math.isnan(_mean_of_defined(values[:1], valid[:1]))


def test_cameras_to_look_at_are_unknown_where_none_was_read() -> None:
    videos, told = torch.zeros(2, FRAMES, 3, 2, 2), dict(zip("ab", TARGETS, strict=True))
    seen = GeometryReward(OracleEvaluator(told, frame_stride=2))(videos, batch_of(TARGETS)).cameras
    torch.testing.assert_close(seen[:, ::2], TARGETS[:, ::2], rtol=0, atol=1e-6)
    assert torch.isnan(seen[:, 1]).all()
    assert torch.isnan(GeometryReward(OracleEvaluator(told, tracked=0.1))(videos, batch_of(TARGETS)).cameras).all()


def test_half_the_path_costs_half_its_weighted_length() -> None:
    """Eq. 3 by hand, weights 1/6, 2/6, 3/6: 2/6 * 0.5 m + 3/6 * 1 m; eq. 4 sees nothing, the turns are right."""
    halved = TARGETS.clone()
    halved[:, :, :3, 3] *= 0.5
    oracle = OracleEvaluator(dict(zip("ab", halved, strict=True)))
    out = GeometryReward(oracle)(torch.zeros(2, FRAMES, 3, 2, 2), batch_of(TARGETS))
    expected = -torch.tensor([2 / 6 * 0.5 + 3 / 6 * 1.0, 2 / 6 * 0.25 + 3 / 6 * 0.5])
    torch.testing.assert_close(out.scores["trans"], expected)
    torch.testing.assert_close(out.scores["rot"], torch.zeros(2), rtol=0, atol=1e-6)
    torch.testing.assert_close(out.parts["scale_ratio"], torch.full((2,), 0.5))
    torch.testing.assert_close(out.parts["trans_m"], torch.tensor([0.75, 0.375]))


def test_a_frame_subset_renormalises_the_weights() -> None:
    """Frames 0 and 2 of three: weights 1/4 and 3/4; still pictures of a camera that should have gone 2 m and 20 deg."""
    oracle = OracleEvaluator({"a": torch.eye(4).expand(FRAMES, 4, 4)}, frame_stride=2)
    out = GeometryReward(oracle)(torch.zeros(1, FRAMES, 3, 2, 2), batch_of(TARGETS[:1]))
    torch.testing.assert_close(out.scores["trans"], torch.tensor([-0.75 * 2.0]))
    torch.testing.assert_close(out.scores["rot"], torch.deg2rad(torch.tensor([-0.75 * 20.0])))


def straight(metres: float, degrees: float = 0.0) -> Tensor:
    """Five poses, evenly along ``metres`` and a turn of ``degrees``."""
    shares = (0.0, 0.25, 0.5, 0.75, 1.0)
    return path(tuple(share * metres for share in shares), tuple(share * degrees for share in shares))


def scored(paths: list[Tensor], target: Tensor, **options: float) -> RewardOutput:
    """Videos with the cameras ``paths``, all asked for ``target``."""
    oracle = OracleEvaluator(dict(zip("abcdefg", paths, strict=False)))
    batch = batch_of(target.repeat(len(paths), 1, 1, 1))
    return GeometryReward(oracle, **options)(torch.zeros(len(paths), 5, 3, 2, 2), batch)


def test_scales_of_a_6_m_path_score_as_printed_in_order_and_apart() -> None:
    """By hand: metres 0 1.5 3 4.5 6 with weights (1 2 3 4 5) / 15 sum to 4, and a scale s misses |1 - s| of each."""
    scales = [straight(6 * scale) for scale in (0.0, 0.25, 0.5, 1.0, 2.0, 3.0, 4.0)]
    out = scored(scales, straight(6.0))
    torch.testing.assert_close(out.scores["trans"], -torch.tensor([4.0, 3.0, 2.0, 0.0, 4.0, 8.0, 12.0]))
    assert out.parts["saturated_fraction"].tolist() == [0.0] * 7
    assert torch.equal(scored(scales, straight(6.0), translation_bound=math.inf).scores["trans"], out.scores["trans"])


def test_turns_count_in_full_up_to_half_a_turn() -> None:
    """Misses of 0 40 80 120 160 degrees, weighted as above, make 2 / 3 of 160; half of that; and the first again."""
    out = scored([straight(0.0, degrees) for degrees in (0.0, 80.0, 320.0)], straight(0.0, 160.0))
    torch.testing.assert_close(out.scores["rot"], -torch.deg2rad(torch.tensor([160.0, 80.0, 160.0]) * 2 / 3))


def test_a_frame_far_out_counts_four_times_the_reach_of_the_target_and_is_reported() -> None:
    wild = straight(6.0)
    wild[3, 1, 3] = 1e6  # one misread frame
    for bound, worst, share in ((4.0, 24.0, 0.25), (0.5, 3.0, 0.25), (math.inf, 1e6, 0.0)):
        out = scored([wild], straight(6.0), translation_bound=bound)
        torch.testing.assert_close(out.scores["trans"], torch.tensor([-4 / 15 * worst]))
        torch.testing.assert_close(out.parts["saturated_fraction"], torch.tensor([share]))
        torch.testing.assert_close(out.parts["trans_m"], torch.tensor([1e6 / 4]))  # people see what was read
    # A target that rests has a reach of 1 m.
    torch.testing.assert_close(
        scored([wild], straight(0.0)).scores["trans"][0] * 15, -torch.tensor(2 * 1.5 + 3 * 3.0 + 4 * 4.0 + 5 * 4.0)
    )


def test_a_camera_that_cannot_be_read_is_lost_has_no_number_and_stays_valid() -> None:
    oracle = OracleEvaluator(dict(zip("ab", TARGETS, strict=True)), tracked=0.1)
    out = check_output(
        GeometryReward(oracle, min_tracked=0.15)(torch.zeros(2, FRAMES, 3, 2, 2), batch_of(TARGETS)),
        GeometryReward.keys,
        2,
    )
    assert out.valid.all() and out.lost.all()
    assert all(value.isnan().all() for value in (*out.scores.values(), *out.parts.values()))


def test_answers_follow_the_clip_names_and_strangers_are_named() -> None:
    oracle = OracleEvaluator(dict(zip("ab", TARGETS, strict=True)))
    members = batch_of(TARGETS).repeat_interleave(2)
    estimate = oracle(torch.zeros(4, FRAMES, 3, 2, 2), members.source)
    assert torch.equal(estimate.c2w, TARGETS.repeat_interleave(2, dim=0))
    with pytest.raises(UsageError, match="not told the camera of b"):
        OracleEvaluator({"a": TARGETS[0]})(torch.zeros(2, FRAMES, 3, 2, 2), batch_of(TARGETS).source)

"""Advantages: hand-computed cases of every denominator, masks, combination, ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from training_cases import on_fake_ranks

from geoalign.config.flow import AdvantageConfig, StdMode
from geoalign.errors import ConfigError, UsageError
from geoalign.rl.advantage import group_advantage
from geoalign.rl.score import Scores
from geoalign.training.processes.ranks import RankRows, Ranks, gather_scores

# Two groups: 1, 2, 3, 6 (mean 3, population deviation sqrt(3.5)) and 10, 10, 12, 12 (mean 11, deviation 1).
SCORES = torch.tensor([1.0, 2.0, 3.0, 6.0, 10.0, 10.0, 12.0, 12.0])
CENTRED = torch.tensor([-2.0, -1.0, 0.0, 3.0, -1.0, -1.0, 1.0, 1.0])
GROUPS = torch.tensor([8, 8, 8, 8, 3, 3, 3, 3])
ALL = torch.ones(8, dtype=torch.bool)
# All arithmetic is float64; the result is rounded to float32 once.
TOLERANCE = {"rtol": 2e-7, "atol": 1e-12}


def values(config: AdvantageConfig, scores: Tensor = SCORES, valid: Tensor = ALL, groups: Tensor = GROUPS) -> Tensor:
    return group_advantage({"r": scores}, valid, groups, config).values


@pytest.mark.parametrize(
    ("config", "denominators"),
    [
        (AdvantageConfig(), [math.sqrt(3.5)] * 2),
        (AdvantageConfig(std="group"), [math.sqrt(3.5), 1.0]),
        (AdvantageConfig(std="group", floor=1.5), [math.sqrt(3.5), 1.5]),
        (AdvantageConfig(std="group", floors={"r": 4.0}), [4.0] * 2),
        (AdvantageConfig(std="batch_rms"), [1.5] * 2),
        # Mean 7, deviations from it -6 -5 -4 -1 3 3 5 5: squares sum to 146.
        (AdvantageConfig(std="global"), [math.sqrt(146 / 8)] * 2),
        (AdvantageConfig(std="batch_max", floor=4.0), [4.0] * 2),
        (AdvantageConfig(std="batch_max", floors={"r": 2.5}), [2.5] * 2),
        # The median of two deviations is their mean.
        (AdvantageConfig(std="batch_max", quantile=0.5), [(math.sqrt(3.5) + 1) / 2] * 2),
    ],
)
def test_denominators_by_hand(config: AdvantageConfig, denominators: list[float]) -> None:
    expected = CENTRED / torch.tensor(denominators).repeat_interleave(4)
    torch.testing.assert_close(values(config), expected, **TOLERANCE)


def test_every_mode_has_a_denominator_of_its_own() -> None:
    found = [values(AdvantageConfig(std=std)) for std in get_args(StdMode)]
    assert not any(torch.equal(a, b) for a, b in combinations(found, 2))


@pytest.mark.parametrize("std", ["batch_max", "batch_rms", "group", "global"])
def test_invalid_members_leave_mean_deviation_and_loss(std: str) -> None:
    """The masked batch equals the batch without those members, whatever their scores are."""
    valid = torch.tensor([1, 1, 1, 0, 1, 0, 1, 1], dtype=torch.bool)
    scores = SCORES.clone()
    scores[3], scores[5] = float("nan"), 1e9
    config = AdvantageConfig(std=std)
    masked = values(config, scores, valid)
    assert masked[~valid].tolist() == [0.0, 0.0]
    expected = values(config, SCORES[valid], ALL[valid], GROUPS[valid])
    torch.testing.assert_close(masked[valid], expected, **TOLERANCE)


@pytest.mark.parametrize("std", ["batch_max", "batch_rms", "group", "global"])
@pytest.mark.parametrize("score", [0.1, -3e7])
def test_groups_without_signal_get_zero(std: str, score: float) -> None:
    """Equal rewards must not be blown up by rounding, nor may a group with one or no valid member."""
    groups = torch.arange(4).repeat_interleave(3)
    scores = torch.full((12,), score)
    valid = torch.ones(12, dtype=torch.bool)
    valid[3:5] = valid[6:9] = False
    scores[9:] = torch.tensor([0.0, 1.0, 2.0])
    result = group_advantage({"r": scores}, valid, groups, AdvantageConfig(std=std))
    # A float64 sum of a few equal float32 numbers is exact, hence so is their mean.
    assert float(result.values[:9].abs().max()) == 0.0
    assert float(result.values[9]) < 0.0
    assert result.metrics["r/zero_variance"] == 1.0  # the group of equal ones; the others are not comparable
    assert result.metrics["valid_fraction"] == pytest.approx(7 / 12)


# Three groups of four; what is lost of each.
LOST = torch.tensor([0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 1], dtype=torch.bool)
TABLE = torch.tensor([1.0, 2.0, 3.0, 6.0, 10.0, 10.0, 12.0, 12.5, 0.0, 1.0, 2.0, 3.0])


@pytest.mark.parametrize("score", [math.nan, -math.inf, 1e9, -1e9])
@pytest.mark.parametrize("std", ["batch_max", "batch_rms", "group", "global"])
def test_a_lost_member_changes_no_other_advantage(std: str, score: float) -> None:
    """Bit for bit those of the batch without it, however bad or good its score would be."""
    config = AdvantageConfig(std=std)
    groups, valid = torch.arange(3).repeat_interleave(4), torch.ones(12, dtype=torch.bool)
    scores = {"a": torch.where(LOST, score, TABLE), "b": torch.where(LOST, score, TABLE.square())}
    found = group_advantage(scores, valid, groups, config, LOST)
    without = group_advantage({"a": TABLE, "b": TABLE.square()}, ~LOST, groups, config)
    assert torch.equal(found.values[~LOST], without.values[~LOST])
    for key in scores:
        assert torch.equal(found.per_key[key], without.per_key[key])
    own = {"valid_fraction", "lost_groups"}
    assert {k: v for k, v in found.metrics.items() if k not in own} == {
        k: v for k, v in without.metrics.items() if k not in own
    }


def test_a_lost_member_gets_the_lowest_advantage_of_its_group_and_at_most_minus_one() -> None:
    """By hand, with the denominator 1: scores 1 2 3 give -1 0 1, scores 10 12 12.5 give -1.5 0.5 1."""
    groups, valid = torch.arange(3).repeat_interleave(4), torch.ones(12, dtype=torch.bool)
    config = AdvantageConfig(std="group", floor=2.0, weights={"a": 2.0})
    result = group_advantage({"a": TABLE}, valid, groups, config, LOST)
    expected = [-1.0, 0.0, 1.0, -1.0, -1.5, -1.5, 0.5, 1.0, 0.0, 0.0, 0.0, 0.0]
    torch.testing.assert_close(result.values, torch.tensor(expected), **TOLERANCE)
    assert result.metrics["lost_groups"] == 1
    # Members that hardly differ: the lost one is still pushed away from, at -1.
    small = group_advantage({"a": TABLE / 100}, valid, groups, config, LOST).values
    torch.testing.assert_close(small[[3, 4]], torch.tensor([-1.0, -1.0]), **TOLERANCE)
    # The clip bounds every advantage, that of a lost member too.
    tight = config.model_copy(update={"clip": 0.5})
    assert group_advantage({"a": TABLE}, valid, groups, tight, LOST).values[[3, 4]].tolist() == [-0.5, -0.5]


def test_invalid_samples_are_not_lost_and_decide_nothing() -> None:
    groups, valid = torch.zeros(4, dtype=torch.int64), torch.tensor([1, 0, 1, 0], dtype=torch.bool)
    lost = torch.tensor([0, 1, 1, 0], dtype=torch.bool)
    result = group_advantage({"r": torch.tensor([5.0, 0.0, 0.0, -9.0])}, valid, groups, AdvantageConfig(), lost)
    assert result.values.tolist() == [0.0, 0.0, -1.0, 0.0]
    assert result.metrics["lost_groups"] == 0
    nobody = group_advantage({"r": SCORES[:4]}, valid, groups, AdvantageConfig(), valid)
    assert nobody.values.tolist() == [0.0] * 4 and nobody.metrics["lost_groups"] == 1


@pytest.mark.parametrize("std", ["batch_max", "batch_rms", "group", "global"])
@pytest.mark.parametrize("base", [-3.0, -300.0, -0.3, 7e-5, 1e6])
def test_rewards_that_differ_by_rounding_teach_nothing(std: str, base: float) -> None:
    """A few units in the last place of float32 around ``base``; the second group differs by a thousandth."""
    steps = torch.tensor([0, 1, -1, 2, 0, -2, 3, 1, 0, -1, 0, 2])
    first = torch.tensor(base) * (1 + steps * torch.finfo(torch.float32).eps)
    assert first.unique().numel() > 3
    scores = torch.cat([first, base * (1 + 1e-3 * steps)])
    groups, config = torch.arange(2).repeat_interleave(12), AdvantageConfig(std=std, floor=1e-9)
    result = group_advantage({"r": scores}, torch.ones(24, dtype=torch.bool), groups, config)
    assert result.values[:12].tolist() == [0.0] * 12 and result.metrics["r/zero_variance"] == 1
    assert float(result.values[12:].abs().max()) > 0.5


def test_single_members_do_not_enter_the_median() -> None:
    groups = torch.tensor([0, 0, 1, 2])
    metrics = group_advantage(
        {"r": torch.tensor([0.0, 2.0, 5.0, 9.0])}, torch.ones(4, dtype=torch.bool), groups, AdvantageConfig()
    ).metrics
    assert metrics["r/sigma_median"] == metrics["r/sigma_max"] == 1.0


def test_nothing_valid_gives_zeros() -> None:
    for std in ("batch_max", "batch_rms", "group", "global"):
        result = group_advantage({"r": SCORES}, ~ALL, GROUPS, AdvantageConfig(std=std))
        assert result.values.tolist() == [0.0] * 8
        assert all(math.isfinite(number) for number in result.metrics.values())


def test_rewards_are_combined_after_normalisation_then_clipped() -> None:
    other = torch.tensor([100.0, 0, 0, 0, 0, 0, 0, 0])
    config = AdvantageConfig(weights={"b": 4.0}, clip=5.0)
    result = group_advantage({"a": SCORES, "b": other}, ALL, GROUPS, config)
    first = CENTRED.double() / math.sqrt(3.5)
    spread = math.sqrt((75.0**2 + 3 * 25.0**2) / 4)
    second = torch.tensor([75.0, -25, -25, -25, 0, 0, 0, 0], dtype=torch.float64) / spread
    torch.testing.assert_close(result.per_key["b"], second.float(), **TOLERANCE)
    expected = first + 4 * second
    assert float(expected.max()) > 5
    torch.testing.assert_close(result.values, expected.clamp(-5, 5).float(), **TOLERANCE)
    assert result.metrics["clip_fraction"] == 1 / 8
    unbounded = group_advantage({"a": SCORES, "b": other}, ALL, GROUPS, config.model_copy(update={"clip": None}))
    torch.testing.assert_close(unbounded.values, expected.float(), **TOLERANCE)


def test_metrics_by_hand() -> None:
    metrics = group_advantage({"r": SCORES}, ALL, GROUPS, AdvantageConfig()).metrics
    assert metrics["r/sigma_max"] == pytest.approx(math.sqrt(3.5))
    assert metrics["r/sigma_median"] == pytest.approx((1 + math.sqrt(3.5)) / 2)
    assert metrics["r/sigma_max_over_median"] == pytest.approx(2 * math.sqrt(3.5) / (1 + math.sqrt(3.5)))
    assert metrics["r/mean"] == 7.0
    assert metrics["r/denominator"] == pytest.approx(math.sqrt(3.5))


@pytest.mark.parametrize("std", ["batch_max", "batch_rms", "group", "global"])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_groups_spread_over_ranks_equal_one_process(std: str, size: int) -> None:
    """Bit for bit: ranks gather all scores and normalise them alike, groups whole or split."""
    table, groups = torch.cat([SCORES, 3 * SCORES + 1]), torch.arange(4).repeat_interleave(4)
    valid, config = torch.rand(16, generator=torch.Generator().manual_seed(0)) > 0.2, AdvantageConfig(std=std)
    lost = torch.arange(16) % 5 == 0
    assert bool((lost & valid).any())
    alone = group_advantage({"r": table}, valid, groups, config, lost).values

    def work(ranks: Ranks) -> Tensor:
        local = RankRows.of(4, 4, ranks)
        rows = local.rows
        mine = Scores({"r": table[rows]}, valid[rows], lost[rows], {}, {}, {"r": 1}, {"r": float(ranks.rank)})
        found = gather_scores(ranks, local, mine)
        assert found.failures == {"r": size} and found.seconds == {"r": size - 1.0}
        return group_advantage(found.scores, found.valid, groups, config, found.lost).values

    assert all(torch.equal(values, alone) for values in on_fake_ranks(size, work))


@given(
    st.lists(st.tuples(st.integers(0, 3), st.floats(-1e3, 1e3, width=32), st.booleans()), min_size=1, max_size=24),
    st.sampled_from(["batch_max", "batch_rms", "group", "global"]),
)
def test_advantages_sum_to_zero_in_every_group(members: list[tuple[int, float, bool]], std: str) -> None:
    groups = torch.tensor([group for group, _, _ in members])
    scores = torch.tensor([score for _, score, _ in members])
    valid = torch.tensor([flag for _, _, flag in members])
    advantage = group_advantage({"r": scores}, valid, groups, AdvantageConfig(std=std, clip=None)).values
    for group in groups.unique():
        share = advantage[groups == group]
        # float32 rounding of up to 24 members of magnitude share.
        assert float(share.sum().abs()) <= 2e-6 * (1e-3 + float(share.abs().sum()))


@given(st.integers(0, 2**31), st.floats(0.1, 100.0), st.floats(-50.0, 50.0))
def test_normalisation_ignores_scale_and_offset(seed: int, scale: float, offset: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(8, generator=generator, dtype=torch.float64)
    config = AdvantageConfig(floor=1e-9)
    torch.testing.assert_close(values(config, scores), values(config, scale * scores + offset), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: values(AdvantageConfig(weights={"x": 1.0})), ConfigError, "weights names x, but the rewards give r;"),
        (lambda: values(AdvantageConfig(floors={"y": 1.0})), ConfigError, "floors names y, but the rewards give r;"),
        (lambda: values(AdvantageConfig(), SCORES[:7]), UsageError, r"must all be \[B\]"),
        (lambda: values(AdvantageConfig(), SCORES.log() * float("inf")), UsageError, "not finite"),
    ],
)
def test_misuse_is_named(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"std": "group", "quantile": 0.9}, "quantile is read by"),
        ({"floors": {"r": 0.0}}, "positive"),
    ],
)
def test_impossible_settings_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AdvantageConfig(**fields)

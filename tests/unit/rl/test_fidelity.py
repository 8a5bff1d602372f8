"""The numbers of fidelity by definitions written out here."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor

from geoalign.rl.fidelity import GroupFidelity, Outcome, compare, mean_square, shortfalls, summary, told

EXACT = torch.tensor([0.9, -0.4, 0.1, -1.2, 0.3, 0.7])
OTHER = torch.tensor([0.8, 0.2, -0.3, -1.0, 0.4, 0.6])
YES = torch.ones(6, dtype=torch.bool)


def outcome(advantage: Tensor, valid: Tensor = YES, lost: Tensor = ~YES) -> Outcome:
    return Outcome(advantage, {"trans": 2 * advantage + 1, "rot": -advantage}, valid, lost)


def group(exact: Outcome, other: Outcome) -> GroupFidelity:
    return compare(exact, other, torch.full((6,), 4e-5), 4e-2)


def test_correlations_flips_and_bias_by_definition() -> None:
    found = group(outcome(EXACT), outcome(OTHER))
    a, b = EXACT.double().numpy(), OTHER.double().numpy()
    ranks = [np.argsort(np.argsort(v)) for v in (a, b)]
    assert found.spearman == pytest.approx(1 - 6 * np.square(ranks[0] - ranks[1]).sum() / (6 * 35), abs=1e-12)
    signs = [np.sign((a[i] - a[j]) * (b[i] - b[j])) for i, j in combinations(range(6), 2)]
    assert found.kendall == pytest.approx(sum(signs) / 15, abs=1e-12)
    assert found.pearson == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-12)
    assert found.flips == pytest.approx(2 / 6) and found.flips_weighted == pytest.approx(0.5 / 3.6, rel=1e-6)
    assert found.shift["trans"] == pytest.approx(2 * (b - a).mean(), rel=1e-5)  # float32 scores
    assert found.spread["rot"] == pytest.approx(a.std(), rel=1e-5)
    assert found.psnr == pytest.approx(50.0) and found.distance == pytest.approx(20.0)
    assert found.numbers()["bias_rot"] == pytest.approx(-(b - a).mean() / a.std(), rel=1e-5)


def test_failures_leave_and_lost_samples_keep_their_rank() -> None:
    """An invalid member is in no number; a lost one has an advantage, but no score."""
    invalid, lost = YES.clone(), ~YES
    invalid[0], lost[1] = False, True
    found = group(outcome(EXACT, valid=invalid), outcome(OTHER, lost=lost))
    a, b = EXACT[1:].double().numpy(), OTHER[1:].double().numpy()
    assert found.pearson == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-12)
    assert found.shift["rot"] == pytest.approx(-(b - a)[1:].mean(), rel=1e-5)


def test_what_an_exact_tail_tells_of_a_group() -> None:
    everything = {"spearman", "margin", "bias_trans", "bias_rot"}
    assert told(outcome(EXACT), 0.1) == everything
    assert told(outcome(EXACT), math.nan) == everything - {"margin"}  # no two members on one rank
    assert told(outcome(EXACT, lost=torch.arange(6) > 1), 0.1) == {"spearman", "margin"}
    assert told(outcome(EXACT, valid=torch.arange(6) < 3), 0.1) == everything
    assert told(outcome(EXACT, valid=torch.arange(6) < 2), 0.1) == set()
    assert told(outcome(torch.full((6,), 0.25)), 0.1) == set()


def test_a_group_that_an_approximation_makes_equal_has_lost_its_order() -> None:
    assert group(outcome(EXACT), outcome(torch.zeros(6))).spearman == 0.0
    undefined = group(outcome(torch.zeros(6)), outcome(OTHER))
    assert math.isnan(undefined.spearman) and undefined.flips_weighted == 0.0
    nobody = group(outcome(EXACT, valid=~YES), outcome(OTHER))
    assert math.isnan(nobody.spearman) and math.isnan(nobody.psnr)
    pooled = summary([undefined, group(outcome(EXACT), outcome(OTHER))])
    assert pooled["groups"] == 1 and not math.isnan(pooled["spearman"])


def test_acceptance_names_what_is_missing() -> None:
    perfect = [group(outcome(EXACT), outcome(EXACT * 1.01)) for _ in range(16)]
    row = summary(perfect)
    assert row["spearman_p10"] == 1.0 and shortfalls(row, 0.4) == []
    assert shortfalls(row, 1.01) == ["pearson 1 (squared, above the cost)"]
    assert [text.split()[0] for text in shortfalls(summary(perfect[:15]), 0.4)] == ["groups"]
    poor = shortfalls(summary([group(outcome(EXACT), outcome(OTHER))] * 16), 0.4)
    missing = {"spearman", "spearman_p10", "kendall", "flips", "flips_weighted", "bias_trans", "bias_rot"}
    assert {text.split()[0] for text in poor} <= missing and "spearman" in poor[0]
    assert float(mean_square(torch.ones(2, 3), torch.zeros(2, 3))[0]) == 1.0

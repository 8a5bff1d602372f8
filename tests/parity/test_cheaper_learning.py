"""Learning from a part: the expected subset gradient is the full one, chosen members add what they would have added."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from toy_learner import GROUPS, SIZE, assert_close, gradient, learner_of, setting_of
from training_cases import Brightness, Conditions, smoke, trainer_of

from geoalign.config.flow import AdvantageConfig
from geoalign.rl.advantage import group_advantage
from geoalign.rl.subset import learned_positions, most_informative
from geoalign.types import Encodings

WINDOW = {"kind": "fixed", "start": 1, "size": 3, "max_start": None}
SERIAL = {"rows_per_forward": 1}


@pytest.mark.parametrize(
    ("buffers", "rows", "streamed"), [(None, None, False), (None, None, True), ("device", 1, True)], ids=str
)
def test_the_mean_over_all_subsets_is_the_full_gradient(buffers: str | None, rows: int | None, streamed: bool) -> None:
    """Enumerated, in float64; with clipped members, whose loss is a sum over steps as well."""
    found: dict[tuple[int, ...], Tensor] = {}
    for positions in [(0, 1, 2), *combinations(range(3), 2)]:
        setting = setting_of(buffers, rows, positions=positions)
        learner = learner_of(setting.policy)
        stream = {"stream": setting.stream} if streamed else {}
        numbers, found[positions] = gradient(setting, setting.rollout, learner, positions=positions, **stream)
        assert learner.passes["backward"] == (GROUPS if 0 in positions else 0) + GROUPS * SIZE * len(
            {1, 2} & {*positions}
        )
        assert numbers["parity/log_prob_diff_max"] == 0.0 and numbers["policy/ratio_max"] == 1.0
    full, parts = found.pop((0, 1, 2)), list(found.values())
    assert_close(torch.stack(parts).mean(0), full, summands=parts[0])
    assert all(float((part - full).norm()) > 0.1 * float(full.norm()) for part in parts)


def test_every_subset_is_drawn_equally_often() -> None:
    draws = [learned_positions(4, 2, 7, iteration) for iteration in range(600)]
    counts = [draws.count(pair) for pair in combinations(range(4), 2)]
    # 600 draws of six: 100 each, deviation 9; five deviations.
    assert sum(counts) == 600 and all(abs(count - 100) < 46 for count in counts)
    assert learned_positions(4, None, 7, 0) == learned_positions(4, 4, 7, 0) == (0, 1, 2, 3)
    assert draws[:50] == [learned_positions(4, 2, 7, iteration) for iteration in range(50)]


def test_the_largest_advantages_are_chosen_in_every_group() -> None:
    advantage = torch.tensor([0.1, -0.9, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0])
    valid, lost = torch.ones(8, dtype=torch.bool), torch.zeros(8, dtype=torch.bool)
    chosen = most_informative(advantage, valid, lost, 4, 2)
    assert chosen.tolist() == [False, True, True, False, True, True, False, False]
    assert bool(most_informative(advantage, valid, lost, 4, None).all())


def test_what_was_read_is_learned_from_before_what_was_lost() -> None:
    """Six of twelve cameras lost: by magnitude alone the update would hold their six equal terms and nothing else."""
    scores = {"a": torch.tensor([0.3, 0.1, -0.2, 0.4, -0.1, -0.5, *[9.0] * 6])}
    lost = torch.tensor([False] * 6 + [True] * 6)
    valid, group = torch.ones(12, dtype=torch.bool), torch.zeros(12, dtype=torch.int64)
    advantage = group_advantage(scores, valid, group, AdvantageConfig(std="group"), lost).values
    assert bool((advantage[6:] == advantage[:6].min()).all())  # what a lost member gets
    half = most_informative(advantage, valid, lost, 12, 6)
    assert half.tolist() == [True] * 6 + [False] * 6
    assert float(advantage[half].sum()) == pytest.approx(0, abs=1e-6)  # float32 values of order 1
    eight = most_informative(advantage, valid, lost, 12, 8)
    assert eight.tolist() == [True] * 8 + [False] * 4  # then lost ones, earlier first


def test_members_without_a_term_come_last() -> None:
    """No difference among those that were read: the lost ones alone say something. Invalid ones are never wanted,
    whatever number stands there, as after a shuffle."""
    advantage = torch.tensor([0.0, 0.0, -1.0, -1.0, 5.0, -0.1, 0.2, 0.3])
    valid = torch.tensor([True, True, True, True, False, True, True, True])
    lost = torch.tensor([False, False, True, True, False, False, False, False])
    chosen = most_informative(advantage, valid, lost, 4, 3)
    assert chosen.tolist() == [True, False, True, True, False, True, True, True]


def test_chosen_members_add_exactly_their_terms() -> None:
    """Against the full update with the other advantages at zero."""
    setting = setting_of(None, 1)
    every = torch.ones(len(setting.advantage), dtype=torch.bool)
    chosen = most_informative(setting.advantage, every, ~every, SIZE, 2)
    learner = learner_of(setting.policy)
    _, found = gradient(setting, setting.rollout, learner, chosen=chosen)
    assert learner.passes["backward"] == GROUPS + 2 * GROUPS * 2
    setting.advantage = torch.where(chosen, setting.advantage, 0.0)
    _, expected = gradient(setting, setting.rollout, learner_of(deepcopy(setting.policy)))
    assert_close(found, expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"learn": {"window_steps": 2}},
        {"learn": {"window_steps": 1}, "levers": {"streaming": "device"}, "groups": SERIAL},
        {"learn": {"members": 2, "window_steps": 2}, "groups": SERIAL},
        {"learn": {"short_frames": 3, "short_iterations": 1}},
    ],
    ids=str,
)
def test_a_run_that_learns_from_a_part_counts_what_it_spends(changes: dict[str, Any]) -> None:
    trainer = trainer_of(smoke(window=WINDOW, advantage={"weights": {}}, **changes), rewards={"b": Brightness()})
    for _ in range(1 + changes["learn"].get("short_iterations", 0)):
        metrics = trainer.step()
        assert metrics["perf/forward_equivalents"] == metrics["perf/predicted_forward_equivalents"]
        assert metrics["parity/log_prob_diff_max"] == 0.0
        assert metrics["policy/ratio_min"] == metrics["policy/ratio_max"] == 1.0


def test_short_videos_are_the_first_frames_of_the_long_ones() -> None:
    batch = Conditions(smoke()).batch(0, [0, 1])
    short, frames = batch.first_frames(3, 2), batch.source.video.shape[1]
    assert torch.equal(short.source.video, batch.source.video[:, :3]) and batch.first_frames(frames, 2) is batch
    assert torch.equal(short.target_camera.c2w, batch.target_camera.c2w[:, :3])
    assert short.source.camera.c2w.shape[1] == 3
    encoded = replace(batch, encodings=Encodings(latents=torch.arange(10.0).view(2, 1, 5, 1, 1)))
    assert encoded.first_frames(3, 2).encodings.latents.flatten().tolist() == [0, 1, 5, 6]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learn": {"window_steps": 9}}, "of a window of 1 steps"),
        ({"learn": {"members": 9}, "groups": SERIAL}, "of groups of 4"),
        ({"learn": {"members": 2}}, "rows_per_forward to 1"),
        ({"learn": {"members": 2}, "levers": {"streaming": "host"}, "groups": SERIAL}, "once the rewards are known"),
        ({"learn": {"short_frames": 3}}, "belong together"),
        ({"learn": {"short_frames": 81, "short_iterations": 3}}, "below data.num_frames"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        smoke(**changes)

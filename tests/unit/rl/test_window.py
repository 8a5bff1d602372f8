"""Window schedules: golden sequences, range, purity."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geoalign.config.flow import WindowConfig
from geoalign.errors import ConfigError
from geoalign.rl.window import WindowSchedule


def starts(config: WindowConfig, steps: int, iterations: range, seed: int = 0) -> list[int]:
    schedule = WindowSchedule(config, steps, seed)
    return [schedule(iteration).start for iteration in iterations]


def test_the_default_reaches_step_five_in_140_iterations() -> None:
    visited = starts(WindowConfig(), 25, range(140))
    assert visited == [i // 25 for i in range(140)]
    assert max(visited) == 5
    assert max(starts(WindowConfig(), 25, range(300))) == 11


def test_progressive_rolls_back_or_clips() -> None:
    moving = {"start": 1, "size": 2, "stride": 2, "interval": 2}
    # T = 8: step 7 is deterministic, so the largest start is 5.
    assert starts(WindowConfig(**moving), 8, range(10)) == [1, 1, 3, 3, 5, 5, 1, 1, 3, 3]
    assert starts(WindowConfig(**moving, end="clip"), 8, range(10)) == [1, 1, 3, 3, 5, 5, 5, 5, 5, 5]
    short = WindowConfig(**moving, max_start=4)
    assert starts(short, 8, range(8)) == [1, 1, 3, 3, 1, 1, 3, 3]
    assert starts(short.model_copy(update={"end": "clip"}), 8, range(8)) == [1, 1, 3, 3, 4, 4, 4, 4]


def test_one_step_windows_take_turns() -> None:
    config = WindowConfig(size=1, interval=1, max_start=2)
    assert starts(config, 6, range(7)) == [0, 1, 2, 0, 1, 2, 0]


def test_fixed_stays() -> None:
    assert starts(WindowConfig(kind="fixed", start=3, interval=1), 25, range(0, 1000, 100)) == [3] * 10


def test_exp_decay_hurries_through_late_steps() -> None:
    """Positions last ceil(4 exp(-0.5 max(0, l - 2))) iterations: 4, 4, 4, 3, 2, 1, 1 for l = 0..6."""
    config = WindowConfig(kind="exp_decay", size=1, interval=4, decay_rate=0.5, decay_start=2)
    golden = [0] * 4 + [1] * 4 + [2] * 4 + [3] * 3 + [4] * 2 + [5] + [6]
    assert starts(config, 8, range(19)) == golden
    assert starts(config, 8, range(19, 38)) == golden
    assert starts(config.model_copy(update={"end": "clip"}), 8, range(19, 25)) == [6] * 6


def test_every_window_lasts_at_least_an_iteration() -> None:
    """4 exp(-1000) is above 0 and not so in float64: no position is skipped, and the schedule begins anew."""
    config = WindowConfig(kind="exp_decay", start=1, size=2, interval=4, decay_rate=1000.0, decay_start=0)
    assert starts(config, 6, range(6)) == [1, 2, 3, 1, 2, 3]


def test_exp_decay_ends_where_progressive_does() -> None:
    """A stride of 2 from 1 stops at 3 within a largest start of 4: `roll_back` begins anew, `clip` goes on to 4."""
    decaying = {
        "kind": "exp_decay",
        "start": 1,
        "size": 2,
        "stride": 2,
        "interval": 2,
        "max_start": 4,
        "decay_start": 0,
    }
    # Positions 1 and 3 last ceil(2 exp(-1)) = 1 and ceil(2 exp(-3)) = 1 iterations.
    config = WindowConfig(**decaying, decay_rate=1.0)
    assert starts(config, 8, range(5)) == [1, 3, 1, 3, 1]
    assert starts(config.model_copy(update={"end": "clip"}), 8, range(5)) == [1, 3, 4, 4, 4]
    # Without decay the two schedules are one.
    for end in ("roll_back", "clip"):
        even = WindowConfig(**decaying, decay_rate=0.0, end=end)
        assert starts(even, 8, range(12)) == starts(even.model_copy(update={"kind": "progressive"}), 8, range(12))


def test_random_is_counter_based() -> None:
    """Golden sequence of the frozen Philox layout: seed 0, stream 5, T = 25, size 4 (made by this implementation)."""
    config = WindowConfig(kind="random", interval=1)
    assert starts(config, 25, range(12)) == [20, 1, 13, 10, 7, 10, 3, 2, 5, 1, 1, 11]
    assert starts(config, 25, range(40), seed=1) != starts(config, 25, range(40))
    held = starts(config.model_copy(update={"interval": 3}), 25, range(9))
    assert held == [20, 20, 20, 1, 1, 1, 13, 13, 13]


def test_random_covers_all_positions_evenly() -> None:
    visited = starts(WindowConfig(kind="random", interval=1, size=2, start=2), 9, range(600))
    counts = [visited.count(value) for value in range(2, 7)]
    assert sum(counts) == 600
    # 120 expected, binomial deviation 9.8; five deviations. The draw is fixed, so this cannot flake.
    assert all(abs(count - 120) < 49 for count in counts)


@given(
    kind=st.sampled_from(["progressive", "random", "exp_decay", "fixed"]),
    end=st.sampled_from(["roll_back", "clip"]),
    steps=st.integers(2, 30),
    stride=st.integers(1, 5),
    interval=st.integers(1, 30),
    iteration=st.integers(0, 2000),
    data=st.data(),
)
def test_windows_are_full_and_inside(kind, end, steps, stride, interval, iteration, data) -> None:  # type: ignore[no-untyped-def]
    size = data.draw(st.integers(1, steps - 1))
    start = data.draw(st.integers(0, steps - 1 - size))
    top = data.draw(st.none() | st.integers(start, steps - 1 - size))
    config = WindowConfig(
        kind=kind, end=end, start=start, size=size, stride=stride, interval=interval, max_start=top, decay_start=3
    )
    window = WindowSchedule(config, steps, seed=5)(iteration)
    assert window.size == size
    assert start <= window.start <= (steps - 1 - size if top is None else top)
    assert window.stop <= steps - 1
    assert window == WindowSchedule(config, steps, seed=5)(iteration)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 4}, "reaches the last of flow.steps 4"),
        ({"start": 4, "size": 1}, "reaches the last of flow.steps 5"),
        ({"start": 2, "size": 1, "max_start": 1}, "must lie between"),
        ({"size": 2, "max_start": 3}, "must lie between"),
    ],
)
def test_windows_that_do_not_fit_are_refused(fields: dict[str, int], message: str) -> None:
    steps = 4 if fields.get("size") == 4 else 5
    with pytest.raises(ConfigError, match=message):
        WindowSchedule(WindowConfig(**fields), steps)

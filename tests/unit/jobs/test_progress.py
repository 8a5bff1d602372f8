"""What a log says of a run: one line per iteration, and of other long work one now and then."""

from __future__ import annotations

import pytest

from geoalign.jobs import progress

NUMBERS = {
    "time/iteration_s": 41.26, "time/between_s": 0.5, "time/data_s": 1.0, "time/rollout/encode_s": 2.0,
    "time/rollout/window_s": 18.0, "time/rollout/decode_s": 6.0, "time/scoring_s": 9.0, "time/update/forward_s": 4.0,
    "time/update/backward_s": 8.0, "advantage/trans/mean": -0.4, "advantage/rot/mean": -0.1, "reward/trans": -0.412,
    "reward/rot": -0.118, "reward/trans_m": 0.8314, "reward/rot_deg": 4.1, "reward/lost_fraction": 0.02,
    "reward/invalid_fraction": 0.25, "policy/ratio_min": 0.9991, "policy/ratio_max": 1.0007,
    "policy/skipped_updates": 1.0, "eval/presets_translation_error_m": 0.5214, "data/wait_s": 3.0,
}  # fmt: skip


class Clock:
    """Time that only passes when told to."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        patch.setattr(progress.time, "monotonic", lambda: self.now)
        patch.setattr(progress.time, "strftime", lambda _: "12:00:00 ")


def test_one_line_has_all_that_a_glance_needs() -> None:
    assert progress.iteration_line(12, 140, 45.0, NUMBERS) == (
        "iteration 12/140 | 41.3 s | ETA 1:36:00 | trans -0.412 rot -0.118 | "
        "0.831 m, 4.10 deg, ratio 0.9991 to 1.0007 | held-out 0.521 m | lost 2%, failed 25%, 1 updates skipped | "
        "s: data 1.0, rollout 20.0, scoring 9.0, update 12.0, between 0.5"
    )
    assert progress.iteration_line(1, 2, 3.0, {}) == "iteration 1/2 | ETA 3 s | lost 0%, failed 0%"


def test_the_remaining_time_follows_recent_iterations(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with progress.RunProgress(40, 10) as told, progress.RunProgress(40, 10) as other:
        for done in range(11, 31):
            clock.now += 300.0 if done < 21 else 6.0  # what was slow long ago does not count
            told.tell(done, {"time/iteration_s": 6.0})
            monkeypatch.setenv("RANK", "1")  # another rank says nothing
            other.tell(done, {"time/iteration_s": 6.0})
            monkeypatch.delenv("RANK")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 20 and lines[0].startswith("12:00:00 iteration 11/40 | 6.0 s | ETA 2:25:00")
    assert "ETA 1:00" in lines[-1]


def test_other_work_says_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with progress.bar(600, "preparing", "clip") as shown:
        for _ in range(100):
            clock.now += 1.0
            shown.update()
    told = [(30, "9:30"), (60, "9:00"), (90, "8:30")]
    expected = [f"12:00:00 preparing: {done} of 600 clips, ETA {left}" for done, left in told]
    assert capsys.readouterr().err.splitlines() == expected
    with progress.bar(None, "sampling", "forward") as shown:
        shown.update()
    with progress.bar(600, "preparing", "clip", shown=False) as shown:
        clock.now += 1000
        shown.update()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (187, "3:07"), (43387, "12:03:07"), (183600, "2 d 3:00:00")]
)
def test_durations_are_read_like_a_clock(seconds: float, text: str) -> None:
    assert progress.clock_text(seconds) == text

"""Injected faults of a whole run: it survives with exact counts, or stops and names the cause (docs/engine.md)."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import PATIENCE_S
from torch import Tensor
from training_cases import Brightness, gradient_of, on_fake_ranks, smoke, trainer_of

from geoalign.cli.main import main
from geoalign.errors import CheckpointError, RunError
from geoalign.files.atomic import read_jsonl
from geoalign.jobs.train import run_training
from geoalign.policy.policy import RetakePolicy
from geoalign.rewards.base import Reward, RewardOutput
from geoalign.rewards.running.guard import GuardedReward
from geoalign.training import checkpoint as checkpoints
from geoalign.training.processes.ranks import LocalRanks, Ranks
from geoalign.training.trainer import Trainer
from geoalign.types import RetakeBatch

WINDOW = {"kind": "fixed", "start": 1, "size": 2, "max_start": None}
ROWS = 8  # 2 groups of 4


class Faulty(Brightness):
    """A scorer that does something wrong in chosen calls (counted from 0)."""

    def __init__(self, faults: Mapping[int, str]) -> None:
        self.faults, self.calls, self.release = dict(faults), 0, threading.Event()

    def __call__(self, videos: Tensor, batch: RetakeBatch) -> RewardOutput:
        fault, self.calls = self.faults.get(self.calls), self.calls + 1
        if fault == "raise":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if fault == "hang":
            self.release.wait(PATIENCE_S)
        output = super().__call__(videos, batch)
        if fault == "nan":
            output.scores["bright"][1] = float("nan")
        return output


def trainer_with(rewards: Mapping[str, Reward], **changes: dict[str, Any]) -> Trainer:
    changes = {"failures": {"max_invalid_fraction": 1.0}, "scoring": {"chunk": ROWS}} | changes
    return trainer_of(smoke(window=WINDOW, advantage={"weights": {}}, **changes), rewards=rewards)


def assert_trained(trainer: Trainer) -> None:
    assert all(torch.isfinite(p).all() for p in trainer.engine.trained.values())


LEVERS = [
    {"levers": {"streaming": mode}, "groups": {"rows_per_forward": rows}}
    for mode, rows in (("off", ROWS), ("off", 1), ("graphs", ROWS), ("graphs", 1), ("device", 1))
]


@pytest.mark.parametrize(
    "levers", LEVERS, ids=lambda changes: "-".join(str(v) for s in changes.values() for v in s.values())
)
@pytest.mark.parametrize("place", ["window", "tail"])
def test_nan_from_the_policy_masks_one_sample(place: str, levers: dict[str, Any]) -> None:
    """One row of one forward; the update must use the other seven as if it had not been there."""
    name = "velocity" if place == "window" else "fast_velocity"
    original = getattr(RetakePolicy, name)
    trainer, seen = trainer_with({"b": Brightness()}, **levers), []

    def poisoned(self: RetakePolicy, x: Tensor, timestep: Tensor, precomputed: Any) -> Any:
        velocity = original(self, x, timestep, precomputed)
        seen.append(len(x))
        # In one batch: the first forward of all rows. One by one: a group shares prefix and first window step, so the
        # fifth call is the window of row 2; the sixth of a tail is that of row 1.
        alone = len(seen) == (5 if place == "window" else 6) and len(x) == 1
        if alone or (len(x) == ROWS and seen.count(ROWS) == 1):
            velocity.value[len(x) // 2].fill_(float("nan"))
        return velocity

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RetakePolicy, name, poisoned)
        metrics = trainer.step()
    assert metrics["failures/policy"] == 1 and metrics["reward/invalid_fraction"] == 1 / ROWS
    assert metrics["policy/skipped_updates"] == 0 and metrics["policy/grad_norm"] > 0
    assert_trained(trainer)


def without_updates(trainer: Trainer) -> None:
    """Every gradient from now on is infinite."""
    backward = trainer.engine.backward
    trainer.engine.backward = lambda loss: backward(loss * math.inf)  # type: ignore[method-assign]


def test_a_run_that_no_longer_learns_stops_and_says_so() -> None:
    """Skipped iterations count in a row and over a checkpoint; one update in between begins anew."""
    trainer = trainer_with({"b": Brightness()}, failures={"max_skipped_updates": 3})
    healthy = trainer.engine.backward
    for skipped in (True, False, True, True):
        trainer.engine.backward = healthy  # type: ignore[method-assign]
        if skipped:
            without_updates(trainer)
        assert trainer.step()["policy/skipped_updates"] == float(skipped)
    other = trainer_with({"b": Brightness()}, failures={"max_skipped_updates": 3})
    other.load(trainer.state())
    for one in (trainer, other):
        without_updates(one)
        with pytest.raises(RunError, match=r"iteration 4: every update of the last 3 iterations .* weights are finite"):
            one.step()


def test_weights_that_are_not_finite_are_named() -> None:
    trainer = trainer_with({"b": Brightness()}, failures={"max_invalid_fraction": 1.0, "max_skipped_updates": 2})
    name, parameter = next(iter(trainer.engine.trained.items()))
    with torch.no_grad():
        parameter.fill_(math.nan)
    assert trainer.step()["policy/skipped_updates"] == 1
    with pytest.raises(RunError, match=rf"iteration 1: .*max_skipped_updates=2.* 1 of \d+ .*the first is {name}"):
        trainer.step()


@pytest.fixture
def hanging() -> Iterator[Faulty]:
    scorer = Faulty({1: "hang"})
    yield scorer
    scorer.release.set()


def test_a_late_scorer_costs_its_batch_and_the_run_goes_on(hanging: Faulty) -> None:
    trainer = trainer_with({"b": GuardedReward(hanging, timeout_s=1.0, retries=2)})
    failures = []
    for number in range(3):
        if number == 2:
            hanging.release.set()
            guarded = trainer.rewards["b"]
            assert isinstance(guarded, GuardedReward) and guarded._hung is not None
            guarded._hung.join(PATIENCE_S)
            guarded.timeout_s = PATIENCE_S  # what follows is not about time
        failures.append(trainer.step()["failures/b"])
    assert failures == [0, ROWS, 0]
    assert_trained(trainer)


def test_a_scorer_that_raises_once_is_asked_again() -> None:
    scorer = Faulty({0: "raise"})
    trainer = trainer_with({"b": GuardedReward(scorer, retries=1)})
    metrics = trainer.step()
    assert metrics["failures/b"] == 0 and scorer.calls == 2
    assert [metrics[f"failures/b/{kind}"] for kind in ("retries", "errors", "timeouts")] == [1, 1, 0]


def test_nan_scores_mask_their_samples_and_leave_the_other_scorers_alone() -> None:
    trainer = trainer_with({"bad": Faulty({0: "nan"}), "good": Brightness()})
    metrics = trainer.step()
    assert metrics["failures/bad"] == 1 and metrics["failures/good"] == 0
    assert metrics["reward/invalid_fraction"] == 1 / ROWS
    assert_trained(trainer)


def test_a_scorer_that_keeps_failing_stops_the_run_and_is_named() -> None:
    trainer = trainer_with({"b": GuardedReward(Faulty(dict.fromkeys(range(99), "raise")))}, failures={})
    with pytest.raises(
        RunError, match=r"iteration 0: 100% of the samples are invalid \(b: 8\); .*max_invalid_fraction"
    ):
        trainer.step()


class Pair:
    """Two keys, given in another order than named, and a part; singly asked, it fails on the chosen samples."""

    name, keys = "pair", ("mean", "spread")

    def __init__(self, bad: set[int]) -> None:
        self.bad, self.calls = bad, -1

    def __call__(self, videos: Tensor, batch: RetakeBatch) -> RewardOutput:
        self.calls += 1
        if self.bad and (len(videos) > 1 or self.calls - 1 in self.bad):
            raise RuntimeError("CUDA out of memory")
        mean, spread = videos.double().mean((1, 2, 3, 4)), videos.double().std((1, 2, 3, 4))
        valid = torch.ones(len(videos), dtype=torch.bool)
        return RewardOutput({"spread": spread, "mean": mean}, valid, {"percent": 100 * mean}, {"seen": spread})


@pytest.mark.parametrize("bad", [{4}, {4, 5, 6, 7}], ids=["first sample", "all samples"])
def test_a_scorer_that_fails_on_one_rank_is_as_if_it_failed_in_one_process(bad: set[int]) -> None:
    """The failing rank knows fewer names, in another order; its neighbour must not take one column for another.

    Videos are float32, so a batch of other size moves a score by 1e-7, and an advantage by that over a spread of 1e-2.
    """

    def work(ranks: Ranks) -> tuple[dict[str, float], Tensor]:
        first = ranks.rank * ROWS // ranks.size
        here = {row - first for row in bad if first <= row < first + ROWS // ranks.size}
        changes = {"failures": {"max_invalid_fraction": 1.0}, "scoring": {"chunk": ROWS}}
        config = smoke(window=WINDOW, advantage={"weights": {}}, **changes)
        trainer = trainer_of(config, ranks, rewards={"p": GuardedReward(Pair(here), retries=0)})
        metrics = trainer.step()
        return metrics, gradient_of(trainer)

    expected, gradient = work(LocalRanks())
    for found, other in on_fake_ranks(2, work):
        for key in ("mean", "spread", "percent", "p/seen", "invalid_fraction"):
            assert found[f"reward/{key}"] == pytest.approx(expected[f"reward/{key}"], rel=1e-5)
        assert found["failures/p"] == expected["failures/p"] == len(bad)
        assert float((other - gradient).norm() / gradient.norm()) < 1e-3


def run_config(tmp_path: Path, *more: str) -> list[str]:
    return [
        "train", "--config", "smoke", f"run.dir={tmp_path / 'run'}", f"data.root={tmp_path / 'data'}",
        "world.clips=24", *more,
    ]  # fmt: skip


def test_a_clip_that_disappears_is_drawn_again_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the clips go after the first iteration: one run tolerates it, the other stops with the list of causes."""
    monkeypatch.chdir(tmp_path)
    original, clips = Trainer.step, tmp_path / "data"
    removed: list[Path] = []

    def step(self: Trainer) -> dict[str, float]:
        if self.iteration == 1 and not removed:
            for video in sorted(clips.rglob("*.mp4"))[::2]:
                removed.append(video)
                video.rename(video.with_suffix(".gone"))
        return original(self)

    monkeypatch.setattr(Trainer, "step", step)
    arguments = run_config(tmp_path, "data.clips.keep_decoded_mb=0", "train.iterations=7", "eval.samples=10")
    assert main([*arguments, "data.clips.max_bad_fraction=1"]) == 0
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 7 and rows[-1]["data/bad_clips"] >= 2
    capsys.readouterr()
    removed.clear()  # the next run renders what is missing of the world
    arguments[3] = f"run.dir={tmp_path / 'strict'}"
    assert main([*arguments, "data.clips.max_bad_fraction=0"]) == 1
    message = capsys.readouterr().err
    assert "clips" in message and message.count("error:") == 1 and "Traceback" not in message


def test_a_full_disk_stops_the_run_and_keeps_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    original, calls = checkpoints.save_sealed, []

    def full(*args: Any, **options: Any) -> str:
        calls.append(1)
        if len(calls) > 3:  # the first checkpoint has three files
            raise OSError(28, "No space left on device")
        return original(*args, **options)

    config = smoke(
        run={"dir": tmp_path / "run"}, data={"root": tmp_path / "data"}, train={"iterations": 4, "checkpoint_every": 1}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "save_sealed", full)
        with pytest.raises(CheckpointError, match=r"No space left on device\); free disk space, then --resume auto"):
            run_training(config)
    found = checkpoints.list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [path.name for path in found] == ["step_000001"]
    run_training(config, resume="auto")
    assert [row["iteration"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2, 3]

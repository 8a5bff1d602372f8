"""A reward in a process of its own: equal scores, its own environment, crashes and time-outs that stay there."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from patience import PATIENCE_S
from repository import ROOT
from reward_cases import BAD, batch_of, honest, videos_of

from geoalign.config.rewards import RewardConfig
from geoalign.errors import RewardError
from geoalign.rewards.base import RewardOutput
from geoalign.rewards.registry import build_rewards
from geoalign.rewards.running.exchange import exchange
from geoalign.rewards.running.guard import GuardedReward
from geoalign.rewards.running.turns import score_all
from geoalign.rewards.running.worker import (
    WorkerReward,
    choose_device,
    load_output,
    load_request,
    save_output,
    save_request,
    serve,
)


@pytest.fixture(scope="module")
def worker_module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("worker")
    (folder / "stand_in_scorer.py").write_text(
        "import os, time, torch\n"
        "from geoalign.rewards.base import RewardOutput\n"
        "class Scorer:\n"
        "    name, keys = 'mean', ('mean',)\n"
        "    def __init__(self, offset): self.offset = offset\n"
        "    def __call__(self, videos, batch):\n"
        "        print('scorers may print')\n"
        "        first = videos.flatten(1)[:, 0]\n"
        "        if (first == 0.75).any(): time.sleep(600)\n"
        "        if (first == 0.875).any(): os._exit(3)\n"
        "        if (first == 0.625).any(): raise ValueError('bad pixels')\n"
        "        lengths = torch.tensor([float(len(p)) for p in batch.prompts])\n"
        "        score = videos.flatten(1).mean(1) + lengths + self.offset\n"
        "        flag = torch.full((len(score),), float(os.environ.get('ONLY_THERE', 'nan')))\n"
        "        return RewardOutput({'mean': score}, torch.ones(len(score), dtype=torch.bool), {'env': flag})\n"
        "class Meeting(Scorer):\n"
        "    def __init__(self, folder, me, other):\n"
        "        self.mine, self.theirs, self.offset = os.path.join(folder, me), os.path.join(folder, other), 0.0\n"
        "    def __call__(self, videos, batch):\n"
        "        open(self.mine, 'w').close()\n"
        "        end = time.monotonic() + 600\n"
        "        while not os.path.exists(self.theirs):\n"
        "            if time.monotonic() > end: raise RuntimeError('nobody came')\n"
        "            time.sleep(0.01)\n"
        "        return super().__call__(videos, batch)\n"
    )
    return folder


def environment_of(folder: Path) -> dict[str, str]:
    return {"ONLY_THERE": "7", "PYTHONPATH": f"{folder}:{ROOT}"}


def test_worker_scores_equally_in_its_own_environment_and_survives_failures(worker_module: Path) -> None:
    worker = WorkerReward(
        "mean",
        ("mean",),
        "stand_in_scorer:Scorer",
        options={"offset": 0.0},
        environment=environment_of(worker_module),
        timeout_s=PATIENCE_S,
    )
    try:
        videos, batch = videos_of(3), batch_of(3)
        out = worker(videos, batch)
        assert torch.equal(out.scores["mean"], honest(videos, batch)) and out.parts["env"].tolist() == [7.0] * 3
        with pytest.raises(RewardError, match="ValueError: bad pixels"):
            worker(torch.full_like(videos, 0.625), batch)
        assert worker.starts == 1  # an exception does not cost the process
        worker.timeout_s = 0.5
        guarded = GuardedReward(worker, retries=1)
        assert not guarded(torch.full_like(videos, BAD), batch).valid.any()
        assert (guarded.counts.timeouts, guarded.counts.invalid) == (1, 3)
        worker.timeout_s = PATIENCE_S
        assert torch.equal(guarded(videos, batch).scores["mean"], honest(videos, batch))
        assert worker.starts == 2
        with pytest.raises(RewardError, match="ended without an answer"):
            worker(torch.full_like(videos, 0.875), batch)
        folder = worker._folder
    finally:
        worker.close()
    assert folder is not None and not folder.exists()


def test_workers_of_different_rewards_score_at_the_same_time(worker_module: Path, tmp_path: Path) -> None:
    """Each waits until the other has begun, so one after another would never answer."""
    workers = {
        me: WorkerReward(
            me,
            ("mean",),
            "stand_in_scorer:Meeting",
            options={"folder": str(tmp_path), "me": me, "other": other},
            environment=environment_of(worker_module),
        )
        for me, other in (("a", "b"), ("b", "a"))
    }
    try:
        videos, batch = videos_of(3), batch_of(3)
        for output in score_all(workers, videos, batch).outputs.values():
            assert output.valid.all() and torch.equal(output.scores["mean"], honest(videos, batch))
    finally:
        for worker in workers.values():
            worker.close()


@pytest.mark.parametrize(
    ("program", "timeout_s", "answer"),
    [
        ("print(input() + '!', flush=True)", PATIENCE_S, "ask!\n"),
        ("import os; input(); os.write(1, b'par'); os._exit(3)", PATIENCE_S, ""),
        ("input(); print('', end='', flush=True); input()", 0.5, None),
    ],
    ids=["answers", "ends within a line", "says nothing"],
)
def test_a_process_is_asked_line_by_line(program: str, timeout_s: float, answer: str | None) -> None:
    command, pipe = [sys.executable, "-S", "-c", program], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert exchange(process, "ask", timeout_s, process.kill) == answer
        process.kill()


def test_an_answer_stays_when_the_next_one_overwrites_its_file(tmp_path: Path) -> None:
    path, valid = tmp_path / "answer.safetensors", torch.ones(1, dtype=torch.bool)
    save_output(path, RewardOutput({"s": torch.zeros(1)}, valid, {"part": torch.ones(1)}, lost=valid))
    first = load_output(path, torch.device("cpu"))
    save_output(tmp_path / "next", RewardOutput({"s": torch.zeros(1)}, valid, {"part": torch.full((1,), 2.0)}))
    with path.open("r+b") as file:  # the same file, as other versions of the library write it
        file.write((tmp_path / "next").read_bytes())
    assert float(first.parts["part"]) == 1.0 and first.lost.tolist() == [True]
    assert load_output(path, torch.device("cpu")).lost.tolist() == [False] and first.cameras is None
    read = torch.rand(1, 5, 4, 4)
    save_output(path, RewardOutput({"s": torch.zeros(1)}, valid, cameras=read))
    assert torch.equal(load_output(path, torch.device("cpu")).cameras, read)


@pytest.mark.parametrize("fps", [None, 29.97])
def test_a_worker_is_told_the_frame_rate(fps: float | None, tmp_path: Path) -> None:
    save_request(tmp_path / "request", videos_of(2), replace(batch_of(2), fps=fps))
    assert load_request(tmp_path / "request")[1].fps == fps


def test_no_worker_outlives_rewards_that_cannot_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[WorkerReward] = []
    original = WorkerReward.start
    monkeypatch.setattr(WorkerReward, "start", lambda self: (started.append(self), original(self))[1])
    good = RewardConfig(kind="geometry", options={"evaluator": "planar"}, placement="worker")
    bad = RewardConfig(kind="hpsv3", options={"checkpoint": "none", "tokenizer": "none"})
    with pytest.raises(RewardError):
        build_rewards({"good": good, "bad": bad})
    assert len(started) == 1 and started[0]._process is None


def test_a_worker_whose_training_was_killed_ends_without_a_word() -> None:
    asked, answers = os.pipe()
    os.close(asked)  # nobody reads any more
    requests = io.StringIO("\n\n")
    serve({"factory": "builtins:dict", "options": {}}, requests, os.fdopen(answers, "w"))
    assert requests.read() == "\n"  # the second request was not looked at


def test_workers_of_a_machine_spread_over_the_devices_they_may_see() -> None:
    ranks = [{"LOCAL_RANK": str(rank)} for rank in range(4)]
    assert [choose_device(environment, 4) for environment in ranks] == [0, 1, 2, 3]  # dedicated devices
    assert [choose_device(environment, 2) for environment in ranks] == [0, 1, 0, 1]
    assert [choose_device(environment, 1) for environment in ranks] == [0, 0, 0, 0]
    assert choose_device({}, 8) == 0 and choose_device(ranks[3], 0) is None

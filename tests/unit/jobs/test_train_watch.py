"""What is seen of a run: rank 0 writes rows, asks for films and traces one iteration; other ranks leave no trace."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from geoalign.config.load import load_config
from geoalign.config.schema import Config
from geoalign.jobs import train_watch


def iterate(folder: Path, rank: int, monkeypatch: pytest.MonkeyPatch) -> tuple[list[bool], list[int]]:
    """Three watched iterations of no trainer; which were asked for a film, and which were traced."""
    traced = []

    def profiled(trainer: Any, where: Path) -> torch.no_grad:
        assert where == folder
        traced.append(trainer.iteration)
        return torch.no_grad()

    monkeypatch.setattr(train_watch, "profiled", profiled)
    config = load_config(Config, "smoke", [f"run.dir={folder}", "run.films_every=2", "train.iterations=4"])
    trainer: Any = SimpleNamespace(ranks=SimpleNamespace(rank=rank), iteration=1, film_wanted=False, film=None)
    wanted = []
    with train_watch.watched(config, trainer, profile=2) as watch:
        while trainer.iteration < 4:
            with watch.iteration(trainer):
                wanted.append(trainer.film_wanted)
                trainer.iteration += 1
            watch.saw(trainer, {"policy/loss": 0.5})
    return wanted, traced


def test_rank_0_writes_rows_and_asks_for_films_and_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert iterate(tmp_path, 0, monkeypatch) == ([False, True, True], [2])  # every second one, and the last
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2, 3] and rows[0]["policy/loss"] == 0.5
    assert list((tmp_path / "tb").iterdir())


def test_other_ranks_see_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert iterate(tmp_path, 1, monkeypatch) == ([False] * 3, [])
    assert not list(tmp_path.iterdir()) and capsys.readouterr() == ("", "")

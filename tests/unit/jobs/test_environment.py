"""What a run folder keeps of its machine: the processes, as the report reads them back."""

from __future__ import annotations

import pytest

from geoalign.jobs.environment import describe_processes
from geoalign.report.run_folder import Started
from geoalign.training.processes.launcher import FOLDER


@pytest.mark.parametrize(
    ("environment", "started"),
    [
        ({}, Started(1)),
        ({"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}, Started(1)),
        ({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, Started(16, 2, torchrun=True)),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}, Started(8, 1, torchrun=True)),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", FOLDER: "/tmp/x"}, Started(4)),
    ],
)
def test_processes_are_kept_as_they_were_started(
    environment: dict[str, str], started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", FOLDER):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Started.parse(describe_processes()) == started

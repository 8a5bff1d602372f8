"""Cases as files, and the folder of environments that the tools are looked for in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from geoalign.benchmark.records import CaseFiles, Tool
from geoalign.benchmark.tools.load import load_tools
from geoalign.benchmark.tools.settings import FOLDER_VARIABLE
from geoalign.config.benchmark import BenchmarkConfig
from geoalign.data.video import write_video

FRAMES, SIZE = 5, 32


@pytest.fixture
def environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of environments; what speaks of another environment must not reach the tools."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "environments"))
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    for name, value in {"RANK": "3", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    return tmp_path / "environments"


@pytest.fixture
def case_files(tmp_path: Path) -> CaseFiles:
    """Grey films, the source 51 levels darker than the retake."""
    for name, level in (("source", 102), ("retake", 153)):
        frames = torch.full((FRAMES, SIZE, SIZE, 3), level, dtype=torch.uint8)
        write_video(tmp_path / f"{name} film.mp4", frames, 12, lossless=True)
    return CaseFiles(
        "base__bear_camera_1_speed_1", tmp_path / "source film.mp4", tmp_path / "retake film.mp4",
        tmp_path / "target.npz", FRAMES,
    )  # fmt: skip


@pytest.fixture
def tool(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """``tool("vipe", "worker", retries=0)``: a built-in one with other settings of its worker, ended by the test."""
    opened: list[Any] = []

    def build(name: str, worker: str = "worker", **settings: Any) -> Tool:
        import yaml

        from geoalign.benchmark.tools import settings as module

        base = Path(module.__file__).parent / "definitions" / f"{name}.yaml"
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump({"extends": str(base), "workers": {worker: settings}}))
        opened.extend(load_tools(BenchmarkConfig(tools=(str(file),))))
        return opened[-1]

    yield build
    for each in opened:
        each.close()

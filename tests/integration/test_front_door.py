"""What a newcomer does after the demo: the README's chain, every block of docs/api.md, every example."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import PATIENCE_S
from repository import ROOT

from geoalign.cli.main import main
from geoalign.data.video import PyAVReader
from geoalign.geometry.cameras.door import open_camera
from geoalign.policy.open import open_policy

CHAIN = [
    line.strip()
    for line in re.search(r"### The chain\n(.*?)\n##", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)[
        1
    ].splitlines()
    if line.startswith("    geoalign ")
]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text("utf-8"), re.DOTALL)
EXAMPLES = {
    "own_attention.py": ([], r"out \(2, 120, 64\)"),
    "retake_clip.py": (["runs/tiny_cpu", "clip.mp4"], r"retake.mp4: 5 frames, \d+\.\d\d m and"),
    "score_folder.py": ([".", "errors.png"], r"errors.png: \d retakes, the best is"),
    "train_own_reward.py": (["smoke", "train.iterations=1"], r"rewards/light: runs/own_reward"),
}


@pytest.fixture(scope="module")
def after_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `make demo` leaves it (at the size of smoke, under the demo's name), and a clip of it by its side."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "--config", "smoke", "run.name=tiny_cpu"]) == 0
    clip = sorted((folder / "data" / "smoke").rglob("*.mp4"))[0]
    for suffix in (".mp4", ".npz"):
        shutil.copy(clip.with_suffix(suffix), folder / f"clip{suffix}")
    return folder


def test_the_chain_of_the_readme(
    after_demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every line as it is printed, but for the name of the clip; nobody types a plane."""
    monkeypatch.chdir(after_demo)
    assert [line.split()[1] for line in CHAIN] == ["sample", "score", "export", "sample"]
    printed = []
    for line in CHAIN:
        assert "plane" not in line
        assert main(line.split("#")[0].replace("$CLIP", "clip.mp4").split()[1:]) == 0, line
        printed.append(capsys.readouterr())
    assert "poses, lens, ground plane from clip.npz, found beside the video" in printed[0].out
    assert "source   clip.mp4, its camera told by out.json" in printed[1].err
    record = json.loads((after_demo / "out.json").read_text())
    plane = open_camera("clip.npz", image_size=(48, 64)).window(range(5))[1]
    torch.testing.assert_close(torch.tensor(record["ground_plane"]), plane.float(), atol=1e-5, rtol=0)
    assert printed[0].out.splitlines()[1:3] == printed[3].out.splitlines()[1:3]
    first, last = (open_policy(name).model.state_dict() for name in ("runs/tiny_cpu", "exported"))
    assert first.keys() == last.keys() and all(torch.equal(first[name], last[name]) for name in first)
    card = (after_demo / "exported" / "README.md").read_text("utf-8")
    assert "builtin:tiny_base" in card and "| Position error (m) |" in card and "commit" in card


def test_every_block_of_the_page_runs(after_demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = after_demo.parent / "page"
    shutil.copytree(after_demo, home, ignore=shutil.ignore_patterns("exported*", "out*"))
    monkeypatch.chdir(home)
    names: dict[str, Any] = {}
    for block in BLOCKS:
        exec(compile(block, "docs/api.md", "exec"), names)
    assert len(BLOCKS) >= 8 and (home / "out.mp4").is_file() and names["folder"] == Path("runs/mine")
    assert names["rows"][0]["valid"] and names["estimate"].c2w.shape == (1, 5, 4, 4)
    assert torch.equal(names["again"].model.patch_embedding.weight, names["policy"].model.patch_embedding.weight)
    bright = names["Brightness"](wanted=0.5)(torch.zeros(2, 5, 3, 8, 8), names["retake"].batch)
    torch.testing.assert_close(bright.scores["bright"], torch.tensor([-0.5, -0.5]))


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_an_example_runs(name: str, after_demo: Path) -> None:
    """In the order of their names, so that the folder to score has a retake in it."""
    arguments, expected = EXAMPLES[name]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / name, *arguments],
        cwd=after_demo, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(expected, done.stdout), done.stdout


def test_every_example_is_run_and_fits_a_screen() -> None:
    elsewhere = {"dropin_diffusers.py", "dropin_flow_grpo.py", "kernels_alone.py"}  # tests/integration/test_dropin.py
    elsewhere |= {"realcam_vid.py"}  # tests/unit/benchmark/test_other_benchmarks.py
    files = {path.name: path for path in (ROOT / "examples").glob("*.py")}
    assert set(files) == set(EXAMPLES) | elsewhere
    assert all(len(files[name].read_text("utf-8").splitlines()) <= 50 for name in EXAMPLES)


def test_the_best_of_several_is_kept(
    after_demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(after_demo)
    (after_demo / "best").mkdir()
    common = [
        "sample",
        "--model",
        "runs/tiny_cpu",
        "--video",
        "clip.mp4",
        "--trajectory",
        "zoom_in",
        "--speed",
        "8",
        "--steps",
        "4",
    ]
    assert main([*common, "--out", "best/b.mp4", "--seed", "3", "--best-of", "3", "--keep-all"]) == 0
    found = json.loads((after_demo / "best" / "b.json").read_text())["best_of"]
    assert [row["seed"] for row in found["scores"]] == [3, 4, 5]
    for row in found["scores"]:
        assert row["total"] == pytest.approx(row["score/trans"] + row["score/rot"])
    assert found["seed"] == max(found["scores"], key=lambda row: row["total"])["seed"]
    assert main([*common, "--out", "best/alone.mp4", "--seed", str(found["seed"])]) == 0
    reader = PyAVReader()
    kept, alone, candidate = (
        reader.read(after_demo / "best" / name, range(5)).float()
        for name in ("b.mp4", "alone.mp4", f"b.seed{found['seed']}.mp4")
    )
    # Equal pixels, but a lossy encoding is not quite a function of them (docs/log.md).
    assert (kept - alone).abs().mean() < 1 and (kept - candidate).abs().mean() < 1
    assert len(list((after_demo / "best").glob("b.seed*.mp4"))) == 3
    capsys.readouterr()
    for wrong, text in (
        ("--best-of 0", "at least 1"),
        ("--keep-all", "--best-of N"),
        ("--reward geometri --best-of 2", "geometry"),
    ):
        assert main([*common, "--out", "w.mp4", *wrong.split()]) == 2
        assert text in capsys.readouterr().err
    assert not (after_demo / "w.mp4").exists()

"""What a run needs: what is there and usable, what is said of the rest, and that the advice can work."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benchmark_cases import davis
from repository import ROOT

from geoalign.cli.main import main
from geoalign.config.load import load_config
from geoalign.config.packages import BASE as PACKAGES
from geoalign.config.published import BASE, CAMERAS, DATA, DAVIS, OTHERS, REDIRECTOR, VIDEOALIGN, WEIGHTS
from geoalign.config.schema import Config
from geoalign.files.check import Check
from geoalign.install import install
from geoalign.jobs.checks import collect

OWN = "put it there, or name the one that you have"


@pytest.fixture
def look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Check]]:
    """``look(preset, *settings)``: what is found in an empty folder, by name."""
    monkeypatch.chdir(tmp_path)
    return lambda *words: {check.name: check for check in collect(load_config(Config, words[0], list(words[1:])))}


def test_a_download_is_advised_only_for_the_names_that_it_has(look: Callable[..., dict[str, Check]]) -> None:
    published = look("single_gpu")
    assert published["weights trained on the base"].fix == REDIRECTOR.line("weights/redirector")
    assert published["base weights"].fix == published["video autoencoder"].fix == BASE.line()
    assert published["tokenizer"].fix == published["text encoder"].fix == BASE.line()
    moved = look("single_gpu", "train.delta=/a b/step20000.safetensors")
    assert moved["weights trained on the base"].fix == REDIRECTOR.line("/a b")
    own = look(
        "single_gpu", "train.delta=runs/x/delta.safetensors", "data.prepare.text=w/text_encoder",
        "data.prepare.image=w/image_encoder", "data.prepare.tokenizer=w/tokenizer", "train.base=w/policy.safetensors",
        "rewards.videoalign.options.checkpoint=runs/v.pth", "rewards.hpsv3.options.checkpoint=runs/h.safetensors",
        "rewards.geometry.options.evaluator_options.checkpoint=w/pose.safetensors",
    )  # fmt: skip
    for name in (
        "weights trained on the base", "text encoder", "tokenizer", "image encoder", "base weights",
        "video autoencoder",
        "VideoAlign weights (rewards.videoalign)", "HPSv3 weights (rewards.hpsv3)",
        "MapAnything weights (rewards.geometry)",
    ):  # fmt: skip
        assert (own[name].state, own[name].fix) == ("absent", OWN), name
    assert VIDEOALIGN.line_for(Path("/w/checkpoint-11352/model.pth")) == VIDEOALIGN.line("/w")


@pytest.mark.parametrize("left", [(), ("metadata/table.csv",), (".cache/huggingface/x", "metadata/table.csv")])
def test_a_folder_without_cameras_holds_no_camera_paths(
    left: tuple[str, ...], look: Callable[..., dict[str, Check]], tmp_path: Path
) -> None:
    folder = tmp_path / "data" / "citywalk" / "trajectories"
    for name in left:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("UID,FPS\n")
    assert (found := look("single_gpu")["camera paths"]).state == "absent" and found.fix == CAMERAS.line()
    archive = folder / "annotations" / "0123456789ab" / "0123456789ab_others.tar.gz"
    archive.parent.mkdir(parents=True)
    archive.write_bytes(b"")
    assert look("single_gpu")["camera paths"].what.startswith("data/citywalk/trajectories: 1 archives")


def test_clips_of_the_benchmark_are_listed_and_so_is_their_list(
    look: Callable[..., dict[str, Check]], tmp_path: Path
) -> None:
    (tmp_path / "data" / "davis").mkdir(parents=True)
    empty = look("davis")
    assert empty["benchmark clips"].state == "wrong" and empty["benchmark clips"].fix == DAVIS.line()
    assert empty["list of clips"].state == "absent"
    shutil.rmtree(tmp_path / "data" / "davis")
    davis(tmp_path / "data" / "davis", {"bear": 3, "dog": 3})
    (tmp_path / "data" / "davis" / "clips.txt").write_text("bear  # one\n\n")
    found = look("davis")
    assert "data/davis: 2 clips" in found["benchmark clips"].what
    assert (found["list of clips"].state, found["list of clips"].what) == ("present", "data/davis/clips.txt: 1 names")


def test_the_disk_has_room_for_what_is_still_to_be_fetched(
    look: Callable[..., dict[str, Check]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an empty machine: the table of docs/real-weights.md, every row once; what lies in the home, only there."""
    rows = [row for row in (*WEIGHTS, *DATA) if row is not DAVIS]
    total = sum(row.gigabytes for row in rows)
    for free, state in ((total + 17.1, "wrong"), (total + 17.5, "present")):  # 17.2 for checkpoints and result
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free * 1e9))
        found = look("single_gpu")["disk"]
        assert found.state == state and f"{total:.1f} GB still to be fetched" in found.what, found.what
    assert not {row.title for row in OTHERS} & {row.title for row in rows}


def test_checkpoints_that_are_there_are_not_asked_for_again(
    look: Callable[..., dict[str, Check]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two of three checkpoints and the result are written: of the 17.2 GB these 8 are not asked for again."""
    sizes = {"step_000001": 3.0, "step_000002": 4.0, "step_000002.aside-1": 9.0}
    for name, gigabytes in sizes.items():
        part = tmp_path / "runs" / "x" / "checkpoints" / name / "optimizer.safetensors"
        part.parent.mkdir(parents=True)
        with part.open("wb") as file:
            file.truncate(int(gigabytes * 1e9))  # holes, which take no room
    with (tmp_path / "runs" / "x" / "delta.safetensors").open("wb") as file:
        file.truncate(10**9)
    fetched = sum(row.gigabytes for row in (*WEIGHTS, *DATA) if row is not DAVIS)
    for free, state in ((fetched + 9.1, "wrong"), (fetched + 9.3, "present")):  # 17.2 - 8
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free * 1e9))
        found = look("single_gpu", "run.name=x")["disk"]
        assert found.state == state and "of which 8.0 GB are there" in found.what, found.what


@pytest.mark.parametrize(
    ("setting", "package"),
    [("run.attention=flash3", "flash_attn_interface"), ("run.attention=flash4", "flash_attn.cute"),
     ("run.attention=flash2", "flash_attn")],
)  # fmt: skip
def test_cores_that_are_asked_for_need_their_packages(
    setting: str, package: str, look: Callable[..., dict[str, Check]], monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "flash_attn", "flash_attn_interface", "flash_attn.cute")
    assert look("single_gpu", setting)[f"package {package}"].state == "absent"


def without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """As if packages were not installed."""
    original = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        return None if name in names else original(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


def test_a_package_of_every_installation_that_is_gone_is_a_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing else is looked at then: what looks imports it."""
    without(monkeypatch, "torch", "safetensors")
    monkeypatch.setattr("geoalign.jobs.checks.collect", lambda *_: pytest.fail("it would import torch"))
    assert main(["doctor", "--config", "single_gpu", "--json", str(tmp_path / "found.json")]) == 1
    rows = json.loads((tmp_path / "found.json").read_text())["checks"]
    assert [(row["name"], row["state"], row["fix"]) for row in rows] == [
        (f"package {name}", "absent", install()) for name in ("torch", "safetensors")
    ]
    assert "[ ] package torch" in capsys.readouterr().out


def test_the_packages_of_every_installation_are_those_that_it_asks_for() -> None:
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.match(r"[\w-]+", line)[0] for line in asked}  # type: ignore[index]
    imported = {"pyyaml": "yaml", "pillow": "PIL", "opencv-python-headless": "cv2"}
    assert {imported.get(name, name) for name in names} == {*PACKAGES, "triton"}


@pytest.mark.parametrize("package", ["pydantic", "yaml", "tqdm"])
def test_an_environment_without_a_package_is_one_line(package: str, tmp_path: Path) -> None:
    """In a process of its own, where it cannot be imported: doctor lists it, another verb names it."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        code = f"import sys; sys.modules[{package!r}] = None\n"
        code += "from geoalign.cli.main import main; sys.exit(main(sys.argv[1:]))"
        return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)

    found = run("doctor", "--config", "smoke", "--json", str(tmp_path / "found.json"))
    assert found.returncode == 1 and f"[ ] package {package}" in found.stdout, found.stderr
    assert [row["name"] for row in json.loads((tmp_path / "found.json").read_text())["checks"]] == [
        f"package {package}"
    ]
    if package != "tqdm":  # which only bars on a terminal need
        other = run("config", "print", "--config", "smoke")
        said = f"geoalign: error: package {package} is not installed; {install()}\n"
        assert (other.returncode, other.stderr) == (1, said)

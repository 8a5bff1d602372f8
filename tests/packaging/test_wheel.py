"""The built wheel is complete and works from any folder; the repository's layout cannot shadow other packages."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy, so that no build folder is left in the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached"], cwd=ROOT, capture_output=True, check=True
    ).stdout.decode()
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("tests/", "docs/")):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, copy]
    subprocess.run(command, check=True, timeout=300)
    return next(folder.glob("geoalign-*.whl"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean environment with the wheel; its dependencies are the ones installed here, found through a .pth file."""
    folder = tmp_path_factory.mktemp("clean") / "env"
    venv.create(folder, with_pip=False)
    site = next((folder / "lib").glob("python3*")) / "site-packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    here = importlib.util.find_spec("torch")
    assert here is not None and here.origin is not None
    (site / "dependencies.pth").write_text(f"{Path(here.origin).parents[1]}\n")
    return folder / "bin" / "python"


def run(python: Path, cwd: Path, *arguments: str) -> str:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [python, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_presets_sources_and_shipped_files(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    wanted = {name.replace("configs/", "geoalign/_presets/", 1) for name in tracked if name.startswith("configs/")}
    wanted |= {name.replace("csrc/", "geoalign_kernels/_csrc/", 1) for name in tracked if name.startswith("csrc/")}
    wanted |= {name for name in tracked if name.startswith("geoalign/")}
    wanted |= {name.removeprefix("kernels/") for name in tracked if name.startswith("kernels/geoalign_kernels/")}
    assert wanted <= names, sorted(wanted - names)
    strangers = {name.split("/")[0] for name in names} - {"geoalign", "geoalign_kernels"}
    assert all(name.endswith(".dist-info") for name in strangers)


@pytest.mark.parametrize("place", ["elsewhere", "repository"])
def test_the_installed_command_works_from_anywhere(python: Path, place: str, tmp_path: Path) -> None:
    cwd = tmp_path if place == "elsewhere" else ROOT
    code = "import geoalign, geoalign_kernels, pathlib; print(pathlib.Path(geoalign_kernels.__file__).parent)"
    assert "site-packages" in run(python, cwd, "-c", code)
    assert "name: tiny_cpu" in run(python, cwd, "-m", "geoalign", "config", "print", "--config", "tiny_cpu")


def test_the_installed_demo_trains_from_another_folder(python: Path, tmp_path: Path) -> None:
    """The demo's configuration, shortened: shipped base, world on disk, two iterations, report."""
    short = ["train.iterations=2", "eval.samples=10", "eval.noise_seeds=[11]", "world.clips=24"]
    code = "import sys; from geoalign.cli.main import main; sys.exit(main(sys.argv[1:]))"
    printed = run(python, tmp_path, "-c", code, "train", "--config", "tiny_cpu", *short)
    assert "report:" in printed and (tmp_path / "runs" / "tiny_cpu" / "report.html").stat().st_size > 100_000


def test_folders_of_the_repository_do_not_shadow_packages() -> None:
    """`kernels` is a published package that diffusers imports; `profiling` is in the standard library from 3.15 on."""
    for name in ("kernels", "profiling", "configs"):
        assert not (ROOT / name / "__init__.py").exists()
        spec = importlib.util.find_spec(name)
        assert spec is None or spec.origin is None or ROOT not in Path(spec.origin).parents

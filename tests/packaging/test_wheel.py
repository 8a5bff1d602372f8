"""The built wheels are complete and work from any folder; the repository's layout cannot shadow other packages."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from patience import PATIENCE_S
from repository import ROOT

from geoalign.version import __version__


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both wheels: the one that `make wheel` filled, else built from a copy of the tree."""
    if "GEOALIGN_WHEELS" in os.environ:
        return Path(os.environ["GEOALIGN_WHEELS"])
    folder = tmp_path_factory.mktemp("wheels")
    copy = folder / "source"
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached"], cwd=ROOT, capture_output=True, check=True
    ).stdout.decode()
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("tests/", "docs/")):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name, follow_symlinks=False)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder]
    subprocess.run([*command, copy, copy / "kernels"], check=True, timeout=PATIENCE_S)
    return folder


@pytest.fixture(scope="module")
def wheel(wheels: Path) -> Path:
    return next(wheels.glob("geoalign-*.whl"))


@pytest.fixture(scope="module")
def kernel_wheel(wheels: Path) -> Path:
    return next(wheels.glob("geoalign_kernels-*.whl"))


def clean_environment(folder: Path, wheel: Path) -> Path:
    """A virtual environment that holds the unpacked wheel alone; returns its folder of packages."""
    venv.create(folder, with_pip=False)
    site = next((folder / "lib").glob("python3*")) / "site-packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean environment with the wheel; its dependencies are the ones installed here, found through a .pth file."""
    folder = tmp_path_factory.mktemp("clean") / "env"
    site = clean_environment(folder, wheel)
    here = importlib.util.find_spec("torch")
    assert here is not None and here.origin is not None
    (site / "dependencies.pth").write_text(f"{Path(here.origin).parents[1]}\n")
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def kernel_python(kernel_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean environment with the kernel wheel, and of what is installed here only what its metadata asks for."""
    folder = tmp_path_factory.mktemp("kernels") / "env"
    site = clean_environment(folder, kernel_wheel)
    for name in needed(next(metadata.distributions(path=[str(site)])).requires):
        for file in metadata.files(name) or []:
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (site / top).exists():
                (site / top).symlink_to(Path(str(metadata.distribution(name).locate_file(top))))
    return folder / "bin" / "python"


def needed(requires: list[str] | None, found: set[str] | None = None) -> set[str]:
    """Names of the installed distributions that requirements lead to, extras left out."""
    found = set() if found is None else found
    for line in requires or []:
        requirement = Requirement(line)
        if requirement.name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found.add(requirement.name)
        needed(metadata.distribution(requirement.name).requires, found)
    return found


def run(python: Path, cwd: Path, *arguments: str) -> str:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [python, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=False
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


def test_the_kernel_wheel_holds_its_package_and_sources_alone(kernel_wheel: Path) -> None:
    with zipfile.ZipFile(kernel_wheel) as archive:
        names = set(archive.namelist())
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    wanted = {name.replace("csrc/", "geoalign_kernels/_csrc/", 1) for name in tracked if name.startswith("csrc/")}
    wanted |= {name.removeprefix("kernels/") for name in tracked if name.startswith("kernels/geoalign_kernels/")}
    assert {name for name in names if ".dist-info/" not in name} == wanted


KERNEL = """
import sys, torch, geoalign_kernels
from importlib import metadata, util
assert not util.find_spec("geoalign") and not util.find_spec("numpy") and not util.find_spec("diffusers")
x, weight = torch.randn(2, 5, 32, requires_grad=True), torch.ones(32)
y = geoalign_kernels.rms_norm(x, weight, 1e-6)
y.sum().backward()
torch.testing.assert_close(y, x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())
print(metadata.version("geoalign_kernels"), geoalign_kernels.report())
"""


def test_the_kernels_work_where_only_torch_and_triton_are(kernel_python: Path, tmp_path: Path) -> None:
    """What `pip install ./kernels` gives: the op runs, its gradient too, and the table of backends can be asked."""
    assert run(kernel_python, tmp_path, "-W", "ignore", "-c", KERNEL).startswith(__version__)
    assert run(kernel_python, tmp_path, "-W", "ignore", "-m", "geoalign_kernels.static", "--help")


def test_both_wheels_and_the_citation_have_the_one_version(wheels: Path) -> None:
    assert {path.name.split("-")[1] for path in wheels.glob("*.whl")} == {__version__}
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == __version__ and citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "license", "type"} <= set(citation)


@pytest.mark.parametrize("place", ["elsewhere", "repository"])
def test_the_installed_command_works_from_anywhere(python: Path, place: str, tmp_path: Path) -> None:
    cwd = tmp_path if place == "elsewhere" else ROOT
    code = "import geoalign, geoalign_kernels, pathlib; print(pathlib.Path(geoalign_kernels.__file__).parent)"
    assert "site-packages" in run(python, cwd, "-c", code)
    assert "name: tiny_cpu" in run(python, cwd, "-m", "geoalign", "config", "print", "--config", "tiny_cpu")


def test_the_installed_demo_trains_from_another_folder(python: Path, tmp_path: Path) -> None:
    """The demo's configuration, shortened: shipped base, world on disk, two iterations, report."""
    short = ["run.ranks=1", "train.iterations=2", "eval.samples=10", "eval.noise_seeds=[11]", "world.clips=24"]
    code = "import sys; from geoalign.cli.main import main; sys.exit(main(sys.argv[1:]))"
    printed = run(python, tmp_path, "-c", code, "train", "--config", "tiny_cpu", *short)
    assert "report:" in printed and (tmp_path / "runs" / "tiny_cpu" / "report.html").stat().st_size > 100_000


def test_folders_of_the_repository_do_not_shadow_packages() -> None:
    """`kernels` is a published package that diffusers imports; `profiling` is in the standard library from 3.15 on."""
    for name in ("kernels", "profiling", "configs"):
        assert not (ROOT / name / "__init__.py").exists()
        spec = importlib.util.find_spec(name)
        assert spec is None or spec.origin is None or ROOT not in Path(spec.origin).parents

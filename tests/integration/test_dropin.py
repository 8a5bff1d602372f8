"""The drop-in as its users run it: the examples, two ranks, and the kernel package installed alone."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from patience import PATIENCE_S

ROOT = Path(__file__).parents[2]


@pytest.mark.dist(groups=1)
def test_two_ranks_under_ddp_and_fsdp2(launch: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    process = launch(2, str(Path(__file__).with_name("dropin_rank_checks.py")), folder=tmp_path)
    printed, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, printed
    assert [line for line in printed.splitlines() if line.startswith("ok ")] == ["ok ddp", "ok fsdp2"]


def example(name: str, paths: list[Path], cwd: Path, *options: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, *options, str(ROOT / "examples" / name)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["dropin_flow_grpo.py", "dropin_diffusers.py"])
def test_examples_fit_a_screen_and_show_a_ratio_of_one(name: str, tmp_path: Path) -> None:
    assert len((ROOT / "examples" / name).read_text().splitlines()) <= 64
    printed = example(name, [ROOT, ROOT / "kernels"], tmp_path)
    assert "ratio before the update: 1.0 to 1.0" in printed
    assert "after the update" in printed


def test_the_kernel_package_alone_runs_its_example(tmp_path: Path) -> None:
    """Installed by itself into a folder; beside it only what it depends on is importable, and nothing else is used."""
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--target", str(tmp_path / "site")]
    copy = tmp_path / "repository"
    for part in ("kernels", "csrc", "setup.py", "geoalign/version.py"):
        files = subprocess.run(["git", "ls-files", part], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for file in files.split():
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, copy / file, follow_symlinks=False)
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, str(copy / "kernels")], check=True, timeout=PATIENCE_S
    )
    installed = {path.name for path in (tmp_path / "site").iterdir()}
    assert "geoalign_kernels" in installed and "geoalign" not in installed
    assert (tmp_path / "site" / "geoalign_kernels" / "_csrc" / "bindings.cpp").is_file()
    refuse = tmp_path / "sitecustomize.py"
    refuse.write_text(
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('geoalign', 'diffusers', 'transformers', 'pydantic', 'scipy', 'yaml'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
    )
    printed = example("kernels_alone.py", [tmp_path, tmp_path / "site"], tmp_path)
    assert "log-probability" in printed and "qk_norm_rotary" in printed
    assert importlib.util.find_spec("geoalign_kernels") is not None

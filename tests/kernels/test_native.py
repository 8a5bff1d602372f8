"""Build of the native code: the cache key, one build for many callers, messages without compilers, cubins."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import PATIENCE_S

from geoalign_kernels import native


def test_a_missing_compiler_gives_a_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv(native.CACHE_ENV, str(tmp_path / "cache"))
    with pytest.raises(native.NativeBuildError, match=r"neither g\+\+ nor clang\+\+ is on PATH; install"):
        native.build()
    assert native.main(["build"]) == 1
    assert "reference" in capsys.readouterr().err


def test_a_failing_compiler_shows_its_output(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "c++"
    fake.write_text(
        '#!/bin/sh\ncase "$1" in --version) echo fake 1;; *) echo "boom: no such header" >&2; exit 3;; esac\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    monkeypatch.setenv(native.CACHE_ENV, str(tmp_path / "cache"))
    with pytest.raises(native.NativeBuildError, match="boom: no such header"):
        native.build()
    assert not list((tmp_path / "cache").glob("*.so")), "a failed build must leave no library"


def test_a_library_is_built_once_and_again_when_a_source_or_the_compiler_changes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A stand-in compiler counts its calls: the key and the cache do not depend on what it writes."""
    log, fake, sources = tmp_path / "log", tmp_path / "c++", tmp_path / "csrc"
    fake.write_text(
        '#!/bin/sh\ncase "$1" in --version) echo fake 1; exit;; esac\n'
        f'case " $* " in *" -shared "*) echo built >> {log};; esac\nwhile [ "$1" != -o ]; do shift; done\n: > "$2"\n'
    )
    fake.chmod(0o755)
    sources.mkdir()
    (sources / "bindings.cpp").write_text("// one\n")
    monkeypatch.setenv("CXX", str(fake))
    monkeypatch.setenv(native.CACHE_ENV, str(tmp_path / "cache"))
    monkeypatch.setattr(native, "source_folder", lambda: sources)
    monkeypatch.setattr(native, "_compilers", lambda: (str(fake), None, ""))
    first = native.build()
    assert native.build() == first
    (sources / "bindings.cpp").write_text("// two\n")
    second = native.build()
    assert second != first
    fake.write_text(fake.read_text().replace("fake 1", "fake 2"))
    third = native.build()
    assert third not in (first, second)
    assert log.read_text().split() == ["built"] * 3

    # A machine without compilers takes what another one built of the same sources, the newest first.
    os.utime(second, (1, 1))
    monkeypatch.setattr(native, "_compilers", lambda: (None, None, "no C++ compiler"))
    assert native.build() == third
    # Those libraries have no CUDA part; one that has it serves both kinds of tensors, and goes first.
    assert (native.obstacle("cpu"), native.obstacle("cuda")) == ("", "no C++ compiler")
    monkeypatch.setattr(native, "_compilers", lambda: (str(fake), str(fake), ""))
    both = native.build()
    os.utime(both, (1, 1))
    monkeypatch.setattr(native, "_compilers", lambda: (None, None, "no C++ compiler"))
    assert native.build() == both not in (first, second, third)
    assert native.obstacle("cpu") == native.obstacle("cuda") == ""
    (sources / "bindings.cpp").write_text("// three\n")
    with pytest.raises(native.NativeBuildError, match=r"no C\+\+ compiler"):
        native.build()
    assert native.obstacle("cpu") == "no C++ compiler"
    # Only the CUDA part is out of reach without nvcc.
    monkeypatch.setattr(native, "_compilers", lambda: (str(fake), None, "no CUDA compiler"))
    assert (native.obstacle("cpu"), native.obstacle("cuda")) == ("", "no CUDA compiler")
    assert native.build() not in (first, second, third)
    # All compilers, but a torch without CUDA.
    monkeypatch.setattr(native, "_compilers", lambda: (str(fake), None, ""))
    assert native.obstacle("cpu") == "" and "has no CUDA" in native.obstacle("cuda")


@pytest.mark.aot
@pytest.mark.parametrize("target", native.TARGETS)
def test_the_cuda_kernel_compiles_without_spills(target: str, tmp_path: Path) -> None:
    out = tmp_path / "kernel.cubin"
    try:
        native.cuda_compiler()
    except native.NativeBuildError:
        with pytest.raises(native.NativeBuildError, match="no CUDA compiler: nvcc"):
            native.compile_cubin(target, out)
        return
    report = native.compile_cubin(target, out)
    assert out.read_bytes()[:4] == b"\x7fELF"
    assert f"'{target}'" in report
    assert re.findall(r"(\d+) bytes spill (?:stores|loads)", report) == ["0", "0"]


@pytest.mark.aot
def test_the_library_with_its_cuda_part_loads_into_a_torch_without_cuda(tmp_path: Path) -> None:
    """Every symbol resolves in torch's CPU library, so no part of it depends on how torch's CUDA library is loaded. It
    holds machine code for both targets and PTX for later ones, and its CPU part works."""
    try:
        nvcc = native.cuda_compiler()
    except native.NativeBuildError:
        return  # the test above holds the message
    with_cuda = (
        "import torch, geoalign_kernels.native as n\n"
        f"n._compilers = lambda: (n.compiler(), {nvcc!r}, '')\n"
        "log, run = [], n._run\n"
        "n._run = lambda command: (log.append(' '.join(command)), run(command))[1]\n"
    )
    checks = (
        "assert n.load('cuda').name.split('-')[2] == 'cuda', n.load('cuda')\n"
        "print([line for line in log if '-gencode' in line][0])\n"
    )
    done = python(with_cuda + CASE + checks, tmp_path, str(tmp_path / "results"))
    assert done.returncode == 0, done.stderr
    for code in ("compute_80,code=sm_80", "compute_90,code=sm_90", "compute_90,code=compute_90"):
        assert f"-gencode=arch={code}" in done.stdout.split(), done.stdout


NO_COMPILER = """
import logging, os, sys, torch
logging.basicConfig(stream=sys.stdout, format="%(name)s %(message)s")
import geoalign_kernels as gk
plan = gk.frame_plan((30, 40), 2, gk.CropTarget((28, 28), (14, 28), (7, 0)), (28, 56), geometry_frames=(0,),
                     clip_frames=(), still_frames=(1,), geometry_statistics=((0.5,) * 3, (0.5,) * 3),
                     patch_statistics=((0.5,) * 3, (0.5,) * 3))
video = torch.zeros(1, 2, 3, 30, 40)
for _ in range(3):
    got = gk.frame_preprocess(video, plan)
with gk.use_backend("reference"):
    assert all(torch.equal(a, b) for a, b in zip(got, gk.frame_preprocess(video, plan)))
row = next(row for row in gk.report("cpu") if row["op"] == "frame_preprocess")
print("REPORT", row["backend"], row["missing"])
try:
    with gk.use_backend("cpp", "frame_preprocess"):
        gk.frame_preprocess(video, plan)
except gk.BackendUnavailableError as error:
    print("REFUSED", error)
"""


def test_without_a_compiler_torch_takes_over_with_one_line_in_the_log(tmp_path: Path) -> None:
    done = python(NO_COMPILER, tmp_path, PATH=str(tmp_path), CXX="")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["geoalign_kernels", "REPORT", "REFUSED"], done.stdout
    assert "'frame_preprocess' runs its plain torch reference: no C++ compiler" in lines[0]
    assert lines[1].startswith("REPORT reference cpp: no C++ compiler")
    assert "install one" in lines[2]


# The tile's phases run thread by thread in place of the CPU twin, behind the same torch binding.
TILE = """
#include "geoalign/frame_tile.cuh"
#include <vector>
using namespace geoalign;
extern "C" void geoalign_frame_preprocess_cpu(const FramePreprocess* p, int64_t begin, int64_t end) {
  for (int64_t image = begin; image < end; ++image)
    for (int32_t i = 0; i < all_tiles(*p); ++i)
      for (int32_t c = 0; c < 3; ++c) {
        const Tile t = make_tile(*p, i, c, static_cast<int32_t>(image));
        if (!wanted(*p, t)) continue;
        std::vector<uint8_t> source(t.source_rows * t.source_columns);
        std::vector<float> rows(t.source_rows * t.width);
        for (int k = 0; k < 64; ++k) load_tile(*p, t, source.data(), k, 64);
        for (int k = 0; k < 64; ++k) resample_rows(*p, t, source.data(), rows.data(), k, 64);
        for (int k = 0; k < 64; ++k) store_tile(*p, t, rows.data(), k, 64);
      }
}
"""

CASE = """
import sys, torch
import geoalign_kernels as gk
crop = gk.CropTarget((53, 91), (51, 88), (1, 1))
half = ((0.5,) * 3, (0.25,) * 3)
plan = gk.frame_plan((61, 103), 4, crop, (56, 84), geometry_frames=(0, 2, 3), clip_frames=(0, 3), still_frames=(3, 1),
                     geometry_statistics=half, patch_statistics=half)
video = torch.randint(0, 256, (2, 4, 3, 61, 103), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
with gk.use_backend("cpp"):
    results = [gk.frame_preprocess(v, plan) for v in (video, video / 127.5 - 1, (video / 127.5 - 1).bfloat16())]
with gk.use_backend("reference"):
    for v, got in zip((video, video / 127.5 - 1, (video / 127.5 - 1).bfloat16()), results):
        for a, b in zip(got, gk.frame_preprocess(v, plan)):
            assert (a - b).abs().max() < 1.5 * 4 / 255, (a - b).abs().max()  # one level is 1 / 255 / 0.25
            assert ((a - b).abs() > 1e-5).float().mean() < 1e-4
torch.save([tuple(result) for result in results], sys.argv[1])
"""


def python(code: str, cache: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: one process can register the native operator once."""
    package = str(Path(native.__file__).resolve().parents[1])
    env = {**os.environ, "PYTHONPATH": package, native.CACHE_ENV: str(cache / "cache"), **environment}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def built_from(change: Callable[[str], str], folder: Path) -> list[Any]:
    """What CASE gives with a changed source of the CPU twin."""
    sources = folder / "csrc"
    shutil.copytree(native.source_folder(), sources)
    twin = sources / "cpu" / "frame_preprocess.cpp"
    twin.write_text(change(twin.read_text()))
    redirect = f"import pathlib\nimport geoalign_kernels.native as n\nn.source_folder = lambda: pathlib.{sources!r}\n"
    done = python(redirect + CASE, folder, str(folder / "results"))
    assert done.returncode == 0, done.stderr
    assert len(list((folder / "cache").glob("*.so"))) == 1
    return torch.load(folder / "results")


def without_avx2(source: str) -> str:
    changed = source.replace("__builtin_cpu_supports", "!__builtin_cpu_supports")
    assert changed != source
    return changed


def test_the_cuda_tile_and_the_code_for_old_cpus_give_the_same_bits(tmp_path: Path) -> None:
    """All of the CUDA kernel but the launch and its barriers runs here thread by thread: tables, order of sums and
    rounding are those of the twin, whatever the lanes. (Each also meets the reference, inside CASE.)"""
    changes = {"twin": lambda text: text, "tile": lambda _: TILE, "old": without_avx2}
    twin, tile, old = (built_from(change, tmp_path / name) for name, change in changes.items())
    for ours, theirs, plain in zip(twin, tile, old, strict=True):
        for a, b, c in zip(ours, theirs, plain, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)

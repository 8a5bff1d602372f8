"""Build of the native code: the cache key, one build for many callers, messages without compilers, cubins."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from geoalign_kernels import native


def test_a_missing_compiler_gives_a_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
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


def test_a_library_is_built_once_and_again_when_a_source_changes(
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
    monkeypatch.setattr(native, "_wanted_nvcc", lambda: None)
    first = native.build()
    assert native.build() == first
    (sources / "bindings.cpp").write_text("// two\n")
    second = native.build()
    assert second != first
    monkeypatch.setattr(native, "_cpu_flags", lambda: "another CPU")
    assert native.build() not in (first, second)
    assert log.read_text().split() == ["built"] * 3


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


# The tile's phases run thread by thread in place of the CPU twin, behind the same torch binding.
EMULATION = """
#include "geoalign/frame_tile.cuh"
#include <vector>
using namespace geoalign;
extern "C" void geoalign_frame_preprocess_cpu(const FramePreprocess* p, int64_t begin, int64_t end) {
  const int32_t tiles = tiles_of(p->geometry_y, p->geometry_x) + tiles_of(p->patch_y, p->patch_x);
  for (int64_t image = begin; image < end; ++image)
    for (int32_t i = 0; i < tiles; ++i)
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

CHECK = """
import torch; torch.set_num_threads(1)
import geoalign_kernels as gk
crop = gk.CropTarget((53, 91), (51, 88), (1, 1))
half = ((0.5,) * 3, (0.25,) * 3)
plan = gk.frame_plan((61, 103), 4, crop, (56, 84), geometry_frames=(0, 2, 3), clip_frames=(0, 3), still_frames=(3, 1),
                     geometry_statistics=half, patch_statistics=half)
video = torch.randint(0, 256, (2, 4, 3, 61, 103), dtype=torch.uint8)
for v in (video, video / 127.5 - 1, (video / 127.5 - 1).bfloat16()):
    both = []
    for backend in ("reference", "cpp"):
        with gk.use_backend(backend):
            both.append(gk.frame_preprocess(v, plan))
    for a, b in zip(*both):
        assert (a - b).abs().max() < 1.5 * 4 / 255, (a - b).abs().max()  # one level is 1 / 255 / 0.25
        assert ((a - b).abs() > 1e-5).float().mean() < 1e-3
"""


def test_the_cuda_tile_run_thread_by_thread_equals_the_reference(tmp_path: Path) -> None:
    """Everything of the CUDA kernel but the launch and its barriers; in a process of its own, because a process can
    register the native operator once."""
    package = Path(native.__file__).resolve().parents[1]
    sources = tmp_path / "csrc"
    shutil.copytree(native.source_folder(), sources)
    (sources / "cpu" / "frame_preprocess.cpp").write_text(EMULATION)
    code = "\n".join(
        (
            f"import pathlib, sys; sys.path.insert(0, {str(package)!r})",
            f"from geoalign_kernels import native; native.source_folder = lambda: pathlib.Path({str(sources)!r})",
            CHECK,
        )
    )
    env = {**os.environ, native.CACHE_ENV: str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "cache").glob("*.so"))) == 1

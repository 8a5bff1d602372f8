"""Builds and loads the C++/CUDA sources at first use; no compiler is needed to install the package.

    python -m geoalign_kernels.native build

The library is kept in ``GEOALIGN_KERNELS_CACHE`` (default ``~/.cache/geoalign_kernels``) under a name that hashes the
sources, the flags, torch's major.minor version, the architecture and the compilers, so a change of any of them builds
anew, and says whether it has a CUDA part. A machine that lacks a compiler takes a library of the same sources, flags
and torch that was built elsewhere: it holds code for all CPUs of its architecture. A file lock makes processes that
start together compile once. The CUDA part is compiled where torch has CUDA and nvcc is found; that needs no device.
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

CACHE_ENV = "GEOALIGN_KERNELS_CACHE"
CXX_ENV = "CXX"
# No -ffast-math: NaN must become level 0 and rounding must be exact. No fused multiply-add: torch's resize uses none,
# and all CPUs and GPUs give the same bits. No -march: the sources choose an instruction set when they run.
CXX_FLAGS = ("-std=c++20", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fPIC")
NVCC_FLAGS = ("-std=c++17", "-O3", "-fmad=false")
TARGETS = ("sm_80", "sm_90")
PTX = "compute_90"
"""What the driver of a newer GPU compiles from."""
OPERATOR = "geoalign_native::frame_preprocess"


class NativeBuildError(RuntimeError):
    """The native code cannot be built here; the message says what is missing or what the compiler said."""


def source_folder() -> Path:
    """``csrc`` of a checkout, or its copy inside an installed wheel.

    Raises:
        NativeBuildError: neither exists.
    """
    here = Path(__file__).resolve().parent
    for folder in (here / "_csrc", here.parents[1] / "csrc"):
        if (folder / "bindings.cpp").is_file():
            return folder
    raise NativeBuildError(f"the native sources are neither in {here / '_csrc'} nor in {here.parents[1] / 'csrc'}")


def compiler() -> str:
    """Path of the C++ compiler: ``CXX``, else g++, else clang++.

    Raises:
        NativeBuildError: none is found.
    """
    for name in filter(None, (os.environ.get(CXX_ENV), "g++", "clang++")):
        found = shutil.which(name)
        if found:
            return found
    raise NativeBuildError(
        "no C++ compiler: neither g++ nor clang++ is on PATH; install one (Debian: apt-get install g++), name it in "
        f"{CXX_ENV}, or choose the 'reference' backend"
    )


def cuda_compiler() -> str:
    """Path of nvcc.

    Raises:
        NativeBuildError: it is not found.
    """
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")
    if not found:
        raise NativeBuildError(
            f"no CUDA compiler: nvcc is neither on PATH nor in {home}/bin; install the CUDA toolkit, set CUDA_HOME, or "
            "choose the 'reference' backend"
        )
    return found


def compile_cubin(target: str, out: Path) -> str:
    """Compiles the CUDA kernel for one of ``TARGETS`` to ``out``, no device needed; returns ptxas's resource report.

    Raises:
        NativeBuildError: no nvcc, or it fails.
    """
    folder = source_folder()
    source = str(folder / "cuda" / "frame_preprocess.cu")
    flags = (*NVCC_FLAGS, "-cubin", f"-arch={target}", "-Xptxas", "-v", f"-I{folder / 'include'}")
    return _run([cuda_compiler(), *flags, source, "-o", str(out)])


def build() -> Path:
    """Path of the compiled library, built if the cache has none for this machine.

    Raises:
        NativeBuildError: no compiler and no library built elsewhere, or the compiler fails.
    """
    cxx, nvcc, lacking = _compilers()
    elsewhere = _built_elsewhere() if lacking else None
    if elsewhere:
        return elsewhere
    if cxx is None:
        raise NativeBuildError(lacking)
    versions = [_run([tool, "--version"]) for tool in (cxx, nvcc) if tool]
    library = _cache() / f"{_stem()}-{'cuda' if nvcc else 'cpu'}-{_hash(*versions)}.so"
    if library.is_file():
        return library
    with _lock(library.with_suffix(".lock")):
        if not library.is_file():
            with tempfile.TemporaryDirectory(dir=library.parent) as work:
                _compile(cxx, nvcc, Path(work))
                os.replace(Path(work) / "library.so", library)
    return library


def obstacle(device: str) -> str:
    """Why tensors on "cpu" or "cuda" cannot be taken here, as far as is known before a build; else empty."""
    cxx, nvcc, lacking = _compilers()
    if device == "cuda":
        buildable, kind = cxx and nvcc, "cuda"
        lacking = lacking or f"torch {torch.__version__} has no CUDA"
    else:
        buildable, kind = cxx, "*"
    return "" if buildable or _built_elsewhere(kind) else lacking


def load(device: str = "cpu") -> Path:
    """Builds where needed and registers ``torch.ops.geoalign_native`` in this process, once.

    Args:
        device: type of the tensors that it must take, "cpu" or "cuda".

    Raises:
        NativeBuildError: as ``build``; or the library does not load into this torch, or holds no CUDA part.
    """
    library, error = _load()
    if library is None:
        raise NativeBuildError(error)
    if device == "cuda" and not torch._C._dispatch_has_kernel_for_dispatch_key(OPERATOR, "CUDA"):
        cuda_compiler()
        raise NativeBuildError(f"{library} has no CUDA part, because it was built with a torch or tools without CUDA")
    return library


@functools.lru_cache(maxsize=1)
def _load() -> tuple[Path | None, str]:
    """The library, or why there is none: a failing compiler is run once per process."""
    try:
        library = build()
        torch.ops.load_library(str(library))
    except NativeBuildError as error:
        return None, str(error)
    except OSError as error:
        return None, f"the native library cannot be stored, or not be loaded into torch {torch.__version__}: {error}"
    return library, ""


def _compilers() -> tuple[str | None, str | None, str]:
    """C++ compiler, nvcc (None where torch has no CUDA), and what is missing of the two."""
    cxx, nvcc, lacking = None, None, ""
    try:
        if torch.version.cuda is not None:
            nvcc = cuda_compiler()
    except NativeBuildError as error:
        lacking = str(error)
    try:
        cxx = compiler()
    except NativeBuildError as error:
        lacking = str(error)
    return cxx, nvcc, lacking


def _compile(cxx: str, nvcc: str | None, work: Path) -> None:
    folder = source_folder()
    torch_folder = Path(torch.__file__).parent
    # torch is loaded before this library, so its libraries are found by name and no path is baked in.
    links = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
    flags = [*CXX_FLAGS, f"-I{folder / 'include'}", f"-I{torch_folder / 'include'}"]
    objects = []
    if nvcc:
        flags.append("-DGEOALIGN_WITH_CUDA")
        codes = [f"-gencode=arch={target.replace('sm', 'compute')},code={target}" for target in (*TARGETS, PTX)]
        device = [*NVCC_FLAGS, *codes, "-Xcompiler", "-fPIC", f"-I{folder / 'include'}"]
        objects.append(str(work / "cuda.o"))
        _run([nvcc, *device, "-c", str(folder / "cuda" / "frame_preprocess.cu"), "-o", objects[-1]])
    for source in (folder / "bindings.cpp", folder / "cpu" / "frame_preprocess.cpp"):
        objects.append(str(work / f"{source.stem}.o"))
        _run([cxx, *flags, "-c", str(source), "-o", objects[-1]])
    # nvcc links its own static run time; it knows where that is.
    _run([nvcc or cxx, "-shared", *objects, *links, "-o", str(work / "library.so")])


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NativeBuildError(f"native build failed: {' '.join(command)}\n{(done.stdout + done.stderr)[-4000:]}")
    return done.stdout + done.stderr


def _built_elsewhere(kind: str = "*") -> Path | None:
    """The newest library of the same sources, flags, torch and architecture, whatever compiled it; those with a CUDA
    part first, ``kind`` "cuda" takes no others."""
    stem = f"{_stem()}-"
    found = [
        (path.name.startswith(f"{stem}cuda-"), path.stat().st_mtime, path)
        for path in _cache().glob(f"{stem}{kind}-*.so")
    ]
    return max(found)[2] if found else None


def _stem() -> str:
    folder = source_folder()
    sources = sorted(path for path in folder.rglob("*") if path.suffix in (".h", ".cuh", ".cu", ".cpp"))
    texts = [f"{path.relative_to(folder)}\n{path.read_text()}" for path in sources]
    torch_version = ".".join(torch.__version__.split(".")[:2])
    key = _hash(*texts, *CXX_FLAGS, *NVCC_FLAGS, *TARGETS, PTX, torch_version, platform.machine())
    return f"geoalign_native-{key}"


def _hash(*facts: str) -> str:
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get(CACHE_ENV) or Path(root) / "geoalign_kernels")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)  # released when the file closes, also if the process dies
        yield


def main(argv: Sequence[str] | None = None) -> int:
    """``build`` compiles into the cache and prints the library's path; exit code 1 with the reason if it cannot."""
    parser = argparse.ArgumentParser(
        prog="python -m geoalign_kernels.native", description="Native code of the kernels."
    )
    parser.add_argument("verb", choices=["build"])
    parser.parse_args(argv)
    try:
        print(build())
    except NativeBuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

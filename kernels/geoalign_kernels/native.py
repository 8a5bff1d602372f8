"""Builds and loads the C++/CUDA sources at first use; no compiler is needed to install the package.

    python -m geoalign_kernels.native build

The library is kept in `GEOALIGN_KERNELS_CACHE` (default `~/.cache/geoalign_kernels`) under a name that hashes the
sources, the flags, the compiler version, the CPU's instruction sets and torch's major.minor version, so a change of any
of them builds anew. A file lock makes processes that start together compile once. The CUDA part is compiled where nvcc
is found and torch sees a device.
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
# No -ffast-math: NaN must become level 0 and rounding must be exact.
CXX_FLAGS = ("-std=c++20", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC")
NVCC_FLAGS = ("-std=c++17", "-O3")
TARGETS = ("sm_80", "sm_90")


class NativeBuildError(RuntimeError):
    """The native code cannot be built here; the message says what is missing or what the compiler said."""


def source_folder() -> Path:
    """`csrc` of a checkout, or its copy inside an installed wheel.

    Raises:
        NativeBuildError: neither exists.
    """
    here = Path(__file__).resolve().parent
    for folder in (here / "_csrc", here.parents[1] / "csrc"):
        if (folder / "bindings.cpp").is_file():
            return folder
    raise NativeBuildError(f"the native sources are neither in {here / '_csrc'} nor in {here.parents[1] / 'csrc'}")


def compiler() -> str:
    """Path of the C++ compiler: `CXX`, else g++, else clang++.

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
    """Compiles the CUDA kernel for one of `TARGETS` to `out`, no device needed; returns ptxas's resource report.

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
        NativeBuildError: no compiler, or it fails.
    """
    cxx, nvcc = compiler(), _wanted_nvcc()
    library = _cache() / f"geoalign_native-{_key(cxx, nvcc)}.so"
    if library.is_file():
        return library
    with _lock(library.with_suffix(".lock")):
        if not library.is_file():
            with tempfile.TemporaryDirectory(dir=library.parent) as work:
                _compile(cxx, nvcc, Path(work))
                os.replace(Path(work) / "library.so", library)
    return library


@functools.lru_cache(maxsize=1)
def load() -> Path:
    """Builds where needed and registers `torch.ops.geoalign_native` in this process, once.

    Raises:
        NativeBuildError: as `build`, or the library does not load into this torch.
    """
    library = build()
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise NativeBuildError(f"{library} does not load into torch {torch.__version__}: {error}") from error
    return library


def _wanted_nvcc() -> str | None:
    if not torch.cuda.is_available():
        return None
    try:
        return cuda_compiler()
    except NativeBuildError:
        return None


def _compile(cxx: str, nvcc: str | None, work: Path) -> None:
    folder = source_folder()
    torch_folder = Path(torch.__file__).parent
    # torch is loaded before this library, so its libraries are found by name and no path is baked in.
    links = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
    flags = [*CXX_FLAGS, f"-I{folder / 'include'}", f"-I{torch_folder / 'include'}"]
    objects = []
    if nvcc:
        flags.append("-DGEOALIGN_WITH_CUDA")
        codes = [f"-gencode=arch={target.replace('sm', 'compute')},code={target}" for target in TARGETS]
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


def _key(cxx: str, nvcc: str | None) -> str:
    folder = source_folder()
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".h", ".cuh", ".cu", ".cpp")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    versions = [_run([tool, "--version"]) for tool in (cxx, nvcc) if tool]
    torch_version = ".".join(torch.__version__.split(".")[:2])
    facts = (*CXX_FLAGS, *NVCC_FLAGS, *TARGETS, *versions, torch_version, platform.machine(), _cpu_flags())
    digest.update("\0".join(facts).encode())
    return digest.hexdigest()[:20]


def _cpu_flags() -> str:
    """Instruction sets that -march=native compiles for; a shared home folder may serve several kinds of machine."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


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
    """`build` compiles into the cache and prints the library's path; exit code 1 with the reason if it cannot."""
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

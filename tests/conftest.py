"""Settings of the whole suite: one thread per process, reproducible property tests, skips that name their reason.

Marker ``slow`` is for what is too long for `make test`, which leaves it out; `make slow` runs it. Marker
``dist(groups=N)`` says how many groups of processes (torchrun, or a process that one is compared with) a test starts
by the fixture ``launch``; all tests that `make test` runs may start MOST_GROUPS together: a new one takes the place of
another or is slow. (One of them has four ranks: of two, a sum has one order only.)
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

# Before anything imports torch: workers share the cores, and a reduction must not depend on the number of cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product; deterministic runs need it

import chromium
import pytest

MOST_GROUPS = 14
INTERPRETED_FOLDER = Path(__file__).parent / "kernels" / "interpreted"

# The kernel tests also run on a GPU machine that has little beside torch: `pytest tests/kernels -m gpu`.
if importlib.util.find_spec("hypothesis"):
    from hypothesis import HealthCheck, settings

    settings.register_profile(
        "ci", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.register_profile("explore", deadline=None, max_examples=1000, print_blob=True)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Keep the setting of a plugin that is not installed from being an unknown one."""
    if not importlib.util.find_spec("pytest_timeout"):
        parser.addini("timeout", "seconds a test may take (needs pytest-timeout)")


def pytest_configure(config: pytest.Config) -> None:
    """Know the marker of a plugin that is not installed."""
    if not importlib.util.find_spec("pytest_timeout"):
        config.addinivalue_line("markers", "timeout(seconds): a test that takes long (needs pytest-timeout)")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Keep interpreter tests to a process of their own: Triton reads TRITON_INTERPRET when a kernel is decorated."""
    if os.environ.get("TRITON_INTERPRET") != "1" and collection_path == INTERPRETED_FOLDER:
        return True
    return None


def _missing(marker: str) -> str | None:
    """Say why tests of ``marker`` cannot run here, or None when they can."""
    if marker == "browser":
        if not importlib.util.find_spec("playwright"):
            return "playwright is not installed (pip install '.[test]')"
        return None if chromium.binary() else f"no {' or '.join(chromium.NAMES)} on the PATH"
    if marker == "weights":
        return None if os.environ.get("GEOALIGN_WEIGHTS") else "GEOALIGN_WEIGHTS does not name a folder of weights"
    import torch

    wanted = 2 if marker == "multigpu" else 1
    found = torch.cuda.device_count()
    return None if found >= wanted else f"needs {wanted} CUDA device(s), found {found}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what the machine cannot run; only these four markers may skip."""
    for marker in ("gpu", "multigpu", "weights", "browser"):
        marked = [item for item in items if item.get_closest_marker(marker)]
        reason = _missing(marker) if marked else None
        if reason:
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))
    for item in items:
        mark = item.get_closest_marker("multigpu")
        package = mark.kwargs.get("needs") if mark else None
        if package and not importlib.util.find_spec(package):
            item.add_marker(pytest.mark.skip(reason=f"the package '{package}' is not installed"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuse a suite that starts more groups of processes than `make test` may."""
    fast = [item for item in session.items if not item.get_closest_marker("slow")]
    groups = sum(mark.kwargs["groups"] for item in fast if (mark := item.get_closest_marker("dist")))
    if groups > MOST_GROUPS:
        raise pytest.UsageError(
            f"the tests start {groups} groups of processes, {MOST_GROUPS} are the most: mark some of them slow"
        )

"""The table of a trace: a real one of this CPU, and a synthetic nsys export of the real schema."""

from __future__ import annotations

import gzip
import importlib.util
import json
import sqlite3
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from profiling_runs import ROOT, script
from training_cases import Brightness, smoke, trainer_of

from geoalign.jobs.train_profile import profiled

SCHEMA_OF_NSYS = """
CREATE TABLE StringIds (id INTEGER NOT NULL PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE NVTX_EVENTS (start INTEGER NOT NULL, end INTEGER, eventType INTEGER NOT NULL, rangeId INTEGER,
    category INTEGER, color INTEGER, text TEXT, globalTid INTEGER, endGlobalTid INTEGER, textId INTEGER,
    domainId INTEGER, uint64Value INTEGER, int64Value INTEGER, doubleValue REAL, jsonTextId INTEGER, jsonText TEXT);
CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INTEGER NOT NULL, end INTEGER NOT NULL, eventClass INTEGER NOT NULL,
    globalTid INTEGER, correlationId INTEGER, nameId INTEGER NOT NULL, returnValue INTEGER NOT NULL,
    callchainId INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL,
    contextId INTEGER NOT NULL, streamId INTEGER NOT NULL, correlationId INTEGER, globalPid INTEGER,
    demangledName INTEGER NOT NULL, shortName INTEGER NOT NULL, mangledName INTEGER, gridX INTEGER, blockX INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_MEMCPY (start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL,
    contextId INTEGER NOT NULL, streamId INTEGER NOT NULL, correlationId INTEGER, globalPid INTEGER,
    bytes INTEGER NOT NULL, copyKind INTEGER NOT NULL);
"""
MAIN, AUTOGRAD, MS = 7, 8, 1_000_000


def nsys_export(path: Path) -> None:
    """Two spans of our domain, one nested, a range of another domain; kernels of two threads; one launched outside."""
    base = sqlite3.connect(path)
    base.executescript(SCHEMA_OF_NSYS)
    names = ["update/backward", "attention_kernel", "gemm", "cudaLaunchKernel"]
    base.executemany("INSERT INTO StringIds VALUES (?, ?)", enumerate(names, 1))
    events = [
        # start, end, type, text, thread, textId, domain
        (0, None, 75, "geoalign", MAIN, None, 3), (0, None, 75, "other", MAIN, None, 4),
        (0, 100 * MS, 59, "rollout/window", MAIN, None, 3), (10 * MS, 30 * MS, 59, None, MAIN, 1, 3),
        (0, 100 * MS, 59, "not ours", MAIN, None, 4),
    ]  # fmt: skip
    base.executemany(
        "INSERT INTO NVTX_EVENTS (start, end, eventType, text, globalTid, textId, domainId) "
        "VALUES (?, ?, ?, ?, ?, ?, ?)",
        events,
    )
    # launched at, thread, ran from, to, name
    kernels = [(1, MAIN, 5, 15, 2), (11, AUTOGRAD, 20, 40, 3), (12, MAIN, 40, 50, 2), (200, MAIN, 205, 206, 3)]
    for key, (launched, thread, start, end, name) in enumerate(kernels):
        base.execute(
            "INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (?, ?, 0, ?, ?, 4, 0, NULL)",
            (launched * MS, launched * MS + 5, thread, key),
        )
        base.execute(
            "INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (?, ?, 0, 1, 7, ?, 1, ?, ?, NULL, 1, 1)",
            (start * MS, end * MS, key, name, name),
        )
    base.execute("INSERT INTO CUPTI_ACTIVITY_KIND_MEMCPY VALUES (?, ?, 0, 1, 7, 0, 1, 4096, 1)", (60 * MS, 61 * MS))
    base.commit()
    base.close()


def test_an_nsys_export_gives_launches_gaps_and_mfu_per_span(tmp_path: Path) -> None:
    nsys_export(tmp_path / "r.sqlite")
    phases = {
        "rollout/window": {"flops": 20.5e12, "bytes": 3e9, "seconds": 0.082},
        "update/backward": {"flops": 1e12, "bytes": 1e9, "seconds": 0.03},
    }
    work = {"device": "NVIDIA X", "core": "flash2", "peak_flops": 1e15, "phases": phases}
    (tmp_path / "r.work.json").write_text(json.dumps(work))
    done = script("profiling/trace.py", str(tmp_path / "r.sqlite"), "--json", str(tmp_path / "rows.json"))
    assert done.returncode == 0, done.stderr
    rows = {row["span"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert set(rows) == {"rollout/window", "update/backward", "(none)"}
    window, inner = rows["rollout/window"], rows["update/backward"]
    # 10 + 20 + 10 ms of kernels and 1 ms of copy; idle from 15 to 20 and from 50 to 60
    assert window["busy_s"] == pytest.approx(0.041) and window["gaps_s"] == pytest.approx(0.015)
    assert window["launches"] == 4 and window["calls"] == 1 and window["wall_s"] == pytest.approx(0.1)
    assert window["mfu"] == pytest.approx(20.5e12 / 0.041 / 1e15)
    # launched inside, one of them by another thread, although they ran after the span had ended on its own thread
    assert inner["busy_s"] == pytest.approx(0.030) and inner["launches"] == 2
    assert inner["top"][0] == ["gemm", pytest.approx(20_000.0)]
    assert rows["(none)"]["launches"] == 1
    worst = done.stdout.partition("Furthest from the prediction")[2]
    assert worst.index("rollout/window: 0.50") < worst.index("update/backward: 1.00")


@pytest.fixture
def trace() -> ModuleType:
    """The script, whose name the standard library has as well."""
    spec = importlib.util.spec_from_file_location("profiling_trace", ROOT / "profiling/trace.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_a_trace_of_a_real_iteration_on_this_cpu(tmp_path: Path, trace: ModuleType) -> None:
    """Its products are counted from their shapes: forward and backward of the learner, and the rollout's forwards."""
    trainer = trainer_of(smoke(advantage={"weights": {}}), rewards={"b": Brightness()})
    with profiled(trainer, tmp_path):
        trainer.step()
    (path,) = tmp_path.glob("trace_000000.json.gz")
    work = json.loads((tmp_path / "trace_000000.work.json").read_text())
    found = {row["span"]: row for row in trace.rows(trace.tree(*trace.load(path)), {})}
    for name in ("rollout/window", "rollout/tail", "update/forward", "update/backward"):
        row = found[name]
        assert row["launches"] > 50 and 0 < row["busy_s"] <= 1.01 * row["wall_s"], name
        # Prepared keys and patches are no part of the model's blocks' work, and the small model has much of it.
        assert row["tflop"] == pytest.approx(work["phases"][name]["flops"] / 1e12, rel=0.35), name
    assert found["update/backward"]["tflop"] > found["update/forward"]["tflop"]
    done = script("profiling/trace.py", str(path))
    assert done.returncode == 0 and "rollout/window" in done.stdout and "nothing was predicted" in done.stdout


def test_operators_inside_a_counted_one_are_not_counted_again(trace: ModuleType) -> None:
    def event(name: str, start: float, duration: float, dims: list[Any] | None = None, kind: str = "cpu_op") -> Any:
        arguments = {"Input Dims": dims or []}
        return {"ph": "X", "cat": kind, "name": name, "ts": start, "dur": duration, "tid": 1, "args": arguments}

    events = [
        event("rollout/window", 0, 100, kind="user_annotation"),
        event("aten::linear", 1, 20, [[3, 4], [5, 4]]), event("aten::t", 1.5, 0.5, [[5, 4]]),
        event("aten::addmm", 2, 18, [[5], [3, 4], [4, 5]]), event("aten::mm", 3, 10, [[3, 4], [4, 5]]),
        event("geoalign::attention", 30, 20, [[1, 7, 2, 8], [1, 9, 2, 8], [1, 9, 2, 8]]),
        event("aten::bmm", 31, 5, [[2, 7, 8], [2, 8, 9]]), event("aten::add", 60, 1, [[3]]),
    ]  # fmt: skip
    spans, kernels = trace.from_torch(events)
    assert sorted(k.name for k in kernels) == ["aten::add", "aten::addmm", "aten::t", "geoalign::attention"]
    assert sum(k.flops for k in kernels) == 2 * 3 * 4 * 5 + 4 * 7 * 9 * 2 * 8 and len(spans) == 1


def test_what_is_no_trace_is_refused(tmp_path: Path) -> None:
    for name, content in (("a.json", b"{}"), ("b.json.gz", gzip.compress(b"no")), ("c.sqlite", b"")):
        (tmp_path / name).write_bytes(content)
        done = script("profiling/trace.py", str(tmp_path / name))
        assert done.returncode == 2 and "neither a torch trace nor an nsys export" in done.stderr

"""The table of a trace: a real one of this CPU, and a synthetic nsys export of the real schema."""

from __future__ import annotations

import gzip
import importlib.util
import json
import sqlite3
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from profiling_runs import ROOT, script
from training_cases import Brightness, Conditions, lively_policy, smoke

from geoalign.jobs.train_profile import profiled
from geoalign.training.trainer import Trainer
from geoalign.types import Encodings, RetakeBatch

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
TEXT = 2
"""Tokens of a text."""


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
    # An export has no shapes, so MFU is that of the expected FLOPs, and says so; it has the bytes of copies.
    assert window["tflop"] is None and window["predicted_tflop"] == 20.5
    assert window["mfu"] is None and window["mfu_predicted"] == pytest.approx(20.5e12 / 0.041 / 1e15)
    assert window["copied_gb"] == 4096e-9 and inner["copied_gb"] == 0 and window["predicted_gb"] == 3.0
    assert "| (50 %) | 4.1e-06 | 3 |" in done.stdout
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


class WithText(Conditions):
    """Conditions with a text: over one token the cross-attention is a constant, and is not run."""

    def batch(self, iteration: int, group_ids: list[int]) -> RetakeBatch:
        batch = super().batch(iteration, group_ids)
        return replace(batch, encodings=Encodings(context=torch.ones(len(group_ids), TEXT, 16)))


def traced(trace: ModuleType, folder: Path, layers: int) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """(trace, its rows by span, the model's work by phase) of one iteration of a network of so many blocks."""
    folder.mkdir()
    config = smoke(advantage={"weights": {}}, model={"layers": layers, "text_length": TEXT})
    trainer = Trainer(config, lively_policy(config), WithText(config), {"b": Brightness()})
    with profiled(trainer, folder):
        trainer.step()
    (path,) = folder.glob("trace_000000.json.gz")
    work = json.loads((folder / "trace_000000.work.json").read_text())["phases"]
    return path, {row["span"]: row for row in trace.rows(trace.tree(*trace.load(path)), {})}, work


def test_a_trace_of_a_real_iteration_on_this_cpu(tmp_path: Path, trace: ModuleType) -> None:
    """What a block adds to the counted products is what the cost model says of it, in every phase.

    Patches, time, head and the pruned last block, which are no part of the model's count or not exactly, are in both
    traces. Left are keys and values of the text, which are made once, and which the model counts in every pass: for two
    tokens 8 dim^2 of 4 tokens^2 dim + 12 tokens dim^2 + 4 tokens dim ffn_dim, with 108 tokens, dim 96 and ffn_dim 288
    0.26 %, and less of a backward; and the products of camera phases, 0.02 % the other way.
    """
    (_, two, of_two), (path, three, of_three) = (traced(trace, tmp_path / str(n), n) for n in (2, 3))
    for name in ("rollout/window", "rollout/tail", "update/forward", "update/backward"):
        row = three[name]
        assert row["launches"] > 50 and 0 < row["busy_s"] <= 1.01 * row["wall_s"], name
        block = (of_three[name]["flops"] - of_two[name]["flops"]) / 1e12
        assert row["tflop"] - two[name]["tflop"] == pytest.approx(block, rel=0.003), name
    assert three["update/backward"]["tflop"] > three["update/forward"]["tflop"]
    done = script("profiling/trace.py", str(path))
    assert done.returncode == 0 and "rollout/window" in done.stdout
    # No card, so no seconds are expected; FLOPs are, and stand beside the traced ones.
    assert "TFLOP" in done.stdout.partition("Furthest from the prediction")[2]


def test_traced_flops_stand_beside_the_expected_ones(trace: ModuleType) -> None:
    """A phase that does twice the work in the expected time is found by its FLOPs alone."""
    spans = [trace.Span("rollout/window", 0, 2e6, 1), trace.Span("rollout/tail", 3e6, 4e6, 1)]
    kernels = [trace.Kernel("gemm", 0, 1e6, 0, 1, flops=2e12), trace.Kernel("Memset", 3e6, 4e6, 3e6, 1, copied=5e8)]
    phases = {"rollout/window": {"flops": 1e12, "bytes": 3e9, "seconds": 1.0}, "rollout/tail": {"flops": 1e12}}
    work = {"peak_flops": 8e12, "phases": phases}
    window, tail = found = trace.rows(trace.tree(spans, kernels), work)
    assert (window["tflop"], window["predicted_tflop"], window["mfu"]) == (2.0, 1.0, 0.25)
    assert (tail["tflop"], tail["mfu"], tail["mfu_predicted"], tail["copied_gb"]) == (None, None, 0.125, 0.5)
    assert trace.disagreements(found) == [
        ("rollout/window", 2.0, 1.0, "TFLOP"), ("rollout/window", 1.0, 1.0, "s"),
    ]  # fmt: skip
    assert "- rollout/window: 2.00 of the predicted 1 TFLOP" in trace.markdown(found, work)


def test_a_trace_knows_the_bytes_of_copies(trace: ModuleType) -> None:
    events = [
        {"ph": "X", "cat": "user_annotation", "name": "reward", "ts": 0, "dur": 90, "tid": 1},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaMemcpyAsync", "ts": 1, "dur": 1, "tid": 1,
         "args": {"correlation": 5}},
        {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy HtoD", "ts": 3, "dur": 4, "tid": 7,
         "args": {"correlation": 5, "bytes": 4096}},
        {"ph": "X", "cat": "kernel", "name": "k", "ts": 99, "dur": 4, "tid": 7, "args": {"correlation": 6, "bytes": 1}},
    ]  # fmt: skip
    (row, outside) = trace.rows(trace.tree(*trace.from_torch(events)), {})
    assert row["copied_gb"] == 4096e-9 and outside["copied_gb"] == 0.0


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
        event("aten::scaled_dot_product_attention", 70, 9, [[1, 2, 7, 8], [1, 2, 3, 8], [1, 2, 3, 8]]),
        event("aten::_scaled_dot_product_flash_attention", 71, 8, [[1, 2, 7, 8], [1, 2, 3, 8], [1, 2, 3, 8]]),
        event("aten::_scaled_dot_product_flash_attention_backward", 80, 8,
              [[1, 2, 7, 8], [1, 2, 7, 8], [1, 2, 3, 8], [1, 2, 3, 8]]),
    ]  # fmt: skip
    spans, kernels = trace.from_torch(events)
    assert sorted(k.name for k in kernels) == [
        "aten::_scaled_dot_product_flash_attention_backward", "aten::add", "aten::addmm",
        "aten::scaled_dot_product_attention", "aten::t", "geoalign::attention",
    ]  # fmt: skip
    product, attention, text = 2 * 3 * 4 * 5, 4 * 7 * 9 * 2 * 8, 4 * 7 * 3 * 2 * 8
    assert sum(k.flops for k in kernels) == product + attention + 3.5 * text and len(spans) == 1


def test_what_is_no_trace_is_refused(tmp_path: Path) -> None:
    for name, content in (("a.json", b"{}"), ("b.json.gz", gzip.compress(b"no")), ("c.sqlite", b"")):
        (tmp_path / name).write_bytes(content)
        done = script("profiling/trace.py", str(tmp_path / name))
        assert done.returncode == 2 and "neither a torch trace nor an nsys export" in done.stderr

"""The benchmark harness end to end on the CPU: its rows, the report made from them, capture and replay."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from geoalign.perf.cost import DEVICES

ROOT = Path(__file__).parents[2]


def script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "self.jsonl"
    done = script("profiling/bench_ops.py", "--self-check", "--out", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    return path


@pytest.fixture
def profiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "profiling"))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


SCHEMA = (
    "schema run_id kind name variant impl status dtype shape direction n_warm n_rep t_ms_median t_ms_p20 t_ms_p80 "
    "bytes_min flops gbps tflops pct_copy pct_matmul rel_l2 max_abs regs spill_bytes smem_bytes launches "
    "peak_mem_bytes graph predicted_ms note"
)  # fmt: skip


def test_self_check_writes_every_kind_of_row_with_every_field(results: Path) -> None:
    first, *rows = rows_of(results)
    assert first["kind"] == "environment" and isinstance(first["steady"], bool)
    assert {"versions", "commit", "dirty", "command", "clocks_before", "clocks_after", "cuda"} <= set(first)
    assert all(set(row) == set(SCHEMA.split()) for row in rows)
    assert {row["kind"] for row in rows} == {"ceiling", "kernel"}
    assert [row["impl"] for row in rows if row["name"] == "copy"] == ["first", "last"]
    assert rows[0]["name"] == "copy" and rows[-1]["name"] == "matmul"
    kernels = [row for row in rows if row["kind"] == "kernel"]
    # float32 results against float64: far below the gate, so a wrong formula cannot hide behind it
    exact = {"qk_norm_rotary", "rms_norm", "unrotate_gate_norm", "modulated_norm", "gated_residual", "flow_log_prob"}
    for name in exact:
        for direction in ("fwd", "bwd"):
            for impl in ("ours", "eager", "compiled"):
                found = [r for r in kernels if (r["name"], r["direction"], r["impl"]) == (name, direction, impl)]
                assert found and all(r["status"] == "ok" and r["rel_l2"] <= 1e-5 for r in found), (name, found)
    both = {row["variant"] for row in kernels if row["name"] in ("unrotate_gate_norm", "modulated_norm")}
    assert both == {"", "float32 stream"}
    products = {(row["variant"], row["impl"]): row for row in kernels if row["name"] == "ffn_product"}
    assert {variant for variant, _ in products} == {"plain", "gelu", "int8", "fp8"}
    assert products["gelu", "cublaslt"]["rel_l2"] <= 1e-3  # the library's tanh is its own
    assert 1e-3 < products["int8", "torch"]["rel_l2"] < 2e-2 < products["fp8", "torch"]["rel_l2"] < 6e-2
    modes = {row["impl"]: row["rel_l2"] for row in kernels if row["name"] == "attention" and row["direction"] == "fwd"}
    assert modes["sdpa_flash"] <= 1e-5 < modes["int8"] < modes["int8_fp8"] < 0.1
    absent = {row["impl"] for row in kernels if row["status"] == "not run"}
    assert "sdpa_cudnn" in absent and all(row["note"] for row in kernels if row["status"] == "not run")


def test_report_lists_every_timed_row_and_draws_every_point(results: Path, tmp_path: Path) -> None:
    from xml.etree import ElementTree

    done = script("profiling/figures.py", str(results), "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = rows_of(results)
    timed = [row for row in rows if row["kind"] == "kernel" and row["status"] == "ok"]
    text = (tmp_path / "self.md").read_text()
    table = text.partition("## Kernels")[2].partition("##")[0]
    assert table.count("\n|") == len(timed) + 2  # header and rule
    assert ("Unsteady" in text) == (not rows[0]["steady"])
    assert "not measured" in text.partition("## Targets")[2].partition("##")[0]
    drawn = ElementTree.parse(tmp_path / "self.svg").findall("{*}circle/{*}title")
    assert len(drawn) == len(timed)
    assert script("profiling/figures.py", str(tmp_path / "self.md")).returncode == 2


def kernel_row(name: str, impl: str, ms: float, **fields: Any) -> dict[str, Any]:
    row = dict.fromkeys(SCHEMA.split()) | {"kind": "kernel", "status": "ok", "name": name, "impl": impl, "variant": ""}
    return row | {"direction": "fwd", "shape": [65_520], "dtype": "bfloat16", "t_ms_median": ms, **fields}


def test_an_iteration_at_reduced_depth_is_extrapolated_and_its_gradients_agree(tmp_path: Path) -> None:
    """A tiny model of the same kind: every row, and gradients of plain and fused runs, which the script compares."""
    path = tmp_path / "depth.jsonl"
    done = script("profiling/bench_depth.py", "--self-check", "--out", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(path)[1:]
    assert all(set(row) == set(SCHEMA.split()) for row in rows)
    timed = {(row["impl"], row["shape"][0]) for row in rows if row["kind"] == "iteration"}
    assert timed == {("off", 1), ("off", 2), ("off", 3), ("line", 4), ("exact", 2), ("int8", 2)}
    times = {row["shape"][0]: row["t_ms_median"] for row in rows if row["kind"] == "iteration" and row["impl"] == "off"}
    (line,) = [row["t_ms_median"] for row in rows if (row["kind"], row["impl"]) == ("iteration", "line")]
    assert line == pytest.approx(times[1] + 3 * (times[2] - times[1]))
    (gradient,) = [row for row in rows if row["name"] == "gradient"]
    assert 0 < gradient["rel_l2"] < 1e-4  # other kernels and batch orders round apart, so not 0
    assert script("profiling/figures.py", str(path)).returncode == 0
    report = path.with_suffix(".md").read_text()
    assert (
        "| ms | off, 1 blocks | off, 2 blocks | off, 3 blocks | off, 4 blocks | exact, 2 blocks | int8, 2 blocks |"
        in report
    )
    assert report.count("the line through 1 and 2 blocks") == 3 and "with off" in report


@pytest.mark.usefixtures("profiling")
def test_predicted_iterations_at_reduced_depth() -> None:
    """Seconds on an H200 that the specification of the benchmark gives for 2, 4 and 8 blocks."""
    import bench_depth

    config = bench_depth.paper()
    for name, expected in (("h200", (26, 48, 92)), ("h200_fa2", (36, 68, 132))):
        found = [sum(bench_depth.predicted_ms(config, n, "off", DEVICES[name]).values()) / 1e3 for n in (2, 4, 8)]
        assert found == pytest.approx(expected, abs=0.5)


@pytest.mark.usefixtures("profiling")
def test_targets_are_judged_by_the_rows_of_the_run() -> None:
    import figures

    rows = [
        kernel_row("qk_norm_rotary", "ours", 1.0, pct_copy=86.0), kernel_row("qk_norm_rotary", "eager", 7.9),
        kernel_row("qk_norm_rotary", "compiled", 1.31), kernel_row("rms_norm", "ours", 1.0, pct_copy=84.0),
        kernel_row("attention", "int8", 50.0, rel_l2=0.014), kernel_row("attention", "sdpa_flash", 66.0),
        kernel_row("attention", "triton", 80.0), kernel_row("attention", "int8", 1.0, shape=[16_384]),
    ]  # fmt: skip
    verdicts = {what: verdict for what, _, _, verdict in figures.targets(rows)}
    assert verdicts["qk_norm_rotary fwd, % of the copy ceiling"] == "met"
    assert verdicts["rms_norm fwd, % of the copy ceiling"] == "missed"
    assert verdicts["qk_norm_rotary over the published formulation"] == "missed"
    assert verdicts["qk_norm_rotary over the compiled rewrite"] == "met"
    assert verdicts["int8 attention over SDPA-flash"] == verdicts["int8 attention, relative error"] == "met"
    assert verdicts["exact Triton attention, time over SDPA-flash"] == "missed"
    assert verdicts["int8 attention over sdpa_cudnn"] == "not measured"


@pytest.mark.usefixtures("profiling")
def test_a_regression_needs_both_bounds_and_a_steady_past() -> None:
    import compare

    def run(number: int, *rows: dict[str, Any], steady: bool = True) -> list[dict[str, Any]]:
        machine = {"device": "X", "versions": {"torch": "1"}, "cuda": "13", "steady": steady, "run_id": f"{number:02d}"}
        return [machine, *rows]

    long, short = (lambda ms: kernel_row("a", "ours", ms)), (lambda ms: kernel_row("b", "ours", ms))
    past = [run(i, long(2.0), short(0.01)) for i in range(6)]
    assert compare.regressions(run(9, long(2.09), short(0.02)), past) == []  # +4.5 %; +0.01 ms
    (found,) = compare.regressions(run(9, long(2.11), short(0.011)), past)
    assert found.startswith("a ours") and "last 5 runs" in found
    # the last five runs count, unsteady ones do not, and another shape is another cohort
    newer = [run(i, long(4.0)) for i in range(10, 15)]
    assert compare.regressions(run(20, long(4.1)), [*newer, *past]) == []
    assert compare.regressions(run(20, long(4.1)), [*past, run(30, long(9.0), steady=False)])
    assert compare.regressions(run(9, kernel_row("a", "ours", 9.0, shape=[7])), past) == []


@pytest.mark.usefixtures("profiling")
def test_quick_run_is_predicted_to_take_less_than_ten_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """At production shapes, on fake tensors of an H200; what is not predicted is cut off by the run's own clock."""
    import bench_cases
    import bench_ops
    import torch

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(bench_cases, "buffers_for", lambda size, device: 3)
    bench = object.__new__(bench_ops.Bench)
    bench.device, bench.small, bench.quick = torch.device("cuda"), False, True
    bench.repeats, bench.dtype, bench.profile = 30, torch.bfloat16, bench_ops.DEVICES["h200"]
    minutes, timed = bench_ops.estimate(bench, "")
    assert 0.1 < timed < minutes < 10.0 and bench_ops.QUICK_S < 600.0
    assert bench_ops.estimate(bench, "rms_norm")[0] < minutes / 5
    bench.quick = False
    assert bench_ops.estimate(bench, "")[0] > minutes


class FakeGpu:
    """Times of a GPU that works off a queue, and of the CPU that fills it, in milliseconds; stands for `torch.cuda`."""

    def __init__(self, kernel: float, captured: int) -> None:
        self.cpu = self.gpu = 0.0
        self.kernel, self.captured, self.capturing, self.launches = kernel, captured, False, 0

    def enqueue(self, python: float, work: float) -> None:
        self.cpu += python
        self.gpu = max(self.cpu, self.gpu) + work
        self.launches += work > 0

    def call(self, _: int) -> None:
        """A fifth of a millisecond of Python for one kernel."""
        self.enqueue(0.2, 0.0 if self.capturing else self.kernel)

    def record(self) -> float:
        self.enqueue(0.005, 0.0)
        return self.gpu

    def synchronize(self, _: Any) -> None:
        self.cpu = max(self.cpu, self.gpu)

    @contextlib.contextmanager
    def graph(self, _: Any, stream: str) -> Iterator[None]:
        assert stream == "side"
        self.capturing = True
        yield
        self.capturing = False

    def replay(self) -> None:
        self.enqueue(0.01, self.captured * self.kernel)

    def count(self, call: Any, _: Any) -> int:
        before = self.launches
        call(0)
        return self.launches - before


class FakeEvent:
    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu

    def record(self) -> None:
        self.at = self.gpu.record()

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at - self.at


@pytest.mark.usefixtures("profiling")
@pytest.mark.parametrize(("kernel", "captured", "graph"), [(0.01, 20, True), (0.01, 0, False), (0.06, 20, False)])
def test_a_gpu_time_is_that_of_the_kernel_and_not_of_python(
    monkeypatch: pytest.MonkeyPatch, kernel: float, captured: int, graph: bool
) -> None:
    """Also where dispatch takes far longer; a graph is replayed for short kernels only, and never an empty one."""
    import bench_timing
    import torch

    gpu = FakeGpu(kernel, captured)
    stand_ins = {
        "Event": lambda enable_timing: FakeEvent(gpu), "_sleep": lambda cycles: gpu.enqueue(0.005, cycles / 2e6),
        "synchronize": gpu.synchronize, "CUDAGraph": lambda: gpu, "graph": gpu.graph,
        "current_stream": lambda device: "side",
    }  # fmt: skip
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(bench_timing, "count_launches", gpu.count)
    found = bench_timing.measure(gpu.call, torch.device("cuda"), 30)
    assert found["t_ms_median"] == pytest.approx(kernel) and found["t_ms_p80"] == pytest.approx(kernel)
    assert found["graph"] == graph and ("empty" in found["note"]) == (captured == 0)


@pytest.mark.usefixtures("profiling")
def test_operands_exceed_the_cache_and_poison_reaches_what_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    import bench_timing
    import torch

    size = type("Properties", (), {"L2_cache_size": 50 << 20})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: size)
    cuda = torch.device("cuda")
    assert [bench_timing.buffers_for(n << 20, cuda) for n in (400, 50, 20, 1)] == [3, 3, 8, 64]
    memory, given = torch.zeros(4), torch.ones(3)

    def forgetful(_: int) -> list[torch.Tensor]:
        memory[:3] = 1.0  # the last element is never written
        return [memory, given]

    written, through = bench_timing.on_poison(forgetful, [given])
    assert written[:3].tolist() == [1.0] * 3 and written[3].isnan() and torch.equal(through, torch.ones(3))
    assert bench_timing.errors([written], [torch.ones(4)])["rel_l2"] == float("inf")


def test_captured_calls_replay_with_their_values_and_layout(tmp_path: Path) -> None:
    import torch

    from geoalign_kernels.capture import load

    program = (
        "import torch, geoalign_kernels as gk; torch.manual_seed(3)\n"
        "for _ in range(3):\n"
        "    q, k, v = torch.randn(1, 5, 3, 2, 16).unbind(2)\n"
        "    gk.qk_norm_rotary(q, k, v, torch.ones(32), torch.ones(32), None, inplace=True)\n"
    )
    done = script("-c", program, GEOALIGN_CAPTURE=f"qk_norm_rotary_:1:1:{tmp_path}")
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.iterdir()
    assert path.name == "qk_norm_rotary_-00001.safetensors"
    op, args = load(path, "cpu")
    torch.manual_seed(3)
    packed = [torch.randn(1, 5, 3, 2, 16) for _ in range(2)][1]
    assert op == "qk_norm_rotary_" and torch.equal(args[0], packed[:, :, 0])  # the inputs, before the op overwrote them
    assert args[0].stride() == packed[:, :, 0].stride() and args[2] is None
    replayed = script("profiling/replay.py", str(path), "--repeats", "2")
    assert replayed.returncode == 0, replayed.stderr
    assert json.loads(replayed.stdout)["rel_l2"] == 0.0
    broken = script("-c", program, GEOALIGN_CAPTURE="qk_norm_rotary_:all")
    assert "op:first:last" in broken.stderr


def test_every_kind_of_argument_survives_a_capture(tmp_path: Path) -> None:
    """A dtype, lists of flags and of key words, host coefficients, absent tensors, a named core."""
    program = (
        "import torch, geoalign_kernels as gk\n"
        "x, y, w = (torch.randn(1, 3, 8, requires_grad=True) for _ in range(3))\n"
        "gk.modulated_norm(x, w[:, 0], w[:, 1], dtype=torch.bfloat16).float().sum().backward()\n"
        "gk.unrotate_gate_norm(y, x, w[0, 0], w[0, 1], w[0, 2], heads=2)[1].sum().backward()\n"
        "gk.flow_step(x, y, (0.9, -0.1, 0.3, 0.0), key=gk.NoiseKey(1, 2, 3, 4, 5)).log_prob.sum().backward()\n"
        "q = torch.randn(1, 5, 2, 16, requires_grad=True)\n"
        "gk.attention(q, q, q, core='sdpa_flash').out.sum().backward()\n"
        "with torch.no_grad(): gk.attention(q, q, q, mode='int8_fp8')\n"
    )
    ops = ("modulated_norm", "unrotate_gate_norm_backward", "flow_step", "flow_log_prob_backward", "attention_backward",
           "attention_int8_fp8")  # fmt: skip
    for op in ops:
        done = script("-c", program, GEOALIGN_CAPTURE=f"{op}:0:0:{tmp_path}")
        assert done.returncode == 0, done.stderr
        replayed = script("profiling/replay.py", str(tmp_path / f"{op}-00000.safetensors"), "--repeats", "2")
        assert replayed.returncode == 0, replayed.stderr
        row = json.loads(replayed.stdout)
        # the same code on the same numbers, but for attention, whose reference is another core
        assert row["op"] == op and row["rel_l2"] <= (1e-5 if op == "attention_backward" else 0.0)
    refused = script(
        "profiling/replay.py", str(tmp_path / "flow_step-00000.safetensors"), "--device", "cpu", "--profile"
    )
    assert refused.returncode == 2 and "CUDA profiler" in refused.stderr


def test_profiler_scripts_call_their_tools(tmp_path: Path) -> None:
    for tool in ("ncu", "nsys"):
        (tmp_path / tool).write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
        (tmp_path / tool).chmod(0o755)

    def run(*words: str, path: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", *words], cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True
        )

    here, without = f"{tmp_path}:{os.environ['PATH']}", "/usr/bin:/bin"
    words = run("profiling/ncu_op.sh", "captures/a-00000.safetensors", path=here).stdout.split("\n")
    assert "--profile-from-start" in words and words[words.index("--export") + 1] == "a-00000"
    assert words[-6:-1] == [
        str(ROOT / "profiling/replay.py"),
        "captures/a-00000.safetensors",
        "--device",
        "cuda",
        "--profile",
    ]
    words = run(
        "profiling/nsys_step.sh", "report", "30", "9", "--", "train", "--config", "smoke", path=here
    ).stdout.split("\n")
    assert words[words.index("--delay") + 1] == "30" and words[words.index("--duration") + 1] == "9"
    assert words[-6:-1] == ["-m", "geoalign", "train", "--config", "smoke"]
    for name, usage in (("ncu_op.sh", "FILE.safetensors"), ("nsys_step.sh", "REPORT DELAY_S")):
        done = run(f"profiling/{name}", path=here)
        assert done.returncode == 2 and usage in done.stderr
    assert "not on PATH" in run("profiling/ncu_op.sh", "x", path=without).stderr

"""How a time is taken: against a stand-in for a GPU whose times are known."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest


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


def stand_in(monkeypatch: pytest.MonkeyPatch, gpu: FakeGpu) -> list[float]:
    """Puts it in the place of `torch.cuda`; how long it was told to sleep."""
    import bench_timing
    import torch

    slept: list[float] = []

    def sleep(cycles: int) -> None:
        slept.append(cycles)
        gpu.enqueue(0.005, cycles / 2e6)

    stand_ins = {
        "Event": lambda enable_timing: FakeEvent(gpu), "_sleep": sleep, "synchronize": gpu.synchronize,
        "CUDAGraph": lambda: gpu, "graph": gpu.graph, "current_stream": lambda device: "side",
    }  # fmt: skip
    for name, replacement in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    monkeypatch.setattr(bench_timing, "count_launches", gpu.count)
    return slept


@pytest.mark.usefixtures("profiling")
@pytest.mark.parametrize(("kernel", "captured", "graph"), [(0.01, 20, True), (0.01, 0, False), (0.06, 20, False)])
def test_a_gpu_time_is_that_of_the_kernel_and_not_of_python(
    monkeypatch: pytest.MonkeyPatch, kernel: float, captured: int, graph: bool
) -> None:
    """Also where dispatch takes far longer; a graph is replayed for short kernels only, and never an empty one."""
    import bench_timing
    import torch

    gpu = FakeGpu(kernel, captured)
    stand_in(monkeypatch, gpu)
    monkeypatch.setattr(bench_timing, "_by_wall", lambda *_: 0.2 + kernel)
    found = bench_timing.measure(gpu.call, torch.device("cuda"), 30)
    assert found["t_ms_median"] == pytest.approx(kernel) and found["t_ms_p80"] == pytest.approx(kernel)
    assert found["graph"] == graph and ("empty" in found["note"]) == (captured == 0)


@pytest.mark.usefixtures("profiling")
@pytest.mark.parametrize(
    ("kernel", "calls", "rests"), [(1.0, (10, 30), 30), (8.0, (10, 30), 0), (30.0, (3, 10), 0), (400.0, (2, 5), 0)]
)
def test_a_long_call_is_timed_a_few_times_on_a_card_that_never_rests(
    monkeypatch: pytest.MonkeyPatch, kernel: float, calls: tuple[int, int], rests: int
) -> None:
    import bench_timing
    import torch

    gpu = FakeGpu(kernel, 20)
    slept = stand_in(monkeypatch, gpu)
    monkeypatch.setattr(bench_timing, "_by_wall", lambda call, device, index: call(index) or kernel)
    found = bench_timing.measure(gpu.call, torch.device("cuda"), 30)
    assert (found["n_warm"], found["n_rep"]) == calls and len(slept) == rests
    assert gpu.launches == sum(calls) + rests
    assert found["t_ms_median"] == pytest.approx(kernel)
    if not rests:  # it began when the first call was there and has worked ever since
        assert gpu.gpu == pytest.approx(sum(calls) * kernel, abs=1.0)
    assert bench_timing.measure(gpu.call, torch.device("cuda"), 4)["n_rep"] == 4


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


@pytest.mark.usefixtures("profiling")
def test_clocks_are_those_of_the_card_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first visible card may be the machine's third: nvidia-smi does not read CUDA_VISIBLE_DEVICES."""
    import bench_timing
    import torch

    asked: list[str] = []

    def run(command: list[str], **_: Any) -> Any:
        asked.extend(command)
        return type("Done", (), {"stdout": "1980 MHz, 3201 MHz, 41, 120.5 W, 570.1\n"})

    monkeypatch.setattr(bench_timing.subprocess, "run", run)
    cards = {"cuda:0": "a-third", "cuda:1": "a-first"}
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: type("Properties", (), {"uuid": cards[str(device)]})
    )
    found = bench_timing.clocks(torch.device("cuda", 0))
    assert found["clocks.sm"] == "1980 MHz" and found["driver_version"] == "570.1"
    assert asked[-1] == "--id=GPU-a-third"
    cards["cuda:1"] = "GPU-a-first"
    assert bench_timing.clocks(torch.device("cuda", 1)) and asked[-1] == "--id=GPU-a-first"
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: object())
    assert bench_timing.clocks(torch.device("cuda", 0)) == {}

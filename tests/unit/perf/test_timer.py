"""Spans reach the profiler under their name and the phase timer adds up what an injected clock says."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from geoalign.perf import spans, timer
from geoalign.perf.spans import span
from geoalign.perf.timer import PhaseTimer


def work() -> torch.Tensor:
    with span("update/backward"):
        return torch.ones(4).sum()


def test_spans_appear_in_a_torch_profile_and_nest() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        with span("rollout"), span("rollout/window"):
            torch.ones(4).sum()
        work()
    events = {event.name: event for event in profile.events()}
    assert {"rollout", "rollout/window", "update/backward"} <= set(events)
    assert events["rollout/window"].cpu_parent.name == "rollout"


def test_spans_work_without_the_nvtx_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "nvtx", None)
    with span("rollout"):
        assert work() == 4


def test_a_span_does_not_swallow_errors_and_can_be_left_by_one() -> None:
    with pytest.raises(ValueError, match="inside"), span("rollout"):
        raise ValueError("inside")
    with span("rollout"):
        pass


def test_phases_add_up_by_name_and_other_is_what_no_phase_covers(monkeypatch: pytest.MonkeyPatch) -> None:
    # The clock advances by one second at every reading, so each duration is a count of readings in between.
    clock = itertools.count()
    monkeypatch.setattr(timer, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    phases = PhaseTimer()  # reads 0
    with phases.phase("rollout"):  # 1 .. 6
        for _ in range(2):
            with phases.phase("rollout/window"):  # 2 .. 3 and 4 .. 5
                pass
    with pytest.raises(RuntimeError), phases.phase("update"):  # 7 .. 8
        raise RuntimeError
    result = phases.collect()  # reads 9
    assert result == {
        "time/rollout/window_s": 2.0,
        "time/rollout_s": 5.0,
        "time/update_s": 1.0,
        "time/iteration_s": 9.0,
        "time/other_s": 3.0,
        "time/between_s": 0.0,
    }
    with phases.active():  # 10: what went by since the collection belongs to no iteration
        pass
    assert phases.collect() == {"time/iteration_s": 1.0, "time/other_s": 1.0, "time/between_s": 1.0}


@pytest.mark.gpu
def test_phases_on_a_gpu_charge_kernels_to_the_phase_that_launched_them() -> None:
    phases = PhaseTimer("cuda")
    with phases.phase("rollout"):
        torch.cuda._sleep(200_000_000)  # about 0.1 s of device time, returns at once
    with phases.phase("update"):
        pass
    result = phases.collect()
    assert result["time/rollout_s"] > 10 * result["time/update_s"]

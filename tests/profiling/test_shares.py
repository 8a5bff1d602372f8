"""What `make gpu` is predicted to take, stage by stage, on the fastest and on the slowest card; and in which order."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from geoalign.perf.devices import DEVICES

CARDS = {"h200": (9, 0), "a800": (8, 0)}


def planned(card: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A quick run at production shapes, which `estimate` makes of fake tensors; cuDNN is there, as beside any GPU."""
    import bench_cases
    import bench_ops
    import torch

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: CARDS[card])
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(bench_cases, "buffers_for", lambda size, device: 3)
    bench = object.__new__(bench_ops.Bench)
    bench.device, bench.small, bench.quick = torch.device("cuda"), False, True
    bench.dtype, bench.profile = torch.bfloat16, DEVICES[card]
    return bench


@pytest.mark.usefixtures("profiling")
@pytest.mark.parametrize("card", CARDS)
def test_every_stage_is_predicted_to_fit_into_its_share(card: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Imports, ceilings, compilers and exact results included; rivals that torch.compile makes take what is left."""
    import bench_depth
    import bench_ops
    import bench_prices as prices
    import bench_rewards
    import gpu

    stages = {stage.name: stage for stage in gpu.STAGES}
    assert sum(stage.share_s for stage in gpu.STAGES) == 540
    fixed = prices.START_S + 2 * prices.CEILINGS_S + gpu.CLOSE_S
    assert all(fixed < stage.least_s for name, stage in stages.items() if name != "tests")
    wanted = {
        "rewards": sum(bench_rewards.price_s(case, DEVICES[card]) for case in bench_rewards.cases(quick=True)),
        # With torch's own core, all that a bare machine has; a slower card takes the iteration of fewer steps.
        "iteration": bench_depth.price_s(
            bench_depth.paper(), 2, bench_depth.SIZES[0 if card == "h200" else -1],
            DEVICES[card].with_core("sdpa_flash"),
        ),
    }  # fmt: skip
    bench = planned(card, monkeypatch)
    for name, stage in stages.items():
        if stage.command[0] == "ops/bench_ops.py":
            rows = bench_ops.estimate(bench, stage.command[-1])
            wanted[name] = sum(price for (_, impl, _), price in rows if impl not in prices.COMPILED)
    assert {name for name, seconds in wanted.items() if fixed + seconds > stages[name].share_s} == set(), wanted
    assert wanted.keys() | {"tests"} == stages.keys()


@pytest.mark.usefixtures("profiling")
@pytest.mark.parametrize("card", CARDS)
def test_what_decides_comes_first(card: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import bench_ops
    import bench_prices

    bench = planned(card, monkeypatch)
    rows = [(case.name, case.shape[0], impl, way) for (case, impl, way), _ in bench_ops.estimate(bench, "attention")]
    assert rows[0][:2] == ("attention", 65_520)
    core = "sdpa_cudnn" if card == "h200" else "sdpa_flash"
    ours = [(core, "fwd"), ("int8", "fwd"), ("triton", "fwd"), (core, "bwd"), ("triton", "bwd")]
    places = {row: max(i for i, found in enumerate(rows) if found[2:] == row) for row in ours}
    rivals = [i for i, found in enumerate(rows) if found[2] in ("sdpa_flash", "sdpa_cudnn") and found[2] != core]
    assert rivals and max(places.values()) < min(rivals)
    assert max(places[row] for row in ours[:3]) < min(i for i, found in enumerate(rows) if found[3] == "bwd")
    assert max(places[row] for row in ours[:3]) < len(rows) / 2

    rows = [(impl, way) for (_, impl, way), _ in bench_ops.estimate(bench, "norm,gated")]
    count = sum(impl == "ours" for impl, _ in rows)
    assert count == 10 <= len(rows) / 2 and {impl for impl, _ in rows[:count]} == {"ours"}
    assert [way for _, way in rows[:count]] == ["fwd"] * 5 + ["bwd"] * 5
    compiled = [impl in bench_prices.COMPILED for impl, _ in rows]
    assert sum(compiled) == 10 and all(compiled[-10:])


class Op:
    """A case of which some rates are known."""

    name, variant, shape, rows = "op", "", (7,), [("a", "fwd"), ("b", "fwd"), ("b", "bwd"), ("c", "fwd"), ("d", "fwd")]
    known = {("a", "fwd"): 10.0, ("b", "fwd"): 50.0}  # noqa: RUF012

    def absent(self, impl: str) -> str:
        return "not there" if impl == "c" else ""

    def predicted_ms(self, profile: Any, impl: str, direction: str) -> float | None:
        return 1e6 if impl == "c" else self.known.get((impl, direction))

    def truth_s(self, direction: str) -> float:
        return 8.0 if direction == "bwd" else 0.0


@pytest.mark.usefixtures("profiling")
def test_nothing_is_free() -> None:
    """An unknown rate or card counts as the slowest known one; what is made once is paid once."""
    import bench_prices as prices

    found = prices.Prices(None)
    assert found.profile is DEVICES["a800"]
    op = Op()
    assert [found.call_ms(op, *row) for row in op.rows if row[0] != "c"] == [10.0, 50.0, 50.0, 50.0]
    assert found.row(op, "a", "fwd") == pytest.approx(prices.CASE_S + 0.01 * (10 + 30 + prices.BESIDE))
    first = found.pay(op, "b", "bwd")
    assert first == pytest.approx(prices.CASE_S + 8.0 + 0.05 * (3 + 10 + prices.BESIDE))
    assert found.pay(op, "b", "bwd") == pytest.approx(first - prices.CASE_S - 8.0)


@pytest.mark.usefixtures("profiling")
def test_an_estimate_leaves_no_fake_tensors_in_rivals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that makes a tensor where it is imported keeps it for the rows that are timed later."""
    import bench_ops
    import torch

    (tmp_path / "sageattention.py").write_text("import torch\nTABLE = torch.ones(3)\ndef sageattn(*_, **__): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "sageattention", None)
    del sys.modules["sageattention"]  # is as before when the test is over
    rows = bench_ops.estimate(planned("h200", monkeypatch), "attention")
    assert "sage" in {impl for (_, impl, _), _ in rows}
    assert type(sys.modules["sageattention"].TABLE) is torch.Tensor

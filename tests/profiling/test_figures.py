"""The report of a result file: a line per row, a point per time, verdicts on the targets."""

from __future__ import annotations

from pathlib import Path

import pytest
from profiling_runs import kernel_row, rows_of, script


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
    assert "not measured" in text.partition(f"## Targets, on {rows[0]['device']}\n")[2].partition("##")[0]
    drawn = ElementTree.parse(tmp_path / "self.svg").findall("{*}circle/{*}title")
    assert len(drawn) == len(timed)
    assert script("profiling/figures.py", str(tmp_path / "self.md")).returncode == 2


@pytest.mark.usefixtures("profiling")
def test_targets_are_judged_by_the_rows_of_the_run() -> None:
    import figures

    rows = [
        kernel_row("qk_norm_rotary", "ours", 1.0, pct_copy=86.0), kernel_row("qk_norm_rotary", "eager", 7.9),
        kernel_row("qk_norm_rotary", "compiled", 1.31), kernel_row("rms_norm", "ours", 1.0, pct_copy=84.0),
        kernel_row("attention", "int8", 50.0, rel_l2=0.014), kernel_row("attention", "sdpa_flash", 66.0),
        kernel_row("attention", "triton", 80.0), kernel_row("attention", "int8", 1.0, shape=[16_384]),
        kernel_row("attention", "sage", 40.0),
    ]  # fmt: skip
    verdicts = {what: verdict for what, _, _, verdict in figures.targets(rows)}
    assert verdicts["qk_norm_rotary fwd, % of the copy ceiling"] == "met"
    assert verdicts["rms_norm fwd, % of the copy ceiling"] == "missed"
    assert verdicts["qk_norm_rotary over the published formulation"] == "missed"
    assert verdicts["qk_norm_rotary over the compiled rewrite"] == "met"
    assert verdicts["int8 attention over the best exact core (sdpa_flash)"] == "met"
    assert verdicts["int8 attention, relative error"] == "met"
    assert verdicts["exact Triton attention, time over SDPA-flash"] == "missed"
    assert verdicts["int8_fp8 attention over the best exact core"] == "not measured"
    # By the rule that a run goes by: 1.8 times a slow core is no reason beside a fast one.
    faster = [*rows, kernel_row("attention", "sdpa_cudnn", 55.0), kernel_row("attention", "int8_fp8", 47.0)]
    verdicts = {what: verdict for what, _, _, verdict in figures.targets(faster)}
    assert verdicts["int8 attention over the best exact core (sdpa_cudnn)"] == "missed"
    assert verdicts["int8_fp8 attention over the best exact core (sdpa_cudnn)"] == "met"


@pytest.mark.usefixtures("profiling")
def test_the_report_has_the_bound_and_the_cores_of_the_package() -> None:
    """The script runs without it."""
    import figures

    from geoalign.perf.devices import INT8_WORTH
    from geoalign_kernels.ops.attention.cores import CORES

    assert figures.INT8_WORTH == INT8_WORTH and {*figures.CORES} == {*CORES} - {"reference"}

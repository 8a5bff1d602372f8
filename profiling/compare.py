"""Regressions of a result file of `bench_ops.py` against earlier ones.

    python profiling/compare.py NEW.jsonl OLD.jsonl [OLD.jsonl ...]

Rows are compared inside a cohort: the same name, variant, implementation, direction, shape, dtype, device and software
versions. A regression exceeds the median of the last five runs of its cohort by more than 5 % and by more than 0.05 ms:
a relative bound alone would flag the noise of the shortest rows, an absolute one alone would miss them. Rows of an
unsteady stage do not count. Exit code: 1 if something regressed, 2 for a file that is not a result file.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from figures import load, quotable

RELATIVE, ABSOLUTE_MS, RUNS = 0.05, 0.05, 5
Row = dict[str, Any]


def cohorts(rows: list[Row]) -> dict[tuple[Any, ...], float]:
    """`{cohort: median ms}` of the kernels of one run that may be quoted."""
    environment = rows[0]
    machine = (environment["device"], tuple(sorted(environment["versions"].items())), environment["cuda"])
    timed = [row for row in rows[1:] if row["kind"] == "kernel" and row["status"] == "ok"]
    timed = [row for row in timed if quotable(row, environment)]
    fields = ("name", "variant", "impl", "direction", "dtype")
    return {(*(row[f] for f in fields), tuple(row["shape"]), machine): row["t_ms_median"] for row in timed}


def regressions(new: list[Row], old: list[list[Row]]) -> list[str]:
    """One line per cohort that became slower than both bounds allow."""
    earlier = [cohorts(run) for run in sorted(old, key=lambda run: run[0]["run_id"])]
    found = []
    for cohort, time in cohorts(new).items():
        before = [run[cohort] for run in earlier if cohort in run][-RUNS:]
        if not before:
            continue
        usual = statistics.median(before)
        if time > usual * (1.0 + RELATIVE) and time > usual + ABSOLUTE_MS:
            label = " ".join(str(part) for part in cohort[:6] if part != "")
            found.append(f"{label}: {time:.4g} ms, {usual:.4g} ms in the last {len(before)} runs")
    return found


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("new", type=Path)
    parser.add_argument("old", type=Path, nargs="+")
    options = parser.parse_args()
    try:
        new, old = load(options.new), [load(path) for path in options.old]
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if not cohorts(new):
        print("nothing in the new run was steady: it shows nothing", file=sys.stderr)
    found = regressions(new, old)
    print("\n".join(found) or "no regression")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

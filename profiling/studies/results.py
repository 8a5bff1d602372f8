"""Every table that rests on the embedded default, from one list of runs: `make results`.

    python profiling/studies/results.py             run what is missing or stale, then write the pages
    python profiling/studies/results.py --status    say what is finished, missing or stale, and run nothing

A result file holds a fingerprint of what it was made with (configuration, base, metrics); one with another fingerprint
is stale. Finished runs are skipped and an interrupted one is continued, so the command may be stopped at any time. A
change of code alone makes nothing stale: name those runs with --again. About six CPU-hours in all.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import evaluators
import fidelity
import learning
import learning_tables
import levers
import pace
import rungs
import time_to_quality
import time_to_quality_tables
from record import SMALL, WHOLE, Scale, state, write_generated

ROOT, TIMED = Path(__file__).parents[2], "bench_levers"
PAGES: dict[Path, Callable[[Path], str]] = {
    learning_tables.PAGE: learning_tables.page,
    evaluators.PAGE: evaluators.page,
    fidelity.PAGE: fidelity.page,
    levers.PAGE: levers.page,
}


@dataclass(frozen=True)
class Run:
    """One result file.

    Attributes:
        name: what people call it.
        result: its file, below the root.
        settings: what it depends on.
        make: writes the file it is given.
        alone: whether it must have the machine for itself (it measures time).
    """

    name: str
    result: Path
    settings: Mapping[str, Any]
    make: Callable[[Path], None]
    alone: bool = False


def runs(scale: Scale, work: Path) -> list[Run]:
    """The one list: every run behind a page. A new row of a table is a new entry of what it is made of here."""
    config = scale.learning
    found = [
        Run(
            study.name,
            learning.RESULTS / f"{learning.slug(study.name)}.json",
            learning.settings(study, config),
            partial(learning.run_study, study, work=work, config=config),
        )
        for study in learning.STUDIES
    ]
    found += [
        Run(
            name,
            learning.RESULTS / f"{learning.slug(name)}.json",
            learning.oracle_settings(base, config),
            partial(learning.run_oracles, base, work=work, config=config),
        )
        for base, name in learning.ORACLES.items()
    ]
    found.append(Run("evaluators", evaluators.RESULT, evaluators.settings(), evaluators.run))
    measured = partial(fidelity.run, work=work, scale=scale)
    found.append(Run("fidelity", fidelity.RESULT, fidelity.settings(scale), measured))
    for kind, study, names in (
        ("time to quality", time_to_quality, time_to_quality.ARMS),
        ("rung", rungs, rungs.CHANGED),
    ):
        for name in names:
            for seed in scale.seeds:
                changed, file = study.overrides(name, seed, scale), study.file_of(name, seed)
                make = partial(time_to_quality.run, name, seed, changed, work=work)
                found.append(Run(f"{kind}: {name}, seed {seed}", file, time_to_quality.settings(changed), make))
    timing = partial(levers.run, config=TIMED, repeats=scale.repeats)
    return [
        *found,
        Run("levers", levers.RESULT, levers.settings(TIMED, scale.repeats), timing, alone=True),
        Run("pace", pace.RESULT, pace.settings(scale), partial(pace.run, scale=scale), alone=True),
    ]


def carry_out(run: Run, root: Path) -> None:
    """Make one result and say how long it took."""
    began = time.monotonic()
    print(f"{run.name}: running", flush=True)
    (root / run.result).parent.mkdir(parents=True, exist_ok=True)
    run.make(root / run.result)
    print(f"{run.name}: finished in {time.monotonic() - began:.0f} s", flush=True)


def write_pages(root: Path) -> None:
    """Write the generated part of every page; outside this checkout, into copies of its pages."""
    time_to_quality_tables.draw(root)
    for page, text in PAGES.items():
        if not (root / page).exists():
            (root / page).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / page, root / page)
        write_generated(root / page, text(root))
        print(f"{page}: written")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--status", action="store_true", help="say what is there and run nothing")
    parser.add_argument("--again", action="append", default=[], metavar="NAME", help="run it although it is finished")
    parser.add_argument("--small", action="store_true", help="rehearse: every run cut short, for another --root")
    parser.add_argument("--root", type=Path, default=ROOT, help="where results and pages lie (default: this checkout)")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "geoalign_results")
    parser.add_argument("--workers", type=int, default=2, help="learning runs at a time")
    args = parser.parse_args()
    if args.small and args.root.resolve() == ROOT:
        parser.error("--small would replace the tables of this checkout: give another --root")
    scale = SMALL if args.small else WHOLE
    found = runs(scale, args.work)
    if unknown := sorted(set(args.again) - {run.name for run in found}):
        parser.error(
            f"--again: no run is called {', '.join(unknown)}; there are {', '.join(run.name for run in found)}"
        )
    states = {run.name: state(args.root / run.result, run.settings) for run in found}
    for name, text in states.items():
        print(f"{name}: {text}")
    if args.status:
        return
    wanted = [run for run in found if states[run.name] != "finished" or run.name in args.again]
    together = [run for run in wanted if not run.alone]
    if together:
        args.work.mkdir(parents=True, exist_ok=True)
        for name in (scale.learning, TIMED):
            learning.render_world(args.work, name)
    with ThreadPoolExecutor(args.workers) as pool:
        for future in [pool.submit(carry_out, run, args.root) for run in together]:
            future.result()
    for run in wanted:
        if run.alone:
            carry_out(run, args.root)
    write_pages(args.root)


if __name__ == "__main__":
    main()

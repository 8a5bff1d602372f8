"""Kills, full disks, signals and second processes at every place of every writing verb: `make campaign`.

    BUDGET_S=1800 python tests/campaign/campaign.py      go on where the last one of this commit stopped, for so long
    python tests/campaign/campaign.py --go-on            go on whatever commit the last one was of
    python tests/campaign/campaign.py --out FILE --kills 12 --inputs 0     a part, elsewhere

Trials are drawn from a seed and their number, so the same ones run on every machine. Each ends as one of: clear_error
(one line; the next run finishes, bitwise equal), accepted_rightly (the result equals the undisturbed one bitwise, after
a kill that of the next run), accepted_wrongly, traceback, hang, lost (the next run fails or differs, or something
temporary stays).
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / part) for part in ("", "kernels", "tests/support", "tests/campaign", "profiling/studies")]

from damage import Damaged, classify, damaged_inputs  # noqa: E402
from faults import Child, Ended, Fault, apart, run, state_of  # noqa: E402
from groups import DELAYS, Groups  # noqa: E402
from patience import PATIENCE_S  # noqa: E402
from verbs import BY_NAME, VERBS, Verb, different, leftovers  # noqa: E402

KINDS = ("clear_error", "accepted_rightly", "accepted_wrongly", "traceback", "hang", "lost")
RESULT, PAGE = ROOT / "docs" / "results" / "reliability.json", ROOT / "docs" / "reliability.md"
GROUPS = {
    "dying_ranks": Groups.dying_rank,
    "signalled_ranks": Groups.signalled,
    "dying_preparers": Groups.dying_preparer,
    "dying_workers": Groups.dying_worker,
}
WANTED = {
    "kills": 20 * len(VERBS),
    "full_disks": 75,
    "read_only": 25,
    "double_signals": 16,
    "two_processes": 15,
    "dying_ranks": 8,
    "signalled_ranks": 8,
    "dying_preparers": 8,
    "dying_workers": 6,
    "inputs": 1600,
}
"""What an hour of two cores is spent on."""
GOLDEN = 0.6180339887498949
INPUTS_AT_ONCE = 50
SIZES = (1, 100, 5000, 60_000, 400_000, 1_500_000)  # bytes, on both sides of what the verbs write


class Campaign:
    """Templates, undisturbed results and the trials."""

    def __init__(self, work: Path, seed: int = 0) -> None:
        self.work, self.seed = work, seed
        self.template = work / "template"
        self.expected: dict[str, dict[str, str]] = {}
        self.operations: dict[str, int] = {}
        self.groups = Groups(self.template, work, self.expected)
        self.judged_inputs, self._inputs = 0, damaged_inputs(seed, 10**9, work / "inputs")

    def prepare(self) -> None:
        """Run every verb undisturbed: what it leaves is the truth, and its operations are counted."""
        warm()
        self.template.mkdir(parents=True)
        for name, made in (("world render", "data"), ("train", "run"), ("sample", "retake")):
            BY_NAME[name].start(self.template, self.work / "first")
            must(run(BY_NAME[name].arguments, self.work / "first"))
            shutil.copytree(self.work / "first" / made, self.template / made)
        for verb in VERBS:
            folder = self.work / "undisturbed"
            verb.start(self.template, folder)
            ended = must(run(verb.arguments, folder))
            self.expected[verb.name], self.operations[verb.name] = dict(verb.leaves(folder)), ended.operations
            assert not leftovers(folder), leftovers(folder)

    def trials(self, campaign: str, number: int, most: int) -> list[tuple[str, str]]:
        """(kind, what happened) of the trial ``number``, and of those after it, at most ``most`` of which it takes."""
        if campaign == "inputs":
            next(itertools.islice(self._inputs, number - self.judged_inputs, number - self.judged_inputs), None)
            self.judged_inputs = number + min(INPUTS_AT_ONCE, most)
            return apart(judged, list(itertools.islice(self._inputs, self.judged_inputs - number)))
        if campaign in GROUPS:
            folder = self.work / "trial"
            BY_NAME["train"].start(self.template, folder)
            return [GROUPS[campaign](self.groups, folder, number, random.Random(f"{self.seed} {campaign} {number}"))]
        return [self.trial(campaign, number)]

    def trial(self, campaign: str, number: int) -> tuple[str, str]:
        """One trial of a verb in one process."""
        draw = random.Random(f"{self.seed} {campaign} {number}")
        verb = VERBS[number % len(VERBS)]
        if campaign == "double_signals":
            verb = BY_NAME["train"]
        if campaign == "two_processes":
            verb = BY_NAME[("world render", "prepare", "train")[number % 3]]
        folder = self.work / "trial"
        verb.start(self.template, folder)
        last, turn = self.operations[verb.name], number // len(VERBS)
        at = 1 + draw.randrange(last)
        if campaign == "kills" and turn % 2:
            at = 1 + int(last * (GOLDEN * turn % 1))  # spread evenly, however many there are; between them random ones
        if campaign == "kills":
            kind, text = self.after(verb, folder, run(verb.arguments, folder, Fault("kill", at)), killed=True)
        elif campaign == "full_disks":
            fault = Fault("full", at) if number % 2 else Fault(bytes=draw.choice(SIZES))
            kind, text = self.after(verb, folder, run(verb.arguments, folder, fault))
            text = f"{fault.bytes} bytes; {text}"
        elif campaign == "read_only":
            kind, text = self.after(verb, folder, run(verb.arguments, folder, Fault("read-only", at)), read_only=True)
        elif campaign == "double_signals":
            delay = DELAYS[number % len(DELAYS)]
            kind, text = self.after(verb, folder, run(verb.arguments, folder, Fault("terms", at, delay)), killed=True)
        else:
            kind, text = self.second_process(verb, folder, at)
        return kind, f"{verb.name}, operation {at} of {last}: {text}"

    def after(
        self, verb: Verb, folder: Path, ended: Ended, killed: bool = False, read_only: bool = False
    ) -> tuple[str, str]:
        """Judge how a disturbed verb ended, then let the next run finish and compare."""
        if ended.code is None or ended.traceback:
            return ("hang" if ended.code is None else "traceback"), ended.text
        stopped = killed and ended.code in (-signal.SIGKILL, -signal.SIGTERM, 75)
        same = different(self.expected[verb.name], folder, verb.leaves)
        if same == "" and (stopped or ended.code == 0):  # a kill may come when all is done
            return "accepted_rightly", ""
        if ended.code == 0 and not (read_only and same.startswith("left over")):  # there nobody can tidy up
            return "accepted_wrongly", same
        if not killed and ended.code != 0 and not ended.clear_error:
            return "traceback", f"exit code {ended.code}: {ended.text[-1500:]}"
        if killed and not stopped:
            return "lost", f"exit code {ended.code}: {ended.text[-1500:]}"
        again = run(verb.continued, folder)
        if again.code != 0:
            kind = "hang" if again.code is None else "traceback" if again.traceback else "lost"
            return kind, f"the next run: {again.text[-1500:]}"
        same = different(self.expected[verb.name], folder, verb.leaves)
        right = "accepted_rightly" if killed or ended.code == 0 else "clear_error"
        return ("lost", same) if same else (right, ended.text[-300:])

    def second_process(self, verb: Verb, folder: Path, at: int) -> tuple[str, str]:
        """While one is stopped in the middle, a second one must be refused; the first then finishes as if alone."""
        first = Child(verb.arguments, folder, Fault("stop", at))
        if not stopped(first.pid):
            return self.after(verb, folder, first.wait(), killed=True)
        locked = any(path.name.startswith(".lock") and path.stat().st_size for path in folder.rglob(".lock*"))
        second = run(verb.continued, folder) if locked else None
        os.kill(first.pid, signal.SIGCONT)
        ended = first.wait()
        if second is not None and not (second.code == 2 and "another process writes this" in second.text):
            return ("traceback" if second.traceback else "accepted_wrongly"), second.text[-1500:]
        kind, text = self.after(verb, folder, ended, killed=True)
        return ("clear_error" if kind == "accepted_rightly" and second is not None else kind), text


def warm() -> None:
    """Import what the verbs import, so that a fork finds it; compute nothing, for threads do not survive a fork."""
    for name in (
        "cli.main",
        "jobs.train",
        "jobs.pretrain",
        "data.prepare",
        "world.dataset",
        "report.page",
        "policy.formats",
        "jobs.sample",
        "jobs.score",
        "policy.lora",
        "data.plots",
        "rewards.running.worker",
        "benchmark.run",
        "jobs.fidelity",
        "jobs.draw_path",
    ):
        importlib.import_module(f"geoalign.{name}")
    from torch.utils import tensorboard  # noqa: F401


def must(ended: Ended) -> Ended:
    """The end of a verb that nothing disturbed."""
    if ended.code != 0:
        raise SystemExit(f"an undisturbed verb failed ({ended.code}):\n{ended.text}")
    return ended


def stopped(pid: int, timeout_s: float = PATIENCE_S) -> bool:
    """Wait until a child stopped itself; False if it ended first."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        state = state_of(pid)
        if state in "TZ":
            return state == "T"
        time.sleep(0.02)
    return False


def judged(call: Damaged) -> tuple[str, str]:
    """(kind, what happened) of one damaged input."""
    kind, said = classify(call.call)
    return kind, f"{call.reader}, {call.description}: {said}"


def machine() -> dict[str, Any]:
    """Where and on what the campaign ran."""
    from geoalign.jobs.environment import describe_environment

    return describe_environment()


def load(out: Path, commit: object, go_on: bool) -> dict[str, Any]:
    """The result so far, with all its commits, if it is of this commit or ``go_on`` keeps it; else an empty one."""
    empty = {"campaigns": {}, "problems": [], "seconds": 0.0, "commits": []}
    known = json.loads(out.read_text()) if out.exists() else empty
    clean = str(commit).removesuffix("-dirty")
    result = known if go_on or known["commits"] == [clean] else empty
    return result | {"commits": [*(name for name in result["commits"] if name != clean), clean]}


def go_on(
    campaign: Campaign, result: dict[str, Any], wanted: dict[str, int], until: float, save: Callable[[], None]
) -> None:
    """Trials of all campaigns in turn, fewest done first, until they are all done or the time is over."""
    while time.monotonic() < until:
        counts = result["campaigns"]
        left = [
            name for name in wanted if wanted[name] and counts.setdefault(name, empty_counts())["tried"] < wanted[name]
        ]
        if not left:
            return
        name = min(left, key=lambda n: counts[n]["tried"] / wanted[n])
        number, began = counts[name]["tried"], time.monotonic()
        outcomes = campaign.trials(name, number, wanted[name] - number)
        for kind, text in outcomes:
            counts[name]["tried"] += 1
            counts[name][kind] += 1
            if kind not in KINDS[:2]:
                result["problems"].append({"campaign": name, "number": number, "kind": kind, "what": text})
                print(f"{name} {number}: {kind}: {text}", flush=True)
        result["seconds"] += time.monotonic() - began
        save()


def empty_counts() -> dict[str, int]:
    """Zeros."""
    return dict(Counter(dict.fromkeys(("tried", *KINDS), 0)))


def main() -> int:
    """Run a campaign and write its result; 1 if anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=RESULT, help="result file; the page is written only with the default"
    )
    parser.add_argument(
        "--go-on", action="store_true", help="also where the result so far is of other commits; the page names them all"
    )
    for name, count in WANTED.items():
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, type=int, default=count, metavar="N")
    args = parser.parse_args()
    budget = float(os.environ.get("BUDGET_S", "3600"))
    until, facts = time.monotonic() + budget, machine()
    result = load(args.out, facts.get("commit"), args.go_on) | facts | {"wanted": WANTED}
    from geoalign.files.atomic import atomic_write_json

    with tempfile.TemporaryDirectory(prefix="geoalign-campaign-") as work:
        campaign = Campaign(Path(work))
        campaign.prepare()
        go_on(
            campaign, result, {n: getattr(args, n) for n in WANTED}, until, lambda: atomic_write_json(args.out, result)
        )
    for name, counts in result["campaigns"].items():
        print(f"{name}: " + ", ".join(f"{kind} {count}" for kind, count in counts.items()))
    if args.out == RESULT:
        from page import write_page

        write_page(RESULT, PAGE)
    return int(any(counts[kind] for counts in result["campaigns"].values() for kind in KINDS[2:]))


if __name__ == "__main__":
    sys.exit(main())

"""Kills, full disks, signals and second processes at every place of every writing verb: `make campaign`.

    BUDGET_S=1800 python tests/campaign/campaign.py      go on where the last one of this commit stopped, for so long
    python tests/campaign/campaign.py --out FILE --kills 12 --inputs 0     a part, elsewhere

Trials are drawn from a seed and their number, so the same ones run on every machine. Each ends as one of: clear_error
(one line; the next run finishes, bitwise equal), accepted_rightly (the result equals the undisturbed one bitwise, after
a kill that of the next run), accepted_wrongly, traceback, hang, lost (the next run fails or differs, or something
temporary stays).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / part) for part in ("", "kernels", "tests/support", "tests/campaign", "profiling/studies")]

from faults import Child, Ended, Fault, run  # noqa: E402
from verbs import VERBS, Verb, leftovers  # noqa: E402

KINDS = ("clear_error", "accepted_rightly", "accepted_wrongly", "traceback", "hang", "lost")
RESULT, PAGE = ROOT / "docs" / "results" / "reliability.json", ROOT / "docs" / "reliability.md"
WANTED = {
    "kills": 320,
    "full_disks": 120,
    "read_only": 40,
    "double_signals": 24,
    "two_processes": 24,
    "ranks": 4,
    "inputs": 1500,
}
SIZES = (1, 100, 5000, 60_000, 400_000, 1_500_000)  # bytes, on both sides of what the verbs write


class Campaign:
    """Templates, undisturbed results and the trials."""

    def __init__(self, work: Path, seed: int = 0) -> None:
        self.work, self.seed = work, seed
        self.template = work / "template"
        self.expected: dict[str, dict[str, str]] = {}
        self.operations: dict[str, int] = {}

    def prepare(self) -> None:
        """Run every verb undisturbed: what it leaves is the truth, and its operations are counted."""
        warm()
        self.template.mkdir(parents=True)
        by_name = {verb.name: verb for verb in VERBS}
        for name, made in (("world render", "data"), ("train", "run")):
            by_name[name].start(self.template, self.work / "first")
            must(run(by_name[name].arguments, self.work / "first"))
            shutil.copytree(self.work / "first" / made, self.template / made)
        for verb in VERBS:
            folder = self.work / "undisturbed"
            verb.start(self.template, folder)
            ended = must(run(verb.arguments, folder))
            self.expected[verb.name], self.operations[verb.name] = dict(verb.leaves(folder)), ended.operations
            assert not leftovers(folder), leftovers(folder)

    def trial(self, campaign: str, number: int) -> tuple[str, str]:
        """(kind, what happened) of one trial."""
        draw = random.Random(f"{self.seed} {campaign} {number}")
        verb = VERBS[number % len(VERBS)]
        if campaign in ("double_signals",):
            verb = next(v for v in VERBS if v.name == "train")
        if campaign == "two_processes":
            verb = [v for v in VERBS if v.name in ("world render", "prepare", "train")][number % 3]
        folder = self.work / "trial"
        verb.start(self.template, folder)
        last, turn = self.operations[verb.name], number // len(VERBS)
        at = 1 + draw.randrange(last)
        if campaign == "kills" and turn < 2 * last and turn % 2:
            at = 1 + turn // 2  # every operation in turn, and between them random ones
        if campaign == "kills":
            kind, text = self.after(verb, folder, run(verb.arguments, folder, Fault("kill", at)), killed=True)
        elif campaign == "full_disks":
            fault = Fault("full", at) if number % 2 else Fault(bytes=draw.choice(SIZES))
            kind, text = self.after(verb, folder, run(verb.arguments, folder, fault))
            text = f"{fault.bytes} bytes; {text}"
        elif campaign == "read_only":
            kind, text = self.after(verb, folder, run(verb.arguments, folder, Fault("read-only", at)))
        elif campaign == "double_signals":
            delay = (0.0, 0.05, 0.3, 2.0)[number % 4]
            kind, text = self.after(verb, folder, run(verb.arguments, folder, Fault("terms", at, delay)), killed=True)
        else:
            kind, text = self.second_process(verb, folder, at)
        return kind, f"{verb.name}, operation {at} of {last}: {text}"

    def after(self, verb: Verb, folder: Path, ended: Ended, killed: bool = False) -> tuple[str, str]:
        """Judge how a disturbed verb ended, then let the next run finish and compare."""
        if ended.code is None or ended.traceback:
            return ("hang" if ended.code is None else "traceback"), ended.text
        if ended.code == 0:
            same = self.equal(verb, folder)
            return ("accepted_rightly", "") if same == "" else ("accepted_wrongly", same)
        if not killed and not ended.clear_error:
            return "traceback", f"exit code {ended.code}: {ended.text[-1500:]}"
        if killed and ended.code not in (-signal.SIGKILL, -signal.SIGTERM, 75):
            return "lost", f"exit code {ended.code}: {ended.text[-1500:]}"
        again = run(verb.continued, folder)
        if again.code != 0:
            kind = "hang" if again.code is None else "traceback" if again.traceback else "lost"
            return kind, f"the next run: {again.text[-1500:]}"
        same = self.equal(verb, folder)
        return ("lost", same) if same else ("accepted_rightly" if killed else "clear_error", ended.text[-300:])

    def equal(self, verb: Verb, folder: Path) -> str:
        """Empty if a finished verb left what the undisturbed one did, and nothing else; else the difference."""
        try:
            found = dict(verb.leaves(folder))
        except Exception as error:
            return f"what it left cannot be read: {error}"
        left, expected = leftovers(folder), self.expected[verb.name]
        wrong = [name for name in {*found, *expected} if found.get(name) != expected.get(name)]
        return f"left over: {left}" if left else f"differs: {sorted(wrong)[:5]}" if wrong else ""

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
    ):
        importlib.import_module(f"geoalign.{name}")
    from torch.utils import tensorboard  # noqa: F401


def must(ended: Ended) -> Ended:
    """The end of a verb that nothing disturbed."""
    if ended.code != 0:
        raise SystemExit(f"an undisturbed verb failed ({ended.code}):\n{ended.text}")
    return ended


def stopped(pid: int, timeout_s: float = 120.0) -> bool:
    """Wait until a child stopped itself; False if it ended first."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        if state in "TZ":
            return state == "T"
        time.sleep(0.02)
    return False


def rank_trial(work: Path, number: int) -> tuple[str, str]:
    """Two ranks, of which one is killed: the others end with one message, and the run can be continued."""
    from verbs import SMALL

    folder = work / "ranks"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    begin = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "geoalign",
        "train",
    ]
    settings = (*SMALL, "train.iterations=400", "train.rank_timeout_s=20")
    process = subprocess.Popen(
        [*begin, *settings], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    while process.poll() is None and not list(folder.glob("run/checkpoints/step_*")):
        time.sleep(0.1)
    time.sleep(random.Random(number).random())
    ranks = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(ranks[number % len(ranks)]), signal.SIGKILL)
    text, _ = process.communicate(timeout=120)
    alone = [sys.executable, "-m", "geoalign", "train", *SMALL, "--resume", "auto", "--allow-config-change"]
    done = sorted(int(path.name[5:11]) for path in folder.glob("run/checkpoints/step_*"))[-1]
    after = subprocess.run(
        [*alone, f"train.iterations={done + 1}"], cwd=folder, env=environment, text=True, capture_output=True
    )
    if process.returncode == 0 or after.returncode != 0:
        return "lost", f"{text[-800:]}\n{after.stderr[-800:]}"
    return "clear_error", ""


def damaged_inputs(seed: int, first: int, count: int) -> list[tuple[str, str]] | None:
    """(kind, what happened) of damaged input files; None where the generator of tests/support/damage.py is missing."""
    if importlib.util.find_spec("damage") is None:
        return None
    from damage import damaged_inputs as generate  # pyrefly: ignore

    return list(generate(seed, first + count))[first:]


def machine() -> dict[str, Any]:
    """Where and on what the campaign ran."""
    from geoalign.jobs.environment import describe_environment

    return describe_environment()


def load(out: Path, commit: object) -> dict[str, Any]:
    """The result so far, if it is of this commit; else an empty one."""
    empty = {"campaigns": {}, "problems": [], "seconds": 0.0}
    known = json.loads(out.read_text()) if out.exists() else empty
    return known if str(known.get("commit")).removesuffix("-dirty") == str(commit).removesuffix("-dirty") else empty


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
        if name == "inputs":
            outcomes = damaged_inputs(campaign.seed, number, min(50, wanted[name] - number))
            if outcomes is None:
                del wanted[name], counts[name]
                continue
        else:
            outcomes = [rank_trial(campaign.work, number) if name == "ranks" else campaign.trial(name, number)]
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
    parser.add_argument("--again", action="store_true", help="forget what is in the result file")
    for name, count in WANTED.items():
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, type=int, default=count, metavar="N")
    args = parser.parse_args()
    budget = float(os.environ.get("BUDGET_S", "3600"))
    until, facts = time.monotonic() + budget, machine()
    result = {"campaigns": {}, "problems": [], "seconds": 0.0} if args.again else load(args.out, facts.get("commit"))
    result |= facts
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

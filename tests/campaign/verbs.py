"""The verbs that write, at the smallest size, each with what a finished one must leave, whatever happened before."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from geoalign.files.atomic import is_temporary, read_jsonl

SMALL = (
    "--config", "smoke", "data.root=data", "data.cache=cache", "run.dir=run", "world.clips=6", "world.trajectories=8",
    "groups.conditions=2", "groups.size=4", "train.iterations=3", "train.checkpoint_every=1", "eval.samples=2",
    "data.clips.val_fraction=0", "pretrain.steps=3", "pretrain.pool=32", "pretrain.batch=8",
)  # fmt: skip


@dataclass(frozen=True)
class Verb:
    """One writing verb.

    Attributes:
        name: what it is called in the results.
        arguments: its command line, in the folder of a trial.
        needs: folders of the template that it starts from.
        leaves: what a finished one left, as texts by name; equal to the undisturbed one's or something was lost.
        again: what continues it after a kill; None: the same command.
    """

    name: str
    arguments: tuple[str, ...]
    needs: tuple[str, ...]
    leaves: Callable[[Path], Mapping[str, str]]
    again: tuple[str, ...] | None = None

    def start(self, template: Path, folder: Path) -> None:
        """Make the folder of a trial anew."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in self.needs:
            shutil.copytree(template / name, folder / name)

    @property
    def continued(self) -> tuple[str, ...]:
        """The command that finishes what an earlier one began."""
        return self.arguments if self.again is None else self.again


def leftovers(folder: Path) -> list[str]:
    """Temporaries and locks that nobody removed."""
    return sorted(
        str(p.relative_to(folder)) for p in folder.rglob("*") if is_temporary(p) or p.name.startswith(".lock")
    )


Leaves = Callable[[Path], Mapping[str, str]]
"""What a finished verb left in a folder, as texts by name."""


def different(expected: Mapping[str, str], folder: Path, leaves: Leaves) -> str:
    """Empty if a finished verb left what the undisturbed one did, and nothing else; else the difference."""
    try:
        found = dict(leaves(folder))
    except Exception as error:
        return f"what it left cannot be read: {type(error).__name__}: {error}"
    left = leftovers(folder)
    wrong = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    return f"left over: {left}" if left else f"differs: {wrong[:5]}" if wrong else ""


COMPARED = ("iteration", "reward", "policy", "parity", "window")
"""Metrics that must be equal; the others measure time, memory and what this process has read so far."""


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _bits(value: Tensor) -> str:
    return hashlib.sha256(value.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def tree(*names: str) -> Callable[[Path], dict[str, str]]:
    """The bytes of all files below ``names``."""

    def leaves(folder: Path) -> dict[str, str]:
        files = (file for name in names for file in (folder / name, *sorted((folder / name).rglob("*"))))
        return {str(file.relative_to(folder)): _digest(file) for file in files if file.is_file()}

    return leaves


def tensors(*paths: str) -> Callable[[Path], dict[str, str]]:
    """The tensors of safetensors files; their headers tell how long it took."""

    def leaves(folder: Path) -> dict[str, str]:
        from safetensors.torch import load_file

        found = {}
        for path in paths:
            for name, value in load_file(folder / path).items():
                found[f"{path}/{name}"] = _bits(value)
        return found

    return leaves


def windows(folder: Path) -> dict[str, str]:
    """Prepared windows by key, however they are packed; nothing damaged."""
    from geoalign.data.cache import CacheFolder

    path = next((folder / "cache").glob("*/settings.json"))
    cache = CacheFolder(folder / "cache", json.loads(path.read_text()))
    found = {f"defect {file}": defect for file, defect in cache.verify()}
    for key, entry in cache.entries().items():
        for name, value in cache.read(entry).items():
            found[f"{key}/{name}"] = _bits(value)
    return found


def trained(folder: Path) -> dict[str, str]:
    """Policy, newest checkpoint, held-out numbers and the metrics that do not measure time."""
    newest = sorted((folder / "run" / "checkpoints").glob("step_??????"))[-1].relative_to(folder)
    parts = ("trained", "average", "optimizer")
    found = tensors("run/policy.safetensors", *(f"{newest}/{part}.safetensors" for part in parts))(folder)
    summary = json.loads((folder / "run" / "summary.json").read_text())
    found["held out"] = json.dumps([summary["held_out_per_noise_seed"], summary["iterations"]])
    for row in read_jsonl(folder / "run" / "metrics.jsonl"):
        kept = {key: row[key] for key in row if key.split("/")[0] in COMPARED}
        found[f"iteration {row['iteration']}"] = json.dumps(kept, sort_keys=True)
    return found


def numbers(path: str, key: str) -> Callable[[Path], dict[str, str]]:
    """What a JSON file holds under ``key``."""
    return lambda folder: {key: json.dumps(json.loads((folder / path).read_text())[key])}


def benchmarked(folder: Path) -> dict[str, str]:
    """Cases, tables and videos of a benchmark; how long a case took is its own."""
    rows = [{**row, "seconds": None} for row in read_jsonl(folder / "bench" / "cases.jsonl")]
    return tree("bench/tables", "bench/videos")(folder) | {"cases": json.dumps(rows)}


def written(path: str) -> Callable[[Path], dict[str, str]]:
    """A page that is there to its end."""
    return lambda folder: {path: str((folder / path).read_text().rstrip().endswith("</html>"))}


BASE = ("--model", "builtin:tiny_base")
RETAKE = (
    "sample", *BASE, "--video", "data/clips/files/drone00000/drone00000_0000000_0000005.mp4", "--steps", "4",
    "--trajectory", "arc_left", "--out", "retake/r.mp4",
)  # fmt: skip
SCORE = ("score", "--video", "retake/r.mp4", "--trajectory", "retake/r.json", "--json", "out/s.json", "--plot")
LORA = ("--checkpoint", "run/checkpoints/step_000003/average.safetensors", "--rank", "2", "--out", "out/l.safetensors")
BENCHMARK = (
    "benchmark", "run", *SMALL, "--model", "base=builtin:tiny_base", "--out", "bench",
    "benchmark.max_clips=1", "benchmark.paths=[arc_back_left,fly_forward]", "benchmark.speeds=[1]",
)  # fmt: skip
FIDELITY = ("fidelity", "run", *SMALL, "--groups", "1", "--json", "out/f.json", "--setting", "flow.tail_solver=dpm2m")
DRAW = ("path", "draw", "--video", RETAKE[4], "--out", "out/p.html")
VERBS = (
    Verb("world render", ("world", "render", *SMALL), (), tree("data")),
    Verb("prepare", ("prepare", *SMALL, "data.prepare.clips_per_shard=4"), ("data",), windows),
    Verb("train", ("train", *SMALL), ("data",), trained, ("train", *SMALL, "--resume", "auto")),
    Verb("pretrain", ("pretrain", *SMALL, "--out", "out/base.safetensors"), (), tensors("out/base.safetensors")),
    Verb(
        "export", ("export", *BASE, "--format", "diffusers", "--out", "out/folder"), (),
        tree("out"),
    ),
    Verb("export lora", ("export", *BASE, "--format", "lora", *LORA), ("run",), tree("out")),
    Verb("evaluate", ("evaluate", *SMALL, *BASE, "--json", "out/e.json"), (), numbers("out/e.json", "held_out")),
    Verb("report", ("report", "run"), ("run",), written("run/report.html")),
    Verb("sample", RETAKE, ("data",), tree("retake")),
    Verb("score", SCORE, ("data", "retake"), tree("retake", "out")),
    Verb("data trajectories", ("data", "trajectories", *SMALL, "--plot", "out/t.png"), ("data",), tree("out")),
    Verb("benchmark run", BENCHMARK, ("data",), benchmarked),
    Verb("fidelity run", FIDELITY, ("data",), numbers("out/f.json", "rows")),
    Verb("path draw", DRAW, ("data",), tree("out")),
    Verb("config docs", ("config", "docs", "--out", "out/page.md"), (), tree("out/page.md")),
)  # fmt: skip
BY_NAME = {verb.name: verb for verb in VERBS}

"""Result files as sound inputs: a benchmark's folder, tables of fidelity, prompts; and JSON with another value."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from geoalign.benchmark.methods import _read_prompts
from geoalign.benchmark.render import markdown
from geoalign.benchmark.report import report_page as benchmark_page
from geoalign.benchmark.store import Store
from geoalign.benchmark.table import Results, all_tables
from geoalign.cli.fidelity import _earlier
from geoalign.config.load import load_config, to_yaml
from geoalign.config.schema import Config
from geoalign.data.subset import choose
from geoalign.data.video import write_video
from geoalign.flow.reuse import DriftProfile
from geoalign.training.drift import read_profile

ODD: tuple[Any, ...] = (
    None, True, 7, -1, 1.5, 1e300, math.nan, math.inf, 10**400, "", "x", "\0", "../x", "\ud800", [], {}, [[]], {"a": 1},
)  # fmt: skip
"""Values that any place in a JSON file may come to hold."""


def places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every value in a JSON value, the whole first."""
    yield here
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*here, key))


def with_another_value(data: bytes, rng: np.random.Generator) -> tuple[str, bytes] | None:
    """JSON (or one line of JSON lines) in which one value is another, gone, or twice there; None for no JSON."""
    try:
        value = json.loads(data)
    except ValueError:
        lines = data.split(b"\n")
        number = int(rng.integers(len(lines)))
        if len(lines) == 1 or (found := with_another_value(lines[number], rng)) is None:
            return None
        return f"line {number + 1}: {found[0]}", b"\n".join([*lines[:number], found[1], *lines[number + 1 :]])
    every = list(places(value))
    place, kind = every[int(rng.integers(len(every)))], int(rng.integers(len(ODD) + 2))
    if not place:
        return "another whole", json.dumps(ODD[kind % len(ODD)]).encode()
    changed = copy.deepcopy(value)
    holder = changed
    for key in place[:-1]:
        holder = holder[key]
    if kind < len(ODD):
        holder[place[-1]] = 0 if (odd := ODD[kind]) == 10**400 else odd
        text = json.dumps(changed)
        text = text.replace(": 0", f": {'9' * 400}", 1) if odd == 10**400 else text  # Python writes none so long
        return f"{place} is {str(odd)[:9]!r}", text.encode()
    if kind == len(ODD):
        del holder[place[-1]]
        return f"{place} is gone", json.dumps(changed).encode()
    return "the first key twice", data.replace(b"{", b'{"a": 1, "a": 2, ', 1)


def make_benchmark(folder: Path) -> None:
    """One case of two methods, with a video, read by one reader of two frames."""
    eye = np.eye(4)[:3].tolist()
    by_frame = {"frames": [0, 1], "position_m": [0.0, 0.1], "rotation_deg": [0.0, 1.0], "c2w": [eye, eye]}
    metrics = {"translation_error_m": 0.1, "rotation_error_deg": 1.0, "trans_err": None}
    reading = {"status": "ok", "cause": "", "metrics": metrics, "by_frame": by_frame}
    readers = {"planar": {"cameras": True, "metrics": [], "licence": ""}}
    write_video(folder / "videos" / "v.mp4", np.zeros((2, 16, 16, 3), np.uint8), 12, lossless=True)
    name = "bear_camera_1_speed_1"
    for method in ("base", "trained"):
        row = {
            "method": method, "case": name, "clip": "bear", "path": "pan_right", "speed": 1.0, "status": "ok",
            "cause": "", "frames": 2, "video": "videos/v.mp4", "source": "videos/v.mp4", "facts": {"near_share": 0.5},
            "metrics": {"psnr_db": 20.5}, "readers": {"planar": reading},
        }  # fmt: skip
        (folder / "rows" / method).mkdir(parents=True)
        (folder / "rows" / method / f"{name}.json").write_text(json.dumps(row))
    told = {"settings": {}, "methods": {"base": {}, "trained": {}}, "contents": {}, "cases": [name], "readers": readers}
    (folder / "benchmark.json").write_text(json.dumps(told))
    (folder / "config.yaml").write_text(to_yaml(load_config(Config, "smoke", ["benchmark.resamples=100"])))
    numbers = {"source": "a paper", "methods": {"A": {"rot_err_deg": 1.2}}}
    (folder / "numbers.json").write_text(json.dumps(numbers))


def read_benchmark(folder: Path) -> Any:
    """All tables and the page."""
    store = Store(folder)
    results = Results.read(store)
    store.write_rows_jsonl()
    return len("".join(map(markdown, all_tables(results))) + benchmark_page(store, results)) > 0


def make_fidelity(folder: Path) -> None:
    """Two records of one setting."""
    numbers = dict.fromkeys(("spearman", "kendall", "pearson", "flips", "flips_weighted", "psnr", "distance"), 0.5)
    group = numbers | {"shift": {"geometry": 0.1}, "spread": {"geometry": None}}
    records = [{"setting": "a=1", "window": 1, "iteration": k, "groups": [group, group]} for k in range(2)]
    (folder / "f.json").write_text(json.dumps({"made_with": {}, "records": records, "notes": {"a=1": {}}}))


def read_fidelity(folder: Path) -> Any:
    """Its records, in order."""
    return [record.setting for record in _earlier(folder / "f.json", {})[0]]


def make_profile(folder: Path) -> None:
    """A drift profile of three levels."""
    told = {"sigmas": [0.9, 0.5, 0.0], "drift": [0.0, 0.1, 0.3], "reuse": "residual", "base": "x"}
    (folder / "drift.json").write_text(json.dumps(told))


def read_drift(folder: Path) -> Any:
    """A number between two levels."""
    found: DriftProfile = read_profile(folder / "drift.json", "residual", Path("x"))
    return math.isfinite(found.at(0.7))


def read_prompts(folder: Path) -> Any:
    """Prompts of one clip."""
    return all(isinstance(prompt, str) and prompt for prompt in _read_prompts(folder / "p.json", ["bear"]).values())


def read_subset(folder: Path) -> Any:
    """Hours of a subset, which are finite and not negative."""
    hours = choose([folder / "scenes.csv"], 1.0).hours
    assert 0 <= hours < math.inf
    return True

"""The folder of a benchmark: its settings, one row per case as a file of its own, and where everything else lies.

A row is written whole when its case is done, so a kill loses the case that was worked on and no other, and processes on
several machines share a folder without talking to each other.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geoalign.benchmark.cases import Case
from geoalign.benchmark.forms import ManifestForm, RowForm
from geoalign.config.load import flatten, load_config, to_yaml
from geoalign.config.schema import Config
from geoalign.data.folders import visible
from geoalign.errors import DataError, UsageError
from geoalign.files.atomic import atomic_write_json, atomic_write_text, remove_leftovers
from geoalign.files.forms import filled
from geoalign.files.parsing import read_json_object
from geoalign.jobs.train_held_out import conditions_of

CONFIG, MANIFEST, NUMBERS, ROWS_JSONL = "config.yaml", "benchmark.json", "numbers.json", "cases.jsonl"
_OF_TABLES = ("base", "ablation", "table_reader", "table2_reads_base", "resamples", "estimators", "tools", "caps")
"""Settings of the section that change no video, or that may grow by new names."""
_GROWN = ("max_clips", "clip_list", "paths", "speeds")
"""May grow too: every case has a row of its own."""
_OURS = (
    CONFIG,
    MANIFEST,
    NUMBERS,
    ROWS_JSONL,
    "locks",
    "rows",
    "videos",
    "sources",
    "targets",
    "tools",
    "cut",
    "tables",
)


@dataclass(frozen=True, slots=True)
class Store:
    """Files of a benchmark under one folder."""

    folder: Path

    @property
    def videos(self) -> Path:
        """Retakes of our models: ``videos/METHOD/NAME.mp4``, a folder that ``--videos`` takes."""
        return self.folder / "videos"

    @property
    def sources(self) -> Path:
        """Sources as the tools see them."""
        return self.folder / "sources"

    def target_file(self, name: str, frames: int) -> Path:
        """The wanted camera of a condition at a length."""
        return self.folder / "targets" / f"{name}_{frames}.npz"

    def told(self, path: Path) -> str:
        """A path as rows hold it: from the folder on where it lies inside, so that the folder may be moved."""
        inside = path.absolute().is_relative_to(self.folder.absolute())
        return str(path.absolute().relative_to(self.folder.absolute()) if inside else path.absolute())

    def row_file(self, case: Case) -> Path:
        """Where the row of a case lies."""
        return case.file(self.folder / "rows", ".json")

    def row(self, case: Case) -> dict[str, Any] | None:
        """The row of a case, or None if it was not measured."""
        file = self.row_file(case)
        return _read_row(file, case.method) if file.is_file() else None

    def write_row(self, case: Case, row: Mapping[str, Any]) -> None:
        """Write a row, whole."""
        atomic_write_json(self.row_file(case), row)

    def rows(self) -> list[dict[str, Any]]:
        """All rows by method and case, in the order of the manifest's methods.

        Raises DataError for a folder that is no benchmark, or a damaged row.
        """
        methods = self.manifest()["methods"]
        rows = [
            _read_row(file, method)
            for method in methods
            for file in visible((self.folder / "rows" / method).glob("*.json"))
        ]
        order = {name: number for number, name in enumerate(self.manifest()["cases"])}
        known = [row for row in rows if row.get("case") in order]
        return sorted(known, key=lambda row: (list(methods).index(row["method"]), order[row["case"]]))

    def write_rows_jsonl(self) -> None:
        """All rows in one file, ``cases.jsonl``."""
        lines = (json.dumps(row, allow_nan=False) for row in self.rows())
        atomic_write_text(self.folder / ROWS_JSONL, "".join(f"{line}\n" for line in lines))

    def keep_numbers(self, path: Path) -> None:
        """Copy numbers of others, which were read once, into the folder."""
        atomic_write_json(self.folder / NUMBERS, read_json_object(path))

    def manifest(self) -> dict[str, Any]:
        """What the benchmark is made of; raises DataError for a folder that is none."""
        if not (self.folder / MANIFEST).is_file():
            raise DataError(f"{self.folder}: no benchmark there ({MANIFEST} is missing); run `geoalign benchmark run`")
        told, file = read_json_object(self.folder / MANIFEST), self.folder / MANIFEST
        filled(ManifestForm, told, file, "restore it, or run the benchmark into another folder")
        return told

    def config(self, overrides: Iterable[str] = ()) -> Config:
        """The configuration that it was last run with."""
        self.manifest()
        return load_config(Config, str(self.folder / CONFIG), tuple(overrides))

    def open(
        self, config: Config, methods: Mapping[str, Any], contents: Mapping[str, str], cases: list[str],
        readers: Mapping[str, Mapping[str, Any]], renewed: Collection[str] = (),
    ) -> None:  # fmt: skip
        """Begin, or take up, a benchmark: new methods, readers and clips may come, nothing may become another.

        Args:
            config: of this run.
            methods, contents, cases, readers: what it is made of.
            renewed: names of ``contents`` that may be others now.

        Raises:
            UsageError: the folder holds one of other settings, or a method, reader or file of that name was another.
        """
        told: dict[str, Any] = {"settings": _settings(config), "methods": dict(methods), "cases": cases}
        told["contents"] = dict(contents)
        told["readers"] = {name: dict(reader) for name, reader in readers.items()}
        if (self.folder / MANIFEST).is_file():
            before = self.manifest()
            self._refuse("settings", _counted(before["settings"], config), told["settings"])
            for kind in ("methods", "contents", "readers"):
                common = (before[kind].keys() & told[kind].keys()) - {*renewed}
                self._refuse(kind, *({name: side[kind][name] for name in common} for side in (before, told)))
                told[kind] = {**before[kind], **told[kind]}
            caps = (self.config().benchmark.caps, config.benchmark.caps)
            kept = before["methods"].keys()  # of a new method, none is known yet
            self._refuse("caps", *({name: cap for name, cap in side.items() if name in kept} for side in caps))
            told["cases"] = list(dict.fromkeys([*before["cases"], *cases]))
        elif self.folder.is_dir() and any(file.name not in _OURS for file in visible(self.folder.iterdir())):
            raise UsageError(f"{self.folder}: holds other files and no benchmark; choose another --out")
        remove_leftovers(self.folder)
        atomic_write_text(self.folder / CONFIG, to_yaml(config))
        atomic_write_json(self.folder / MANIFEST, told)

    def _refuse(self, what: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        if changed:
            name = changed[0]
            raise UsageError(
                f"{self.folder} holds a benchmark of other {what}: {name} was {before.get(name)!r}, now "
                f"{now.get(name)!r}; choose another --out"
            )


def _read_row(file: Path, method: str) -> dict[str, Any]:
    row, fix = read_json_object(file), "delete it: `geoalign benchmark run` makes it again"
    form = filled(RowForm, row, file, fix)
    if (form.method, form.case) != (method, file.stem):
        raise DataError(f"{file}: holds the case {form.case} of {form.method}; {fix}")
    return row


def _settings(config: Config) -> dict[str, Any]:
    """What decides on the retakes and their truth, by dotted key."""
    kept = config.benchmark.model_dump(mode="json", exclude={*_OF_TABLES, *_GROWN})
    world = {name: value for name, value in conditions_of(config).items() if name.startswith("world.")}
    flow = config.flow.model_dump(mode="json", include={"steps", "shift", "t_dtype", "tail_solver"})
    told = {
        "benchmark": kept,
        "flow": flow,
        "eval": {"seed": config.eval.seed},
        "world": world,
        "caption_text": config.data.clips.caption_text,
        "dtype": config.run.dtype,
    }
    return _counted(flatten(told), config)


def _counted(settings: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Those of ``settings`` that have an effect: one without must lock no folder, nor keep an older one locked.

    A tail of another length exists only after a window, the published way of sampling has its own steps, noise and
    precision, and a folder of clips needs no world.
    """
    idle = ["flow.tail_ratio"]
    if config.benchmark.settings == "published":
        idle += ["flow.", "benchmark.seed", "dtype"]
    if config.benchmark.clips is not None:
        idle += ["eval.", "world"]
    return {name: value for name, value in settings.items() if not name.startswith(tuple(idle))}

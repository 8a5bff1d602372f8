"""The columns of the tables: which number of a row each shows, its title, its unit, and which way is better."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from geoalign.benchmark.measure import PUBLISHED_TRANS_ERR
from geoalign.benchmark.statistics import Values
from geoalign.config.benchmark import BenchmarkConfig

Row = Mapping[str, Any]
OPEN = "not measured"
"""Status of a reader that has not come to a case yet."""
LOWER, HIGHER, ONE = "\N{DOWNWARDS ARROW}", "\N{UPWARDS ARROW}", "\N{RIGHTWARDS ARROW}1"

CAMERA = {
    "rot_err_deg": ("RotErr, deg", LOWER),
    PUBLISHED_TRANS_ERR: ("TransErr", LOWER),
    "trans_err": ("TransErr of moving paths", LOWER),
    "translation_error_m": ("position, m", LOWER),
    "rotation_error_deg": ("rotation, deg", LOWER),
    "scale_ratio": ("scale ratio", ONE),
    "translation_gain": ("gain", ONE),
}
"""Errors of a camera that was read, the published ones first."""
_CONSISTENCY = {"met3r": ("MEt3R", LOWER), "dyn_met3r": ("Dyn-MEt3R", HIGHER)}
_QUALITY = {
    "subject_consistency": ("subject consistency", HIGHER),
    "background_consistency": ("background consistency", HIGHER),
    "motion_smoothness": ("motion smoothness", HIGHER),
    "dynamic_degree": ("dynamic degree", HIGHER),
    "aesthetic_quality": ("aesthetic quality", HIGHER),
    "imaging_quality": ("imaging quality", HIGHER),
}
_TRUTH = {"psnr_db": ("PSNR, dB", HIGHER)}
TITLES = {**_CONSISTENCY, **CAMERA, **_QUALITY, **_TRUTH}


@dataclass(frozen=True, slots=True)
class Column:
    """One number of a row.

    Attributes:
        reader: who measured it; "" for what needs no reader.
        metric: its name in the row.
    """

    reader: str
    metric: str

    @property
    def title(self) -> str:
        """Name, unit and which way is better."""
        name, better = TITLES.get(self.metric, (self.metric.replace("_", " "), ""))
        return f"{name} {better}".strip()

    @property
    def better(self) -> str:
        """LOWER, HIGHER, ONE, or "" if nobody says."""
        return TITLES.get(self.metric, ("", ""))[1]

    def badness(self, value: float) -> float:
        """What grows as ``value`` gets worse; infinite where there is none (NaN)."""
        if not math.isfinite(value):
            return math.inf
        if self.better == ONE:
            return abs(math.log(value)) if value > 0 else math.inf
        return -value if self.better == HIGHER else value

    def of(self, row: Row) -> float | None:
        """The number; NaN of a case that failed; None where it is not defined (TransErr of a still path)."""
        status = outcome(row, self.reader)[0]
        if status != "ok":
            return math.nan if status == "failed" else None
        found = row["readers"][self.reader]["metrics"] if self.reader else row["metrics"]
        value = found.get(self.metric)
        return None if value is None else float(value)

    def values(self, rows: Iterable[Row]) -> Values:
        """The number of each of ``rows`` where it is defined, by clip and case; NaN of those that failed."""
        found = (((row["clip"], row["case"]), self.of(row)) for row in rows)
        return {key: value for key, value in found if value is not None}


@dataclass(frozen=True, slots=True)
class Readers:
    """Who measured, and whose camera the numbered tables print.

    Attributes:
        told: the manifest's readers by name.
        cameras: names of those that read cameras.
        main: the reader of tables 1 to 3, "" if none reads cameras.
    """

    told: Mapping[str, Mapping[str, Any]]
    cameras: tuple[str, ...]
    main: str

    @staticmethod
    def of(told: Mapping[str, Mapping[str, Any]], settings: BenchmarkConfig) -> Readers:
        """As the settings choose: the table reader, else ViPE, else the first that is not the reward."""
        cameras = tuple(name for name, reader in told.items() if reader["cameras"])
        wished = (settings.table_reader, "vipe", *(name for name in cameras if not told[name].get("is_the_reward")))
        main = next((name for name in wished if name in cameras), cameras[0] if cameras else "")
        return Readers(told, cameras, main)

    def label(self, name: str) -> str:
        """The name, marked where the model was rewarded by it."""
        return f"{name} (is the reward)" if self.told[name].get("is_the_reward") else name

    def columns(self, *, truth: bool) -> list[Column]:
        """Those of tables 1 and 3, in the paper's order: consistency, camera, quality; then what only we know."""
        found = [Column(self._owner(metric), metric) for metric in _CONSISTENCY if self._owner(metric)]
        camera = ("rot_err_deg", PUBLISHED_TRANS_ERR, "translation_error_m", "rotation_error_deg", "scale_ratio")
        found += [Column(self.main, metric) for metric in camera if self.main]
        found += [Column(self._owner(metric), metric) for metric in _QUALITY if self._owner(metric)]
        return found + ([Column("", "psnr_db")] if truth else [])

    def not_measured(self) -> list[str]:
        """Titles of the paper's numbers that no reader of this benchmark gives."""
        missing = [TITLES[metric][0] for metric in (*_CONSISTENCY, *_QUALITY) if not self._owner(metric)]
        return missing + ([] if "vipe" in self.told else ["RotErr and TransErr by ViPE"])

    def _owner(self, metric: str) -> str:
        return next((name for name, reader in self.told.items() if metric in reader["metrics"]), "")


def outcome(row: Row, reader: str) -> tuple[str, str]:
    """Status and cause of a reader in a row; a case without a video failed for all. Of no reader (""): of the case."""
    if row["status"] != "ok":
        return "failed", row["cause"]
    if not reader:
        return "ok", ""
    found = row["readers"].get(reader)
    return (OPEN, "not measured yet") if found is None else (found["status"], found["cause"])


def of_method(rows: Sequence[Row], method: str) -> list[Row]:
    """The rows of one method."""
    return [row for row in rows if row["method"] == method]

"""Runs side by side: changed settings, held-out numbers with paired differences, the same films, curves on one axis."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from geoalign.config.load import differing_keys, flatten
from geoalign.errors import UsageError
from geoalign.files.atomic import atomic_write_text, check_writable
from geoalign.report.curves import compared_curves
from geoalign.report.document import document
from geoalign.report.film import film_html
from geoalign.report.held_out import Value, conditions, judged, present_names
from geoalign.report.page import REFRESH_S, footer
from geoalign.report.results import value_text
from geoalign.report.run_folder import EvaluationClips, RunRecord, read_run
from geoalign.report.samples import (
    choose_samples,
    compared_film,
    compared_training_section,
    folded_film,
    how_to_look,
)
from geoalign.report.state import RunState, duration, followed, seconds_per_iteration
from geoalign.report.svg import number
from geoalign.report.what import told_changes
from geoalign.report.words import HELD_OUT, SETS, Metric

MOST_RUNS = 8  # as many colours as the pages have
_OWN = ("run.name", "run.dir")  # settings in which any two runs differ


@dataclass(frozen=True, slots=True)
class ComparedRun:
    """A run of the comparison: its short name, and the class that colours it."""

    label: str
    css: str
    record: RunRecord

    @property
    def mark(self) -> str:
        """The name with its colour, as markup."""
        return f'<span class="swatch fill-{self.css[4:]}"></span>{escape(self.label)}'

    def numbers(self, kind: str, stage: str = "after") -> dict[str, Value]:
        """Held-out values of a set."""
        means, seeds = (
            present_names((((self.record.summary.get(key) or {}).get(kind) or {}).get(stage)) or {})
            for key in ("held_out", "held_out_per_noise_seed")
        )
        found = {name: Value.parse(entry, seeds.get(name)) for name, entry in means.items()}
        return {name: value for name, value in found.items() if value is not None}

    def seeds(self, kind: str, metric: str) -> list[float | None]:
        """Values per noise seed after training."""
        rows = (((self.record.summary.get("held_out_per_noise_seed") or {}).get(kind) or {}).get("after")) or {}
        return list(present_names(rows).get(metric) or ())


_PAIRED = """Every run was measured on the same scenes, paths and noise, so a difference is taken noise seed by noise
seed: &plusmn; of a difference is the sample deviation of these paired differences, which is smaller than that of the
values where the noise moves both runs alike. A difference is coloured only where it exceeds it."""
_ONE_SEED = """Every run was measured on the same scenes, paths and noise, with one evaluation noise seed. That gives no
spread: differences are not coloured, because chance alone may explain them. Name several in
<code>eval.noise_seeds</code>."""
_UNPAIRED = """Not every run kept its values by noise seed, so none can be subtracted noise seed by noise seed and no
difference is shown."""
_UNLIKE = """<b class="bad">The runs were not measured alike: {} differ, which decide on the held-out scenes, paths and
noise or on how retakes are sampled there. Their numbers do not compare, and no difference is shown.</b>"""


def compare_page(records: Sequence[RunRecord], samples: int = 4) -> str:
    """The whole HTML document of two to eight runs; differences are to the first of them."""
    runs = _labelled(records)
    unlike = _other_conditions(runs)
    body = [
        f'<header><div class="eyebrow">geoalign comparison</div><h1>{_headline(runs, unlike)}</h1>',
        f'<ul class="runs">{"".join(f"<li>{run.mark}</li>" for run in runs)}</ul></header><main>',
        _overview(runs),
        _settings(runs),
        _held_out(runs, unlike),
        _films(runs, samples),
        compared_training_section([(run.css, run.label, run.record.films) for run in runs]),
        compared_curves([(run.label, run.record) for run in runs]),
        "</main>",
        footer(),
    ]
    live = any(record.live for record in records)
    title = " and ".join(run.label for run in runs)
    return document(f"{title} - geoalign", "\n".join(body), refresh_s=REFRESH_S if live else None)


def _labelled(records: Sequence[RunRecord]) -> list[ComparedRun]:
    return [
        ComparedRun(label, f"run-{index}", record)
        for index, (label, record) in enumerate(zip(_labels(records), records, strict=True), 1)
    ]


def _labels(records: Sequence[RunRecord]) -> list[str]:
    """The names of the runs; of equal names, the ends of their folders' paths, as short as they tell the runs apart."""
    labels = [record.name for record in records]
    same = [index for index, label in enumerate(labels) if labels.count(label) > 1]
    paths = [records[index].folder.absolute().parts for index in same]
    for length in range(1, max(map(len, paths), default=0) + 1):
        for index, path in zip(same, paths, strict=True):
            labels[index] = "/".join(path[-length:])
        if len(set(labels)) == len(labels):
            break
    return labels


def _other_conditions(runs: Sequence[ComparedRun]) -> list[str]:
    """The settings, of scenes, paths, noise and sampler, by which the runs were measured differently."""
    return differing_keys(*(conditions(run.record.config) for run in runs))


def difference(run: ComparedRun, first: ComparedRun, kind: str, metric: str) -> Value | None:
    """Mean of the differences to ``first`` by noise seed, and their sample deviation; None where seeds do not pair."""
    pairs = list(zip(run.seeds(kind, metric), first.seeds(kind, metric), strict=False))
    if len(run.seeds(kind, metric)) != len(first.seeds(kind, metric)):
        return None
    differences = [a - b for a, b in pairs if a is not None and b is not None]
    if not differences:
        return None
    return Value(statistics.fmean(differences), statistics.stdev(differences) if len(differences) > 1 else None)


def _metric(name: str) -> Metric:
    return HELD_OUT.get(name, Metric(name.replace("_", " "), "", "unknown", ""))


def _verdict(run: ComparedRun, first: ComparedRun, kind: str, metric: str) -> str:
    """``good`` or ``bad`` where the paired differences are further from zero than their spread, else ``even``."""
    found, values = difference(run, first, kind, metric), (run.numbers(kind), first.numbers(kind))
    if found is None or found.spread is None or any(metric not in part for part in values):
        return "even"
    return judged(_metric(metric).better, values[1][metric].mean, values[0][metric].mean, found.spread)


def _headline(runs: Sequence[ComparedRun], unlike: Sequence[str]) -> str:
    metric = "translation_error_m"
    measured = [run for run in runs if metric in run.numbers("mean")]
    if len(measured) < 2:  # of real clips none is, whatever samples them
        return f"{len(runs)} runs side by side"
    if unlike:
        return f"{len(runs)} runs that were measured on different conditions"
    best, second = sorted(measured, key=lambda run: run.numbers("mean")[metric].mean)[:2]
    least, other = (number(run.numbers("mean")[metric].mean) for run in (best, second))
    paired = difference(best, second, "mean", metric)
    if paired is None or paired.spread is None:
        return (
            f"The camera strays {least} metres from its path in {escape(best.label)}, {other} in {escape(second.label)}"
        )
    if _verdict(best, second, "mean", metric) != "good":
        return f"No difference beyond the spread: the least position errors are {least} and {other} metres"
    return f"{escape(best.label)} strays least: {least} metres, {escape(second.label)} {other}"


def _overview(runs: Sequence[ComparedRun]) -> str:
    rows, records = [], [run.record for run in runs]
    for run in runs:
        record, state = run.record, RunState.of(run.record)
        seconds = seconds_per_iteration(record)
        wall = record.summary.get("wall_s")
        facts = {
            "state": state.kind,
            "iterations": f"{state.done} of {state.total}" if state.total else str(state.done),
            "seed": record.summary.get("seed", record.setting("run.seed")),
            "seconds an iteration": None if seconds is None else number(seconds),
            "wall time": duration(wall) if isinstance(wall, int | float) else None,
            "commit": str(record.environment.get("commit") or "")[:12],
        }
        told = {name: "-" if value in (None, "") else str(value) for name, value in facts.items()}
        cells = "".join(_cell(name, escape(text)) for name, text in told.items())
        rows.append(f"<tr><td>{run.mark}</td>{cells}</tr>")
    head = "".join(f"<th>{name}</th>" for name in facts)
    return f"""<section id="runs"><h2>The runs</h2>
<div class="scroll"><table class="labelled"><thead><tr><th></th>{head}</tr></thead>
<tbody>{"".join(rows)}</tbody></table></div>{followed(records) if any(r.live for r in records) else ""}</section>"""


def _settings(runs: Sequence[ComparedRun]) -> str:
    flat = [flatten(run.record.config) for run in runs]
    keys = [key for key in differing_keys(*flat) if key not in _OWN]
    if not keys:
        text = "<p>All settings are the same but for the name and the folder.</p>"
    else:
        rows = "".join(
            f"<tr><td><code>{escape(key)}</code></td>"
            + "".join(_cell(run.label, _setting(values, key)) for run, values in zip(runs, flat, strict=True))
            + "</tr>"
            for key in keys
        )
        text = (
            f'<div class="scroll"><table class="labelled">{_head(run.mark for run in runs)}'
            f"<tbody>{rows}</tbody></table></div>"
        )
    return f'<section id="settings"><h2>What was set differently</h2>{text}{_on_the_way(runs)}</section>'


def _on_the_way(runs: Sequence[ComparedRun]) -> str:
    """What changed while runs were made, which their settings, those of their last iterations, do not show."""
    listed = "".join(f"<li>{run.mark} {escape(change)}</li>" for run in runs for change in told_changes(run.record))
    if not listed:
        return ""
    told = "These are the settings of the last iterations. They, or the data, changed on the way "
    return f'<p class="note">{told}(<code>--allow-config-change</code>):</p><ul>{listed}</ul>'


def _setting(values: Mapping[str, Any], key: str) -> str:
    return f"<code>{escape(json.dumps(values[key], default=str))}</code>" if key in values else "(absent)"


def _head(titles: Any) -> str:
    return f"<thead><tr><th></th>{''.join(f'<th>{title}</th>' for title in titles)}</tr></thead>"


def _cell(label: str, content: str, css: str = "") -> str:
    return f'<td data-label="{escape(label)}"{f" class={css}" if css else ""}>{content}</td>'


def _held_out(runs: Sequence[ComparedRun], unlike: Sequence[str]) -> str:
    kinds = [kind for kind in SETS if all(run.numbers(kind) for run in runs)]
    if not kinds:
        return (
            '<section id="held-out"><h2>Held-out numbers</h2><p>Not every run has held-out numbers: a run that is '
            "under way or was stopped has none, and real clips have no true retake.</p></section>"
        )
    main, *rest = reversed(kinds)
    folded = "".join(f"<h3>{SETS[kind]}</h3>{_numbers(runs, kind, unlike)}" for kind in reversed(rest))
    more = f"<details><summary>Each set of paths by itself</summary>{folded}</details>" if folded else ""
    how = _how_compared(runs, kinds, unlike)
    return f"""<section id="held-out"><h2>Held-out numbers after training</h2><p>{how}</p>
<h3>{SETS[main]}</h3>{_numbers(runs, main, unlike)}{more}</section>"""


def _how_compared(runs: Sequence[ComparedRun], kinds: Sequence[str], unlike: Sequence[str]) -> str:
    """What stands above the tables: how differences were taken, or why there are none or no colours."""
    if unlike:
        return _UNLIKE.format(", ".join(f"<code>{escape(key)}</code>" for key in unlike))
    pairs = ((run, kind, name) for run in runs[1:] for kind in kinds for name in run.numbers(kind))
    found = [part for run, kind, name in pairs if (part := difference(run, runs[0], kind, name))]
    if not found:
        return _UNPAIRED
    return _PAIRED if any(part.spread is not None for part in found) else _ONE_SEED


def _numbers(runs: Sequence[ComparedRun], kind: str, unlike: Sequence[str]) -> str:
    first, others = runs[0], () if unlike else runs[1:]
    names = [name for name in [*HELD_OUT, *first.numbers(kind)] if all(name in run.numbers(kind) for run in runs)]
    base = first.numbers(kind, "before") if _same_base(runs, kind) else {}
    titles = [*(["base"] if base else []), *(run.mark for run in runs)]
    titles += [f"{run.mark} &minus; {escape(first.label)}" for run in others]
    rows = []
    for name in dict.fromkeys(names):
        metric = _metric(name)
        unit = f" <small>{metric.unit}</small>" if metric.unit else ""
        cells = [_cell("base", value_text(base[name]))] if name in base else []
        cells += [_cell(run.label, value_text(run.numbers(kind)[name])) for run in runs]
        cells += [_difference_cell(run, first, kind, name) for run in others]
        rows.append(f"<tr><td>{escape(metric.title)}{unit}</td>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table class="labelled">{_head(titles)}<tbody>{"".join(rows)}</tbody></table></div>'


def _difference_cell(run: ComparedRun, first: ComparedRun, kind: str, name: str) -> str:
    found = difference(run, first, kind, name)
    sign = "" if found is None or found.mean == 0 else "+" if found.mean > 0 else "&minus;"
    text = "-" if found is None else sign + number(abs(found.mean))
    if found is not None and found.spread is not None:
        text += f" <small>&plusmn;&thinsp;{number(found.spread, 2)}</small>"
    return _cell(f"{run.label} \N{MINUS SIGN} {first.label}", text, _verdict(run, first, kind, name))


def _same_base(runs: Sequence[ComparedRun], kind: str) -> bool:
    values = [{name: value.mean for name, value in run.numbers(kind, "before").items()} for run in runs]
    return bool(values[0]) and all(part == values[0] for part in values)


def _films(runs: Sequence[ComparedRun], count: int) -> str:
    clips = [run.record.clips.get("after") for run in runs]
    have = [part for part in clips if part is not None]
    if len(have) < len(runs) or not count:
        return ""
    if not all(_same_films(part, have[0]) for part in have):
        return (
            '<section id="films"><h2>The same films</h2><p>The runs kept films of different held-out conditions, which '
            "cannot be laid over one another.</p></section>"
        )
    before = [part for run in runs if (part := run.record.clips.get("before"))]
    same = len(before) == len(runs) and all(np.array_equal(p.generated, before[0].generated) for p in before)
    base = before[0] if same else None
    errors = np.mean([part.translation_errors() for part in have], axis=0)
    labelled = [(run.css, run.label, part) for run, part in zip(runs, have, strict=True)]
    films = [compared_film(labelled, base, index, rank) for index, rank in choose_samples(errors, count)]
    look = how_to_look(have[0])
    shown = film_html(films[0]) + "".join(folded_film(film) for film in films[1:])
    return f"""<section id="films"><h2>The same films</h2>
<p>Held-out conditions that every run was measured on, ordered by the mean position error of the runs and taken at even
ranks.</p>{look}{shown}</section>"""


def _same_films(part: EvaluationClips, first: EvaluationClips) -> bool:
    return part.names == first.names and all(
        np.array_equal(a, b) for a, b in ((part.source, first.source), (part.target_c2w, first.target_c2w))
    )


def write_comparison(folders: Sequence[str | Path], output: Path | None = None, *, samples: int = 4) -> Path:
    """Write the comparison of several runs to ``output`` (default ``compare.html`` in the first folder).

    Raises:
        UsageError: fewer than two or more than :data:`MOST_RUNS` folders, one of them twice, or no run folder.
        DataError: a file of a run cannot be read, or the page cannot be written.
    """
    paths = [Path(folder).resolve() for folder in folders]
    if not 2 <= len(paths) <= MOST_RUNS:
        raise UsageError(f"{len(paths)} runs: 2 to {MOST_RUNS} can be set side by side")
    if len(set(paths)) < len(paths):
        raise UsageError("a run folder is given twice; give each run once")
    if samples < 0:
        raise UsageError(f"--samples {samples}: 0 or more held-out samples can be shown")
    path = output or Path(folders[0]) / "compare.html"
    records = [read_run(folder) for folder in folders]
    check_writable(path, (".html", ".htm"))
    atomic_write_text(path, compare_page(records, samples))
    return path

"""Compose the report of a run: one HTML file that needs no network, readable by someone new to the project."""

from __future__ import annotations

import math
import shlex
from html import escape
from pathlib import Path
from typing import Any

import yaml

from geoalign.errors import UsageError
from geoalign.files.atomic import atomic_write_text, check_writable
from geoalign.report.curves import curves_section, phases_section
from geoalign.report.document import document
from geoalign.report.figure import LOOP_FIGURE
from geoalign.report.held_out import Comparison, Value, comparisons
from geoalign.report.run_folder import RunRecord, read_run
from geoalign.report.samples import samples_section
from geoalign.report.svg import number
from geoalign.report.words import SETS
from geoalign.version import __version__

CARD_METRICS = ("translation_error_m", "rotation_error_deg", "translation_gain", "psnr_db")


def report_page(run: RunRecord, samples: int = 4) -> str:
    """Return the whole HTML document.

    Args:
        run: what :func:`geoalign.report.run_folder.read_run` found.
        samples: held-out samples to show with clips and paths.
    """
    body = [
        _header(run),
        "<main>",
        _what_this_is(),
        _results(run),
        samples_section(run, samples),
        curves_section(run),
        phases_section(run),
        _how(run),
        "</main>",
        f"<footer>Written by geoalign {__version__}. This file needs no network.</footer>",
    ]
    return document(f"{run.name} - geoalign report", "\n".join(part for part in body if part))


def _header(run: RunRecord) -> str:
    summary = run.summary
    facts = {
        "run": run.name,
        "iterations": len(run.metrics) or None,
        "seed": summary.get("seed"),
        "wall time": _duration(summary.get("wall_s")),
        "CPU time": _duration(summary.get("cpu_s")),
        "commit": str(summary.get("commit") or run.environment.get("commit") or "")[:12] or None,
    }
    chips = [
        f"<li>{label} <b>{escape(str(value))}</b></li>" for label, value in facts.items() if value not in (None, "")
    ]
    return f"""<header><div class="eyebrow">geoalign run report</div><h1>{_headline(run)}</h1>
<p class="lead">{_lead(run)}</p><ul class="chips">{"".join(chips)}</ul></header>"""


def _headline(run: RunRecord) -> str:
    found = {item.key: item for item in comparisons(run.summary, "mean")}
    main = found.get("translation_error_m")
    if main is None:
        return "This run has no held-out result yet"
    if main.before.spread is None or main.after.spread is None:
        before, after = number(main.before.mean), number(main.after.mean)
        return f"The camera strays {after} metres from its path, {before} before training"
    if main.verdict == "even":
        return "The camera is as far from its path as before"
    less = "less" if main.gain > 0 else "more"
    return f"The camera strays {abs(main.percent or 0):.0f}&thinsp;% {less} from the path it was asked to follow"


def _lead(run: RunRecord) -> str:
    found = {item.key: item for item in comparisons(run.summary, "mean")}
    main = found.get("translation_error_m")
    if main is None:
        return "It stopped before its final evaluation, or is still running. The curves below show how far it came."
    text = (
        f"On scenes and paths that training never saw, the mean distance between the camera and its target went from "
        f"{number(main.before.mean)} to {number(main.after.mean)} metres"
    )
    if ratio := found.get("translation_gain"):
        now, then = number(ratio.after.mean), number(ratio.before.mean)
        text += f"; for each metre asked for, the camera travels {now} metres instead of {then}"
    return text + "."


def _what_this_is() -> str:
    return f"""<section id="what"><h2>What this is</h2>
<p>A <em>retake model</em> films a scene again. It is given a source video and a camera path that someone would have
liked instead, and it generates the video which that camera would have seen. Such models tend to get the shape of the
movement right and its size wrong: asked for one metre, the camera travels one metre forty.</p>
<p>geoalign corrects this by <em>reinforcement learning</em>. The model makes several retakes of the same request. An
evaluator, which is never told what was asked for, reads from the pixels where the camera of each retake was, in metres
and degrees. Retakes closer to the request than their siblings are made more likely, the others less. No correct
video is ever shown in this stage: the measurement alone teaches.</p>{LOOP_FIGURE}</section>"""


def _results(run: RunRecord) -> str:
    kinds = [kind for kind in SETS if any(True for _ in comparisons(run.summary, kind))]
    if not kinds:
        return ""
    shown = [item for item in comparisons(run.summary, kinds[-1]) if item.key in CARD_METRICS]
    rows = []
    for kind in kinds:
        rows.append(f'<tr class="group"><td colspan="4">{SETS[kind]}</td></tr>')
        rows += [_row(item) for item in comparisons(run.summary, kind)]
    return f"""<section id="results"><h2>What changed</h2>
<p>Measured on fixed held-out scenes, paths and noise, before and after training, with the same settings.</p>
<div class="cards">{"".join(_card(item) for item in shown)}</div>
<div class="scroll"><table><thead><tr><th></th><th>before</th><th>after</th><th>change</th></tr></thead>
<tbody>{"".join(rows)}</tbody></table></div>
<p class="note">{_spread_note(run)}</p></section>"""


def _spread_note(run: RunRecord) -> str:
    found = [item for kind in SETS for item in comparisons(run.summary, kind)]
    if any(value.spread is None for item in found for value in (item.before, item.after)):
        return (
            "Some or all of it was measured with one evaluation noise seed, which gives no spread: those changes are "
            "not coloured, because chance alone may explain them. Name several in <code>eval.noise_seeds</code>."
        )
    return (
        "&plusmn; is the sample standard deviation over evaluation noise seeds. A change is coloured only where it "
        "exceeds that spread."
    )


def _card(item: Comparison) -> str:
    unit = f"&thinsp;{item.metric.unit}" if item.metric.unit else ""
    before, after = number(item.before.mean), number(item.after.mean)
    return f"""<div class="card"><h3>{item.metric.title}</h3><div class="change {item.verdict}">{_change(item)}</div>
<div class="fromto">{before} &rarr; <b>{after}</b>{unit}</div><p class="note">{item.metric.meaning}</p></div>"""


def _row(item: Comparison) -> str:
    unit = f" <small>{item.metric.unit}</small>" if item.metric.unit else ""
    return (
        f"<tr><td>{escape(item.metric.title)}{unit}</td><td>{_value(item.before)}</td><td>{_value(item.after)}</td>"
        f'<td class="{item.verdict}">{_change(item)}</td></tr>'
    )


def _value(value: Value) -> str:
    spread = f" <small>&plusmn;&thinsp;{number(value.spread, 2)}</small>" if value.spread is not None else ""
    return number(value.mean) + spread


def _change(item: Comparison) -> str:
    unit = "%" if item.percent is not None else "dB" if item.metric.unit == "dB" else ""
    return _signed(*item.change) + (f"&thinsp;{unit}" if unit else "")


def _signed(value: float, digits: int) -> str:
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return ("+" if value > 0 else "&minus;") + text


def _how(run: RunRecord) -> str:
    blocks = []
    if run.config:
        text = escape(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True, width=110))
        blocks.append(f"<details><summary>Configuration as resolved</summary><pre>{text}</pre></details>")
    facts = run.environment | {key: run.summary[key] for key in ("versions", "commit", "seed") if key in run.summary}
    if facts:
        text = escape(yaml.safe_dump(facts, sort_keys=True, allow_unicode=True, width=110))
        blocks.append(f"<details><summary>Machine and versions</summary><pre>{text}</pre></details>")
    if not blocks:
        return ""
    command = escape(_command(run))
    return f"""<section id="how"><h2>How to make it again</h2><p>Every random draw follows from the seed, so the same
configuration on the same kind of machine gives the same run.</p><pre>{command}</pre>{"".join(blocks)}</section>"""


def _command(run: RunRecord) -> str:
    """Train with the resolved configuration into another folder, also where ``run.dir`` does not hold the name."""
    words = ["geoalign", "train", "--config", str(run.folder / "config.yaml"), f"run.name={run.name}-again"]
    folder = str(run.config.get("run", {}).get("dir") or "{name}")
    if "{name}" not in folder:
        words.append(f"run.dir={folder.rstrip('/')}-again")
    return shlex.join(words)


def _duration(seconds: Any) -> str | None:
    if not isinstance(seconds, int | float) or not math.isfinite(seconds):
        return None
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def write_report(folder: str | Path, output: Path | None = None, *, samples: int = 4) -> Path:
    """Write the report of ``folder`` to ``output`` (default ``folder/report.html``) and return its path.

    Raises:
        UsageError: ``folder`` is not a run folder, or fewer than 0 samples are asked for.
        DataError: a file of the run cannot be read, or the report cannot be written.
    """
    if samples < 0:
        raise UsageError(f"--samples {samples}: 0 or more held-out samples can be shown")
    path, found = output or Path(folder) / "report.html", read_run(folder)
    check_writable(path, (".html", ".htm"))
    atomic_write_text(path, report_page(found, samples))
    return path

"""The held-out result of a run in words, cards and tables; no word says more than the numbers."""

from __future__ import annotations

from html import escape

from geoalign.report.held_out import Comparison, Value, comparisons
from geoalign.report.run_folder import RunRecord
from geoalign.report.svg import number, smooth
from geoalign.report.words import HELD_OUT, SETS

CARD_METRICS = ("translation_error_m", "last_translation_error_m", "rotation_error_deg", "psnr_db")
_WAYS = {"gain_sideways": "to the sides", "gain_forward": "forward", "gain_vertical": "up and down"}


def headline(run: RunRecord) -> str:
    """The result in one line, as markup."""
    found = {item.key: item for item in comparisons(run.summary, "mean")}
    main = found.get("translation_error_m")
    if main is None:
        return "This run has no held-out result" + (" yet" if run.held_out and not run.summary else "")
    if main.before.spread is None or main.after.spread is None:
        before, after = number(main.before.mean), number(main.after.mean)
        return f"The camera strays {after} metres from its path, {before} before training"
    if main.verdict == "even":
        return "No gain: the camera is as far from its path as before"
    less = "less" if main.gain > 0 else "more"
    return f"The camera strays {abs(main.percent or 0):.0f}&thinsp;% {less} from the path it was asked to follow"


def lead(run: RunRecord) -> str:
    """What stands behind the headline, as markup."""
    found = {item.key: item for item in comparisons(run.summary, "mean")}
    main = found.get("translation_error_m")
    if main is None:
        return _lead_of_samples(run)
    text = (
        f"On scenes and paths that training never saw, the mean distance between the camera and its target went from "
        f"{number(main.before.mean)} to {number(main.after.mean)} metres"
    )
    return text + _travelled(found) + "." + _verdicts(list(found.values()))


def _travelled(found: dict[str, Comparison]) -> str:
    """How far the camera goes for what was asked, along each axis where that is known; one number hides their mix."""
    if _WAYS.keys() <= found.keys():
        ways = [
            f"{number(found[key].after.mean)} metres {way} ({number(found[key].before.mean)} before)"
            for key, way in _WAYS.items()
        ]
        return f"; for each metre asked for, the camera travels {', '.join(ways[:-1])} and {ways[-1]}"
    if ratio := found.get("translation_gain"):
        now, then = number(ratio.after.mean), number(ratio.before.mean)
        return f"; for each metre asked for, the camera travels {now} metres instead of {then}"
    return ""


def _verdicts(items: list[Comparison]) -> str:
    """Which of the main numbers got better, worse or stayed, where the spread lets one say so."""
    if any(value.spread is None for item in items for value in (item.before, item.after)):
        return ""
    groups = {"good": "better", "bad": "worse", "even": "within the spread of the noise"}
    shown = [item for item in items if item.key in CARD_METRICS]
    parts = [
        f"{words}: {', '.join(item.metric.title.lower() for item in shown if item.verdict == verdict)}"
        for verdict, words in groups.items()
        if any(item.verdict == verdict for item in shown)
    ]
    return f" In short, {'; '.join(parts)}." if parts else ""


def _lead_of_samples(run: RunRecord) -> str:
    """Of a run without a held-out result: its own samples, which are biased and said to be."""
    parts = []
    for key, unit in (("reward/trans_m", "metres"), ("reward/rot_deg", "degrees")):
        values = smooth(run.series(key)[1])
        if len(values) > 1:
            parts.append(f"from {number(values[0])} to {number(values[-1])} {unit}")
    if not parts:
        return "No iteration has written a camera error."
    return (
        f"The errors of its own training samples went {' and '.join(parts)} in {len(run.metrics)} iterations (moving "
        "average). Those are the samples that it learns from; only held-out conditions tell a gain."
    )


def worse_numbers(run: RunRecord) -> list[str]:
    """Held-out numbers that got worse beyond their spread, as sentences in plain text."""
    return [
        f"{item.metric.title} got worse: {number(item.before.mean)} to {number(item.after.mean)}"
        + (f" {item.metric.unit}" if item.metric.unit else "")
        for item in comparisons(run.summary, "mean")
        if item.verdict == "bad"
    ]


def results_section(run: RunRecord) -> str:
    """Cards of the main numbers, the table of their means, and the sets by themselves behind a fold."""
    kinds = [kind for kind in SETS if any(True for _ in comparisons(run.summary, kind))]
    if not kinds:
        return ""
    shown = [item for item in comparisons(run.summary, kinds[-1]) if item.key in CARD_METRICS]
    single = "".join(f"<h3>{SETS[kind]}</h3>{_table(run, kind)}" for kind in kinds[:-1])
    folded = f"<details><summary>Each set of paths by itself</summary>{single}</details>" if single else ""
    return f"""<section id="results"><h2>What changed</h2>
<p>Measured on fixed held-out scenes, paths and noise, before and after training, with the same settings.</p>
<div class="cards">{"".join(_card(item) for item in shown)}</div>
<h3>{SETS[kinds[-1]]}</h3>{_table(run, kinds[-1])}{folded}<p class="note">{_spread_note(run)}</p></section>"""


def _table(run: RunRecord, kind: str) -> str:
    rows = "".join(_row(item) for item in comparisons(run.summary, kind))
    return (
        '<table class="stacked" style="--columns:3"><thead><tr><th></th><th>before</th><th>after</th>'
        f"<th>change</th></tr></thead><tbody>{rows}</tbody></table>"
    )


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
    return f"""<div class="card"><h3>{item.metric.title}</h3><div class="change {item.verdict}">{change(item)}</div>
<div class="fromto">{before} &rarr; <b>{after}</b>{unit}</div><p class="note">{item.metric.meaning}</p></div>"""


def _row(item: Comparison) -> str:
    unit = f" <small>{item.metric.unit}</small>" if item.metric.unit else ""
    meaning = f' title="{escape(HELD_OUT[item.key].meaning)}"' if item.key in HELD_OUT else ""
    return (
        f"<tr><td{meaning}>{escape(item.metric.title)}{unit}</td><td>{value_text(item.before)}</td>"
        f'<td>{value_text(item.after)}</td><td class="{item.verdict}">{change(item)}</td></tr>'
    )


def value_text(value: Value) -> str:
    """A mean with its spread, as markup."""
    spread = f" <small>&plusmn;&thinsp;{number(value.spread, 2)}</small>" if value.spread is not None else ""
    return number(value.mean) + spread


def change(item: Comparison) -> str:
    """The signed change with its unit, as markup."""
    unit = "%" if item.percent is not None else "dB" if item.metric.unit == "dB" else ""
    return signed(*item.change) + (f"&thinsp;{unit}" if unit else "")


def signed(value: float, digits: int) -> str:
    """A number with its sign, except where it is zero in print."""
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return ("+" if value > 0 else "&minus;") + text

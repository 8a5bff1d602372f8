"""What a run set out to do, in sentences made of its own settings and numbers, and the loop in a drawing."""

from __future__ import annotations

from html import escape

from geoalign.report.held_out import comparisons
from geoalign.report.run_folder import RunRecord
from geoalign.report.svg import number

_STEPS = (
    ("Request", "source video + camera path"),
    ("Model", "makes several retakes"),
    ("Evaluator", "reads cameras from pixels"),
    ("Compare", "metres and degrees off"),
)


def what_section(run: RunRecord) -> str:
    """What a retake model is, what this run gave it, and how the loop goes."""
    return f"""<section id="what"><h2>What this run is</h2>
<p>A <em>retake model</em> films a scene again: it is given a source video and a camera path, and generates the video
which that camera would have seen. geoalign trains one by <em>reinforcement learning</em>: of several retakes of one
request, those whose camera was closer to the request are made more likely. The cameras are read from the pixels by an
evaluator that is never told what was asked for; no correct video is shown.</p>
<p>{" ".join(_sentences(run))}</p>{_loop()}</section>"""


def _sentences(run: RunRecord) -> list[str]:
    """Each from settings or results that the run has; a run that says nothing gets none."""
    told = [_training(run), _frames(run), _rewards(run), _base(run)]
    return [sentence for sentence in told if sentence]


def _training(run: RunRecord) -> str:
    conditions, size, total = (_whole(run, key) for key in ("groups.conditions", "groups.size", "train.iterations"))
    base = run.setting("train.base")
    start = f"This run starts from <code>{escape(str(base))}</code>." if base else ""
    if not (conditions and size and total):
        return start
    return (
        f"{start} In each of {total} iterations it makes {size} retakes of each of {_counted(conditions, 'request')}."
    )


def _frames(run: RunRecord) -> str:
    frames, height, width = (_whole(run, f"data.{name}") for name in ("num_frames", "height", "width"))
    steps, window = _whole(run, "flow.steps"), _whole(run, "window.size")
    if not (frames and height and width and steps):
        return ""
    learnt = (
        f", of which {window} at a time {'is' if window == 1 else 'are'} stochastic and learnt from" if window else ""
    )
    return (
        f"A retake has {_counted(frames, 'frame')} of {width} \N{MULTIPLICATION SIGN} {height} pixels and takes "
        f"{_counted(steps, 'denoising step')}{learnt}."
    )


def _rewards(run: RunRecord) -> str:
    weights = run.setting("advantage.weights")
    known = [item for item in weights.items() if isinstance(item[1], int | float)] if isinstance(weights, dict) else []
    if not known:
        return ""
    parts = [f"{escape(str(name).replace('_', ' '))} {number(float(weight), 2)}" for name, weight in known]
    return f"What counts, with its weight: {', '.join(parts)}."


def _base(run: RunRecord) -> str:
    """What the base did wrong in scale, measured, where it was measured."""
    gain = next((item for item in comparisons(run.summary, "mean") if item.key == "translation_gain"), None)
    if gain is None:
        return ""
    value, spread = gain.before.mean, gain.before.spread
    if spread is not None and abs(value - 1) <= spread:
        return "Before training its camera travelled as far as it was asked to, within the spread of the noise."
    return f"Before training, its camera travelled {number(value)} metres for each metre asked for."


def _whole(run: RunRecord, key: str) -> int | None:
    """A setting that is a whole number; None of one that somebody made something else."""
    value = run.setting(key)
    return value if isinstance(value, int) else None


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _loop() -> str:
    boxes = "".join(f"<li><b>{title}</b><span>{subtitle}</span></li>" for title, subtitle in _STEPS)
    return (
        f'<ol class="loop">{boxes}</ol><p class="loop-back note">and again: retakes closer than their siblings become '
        "more likely</p>"
    )

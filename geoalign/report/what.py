"""What a run set out to do, in sentences made of its own settings and numbers, and the loop in a drawing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from geoalign.config.load import validate
from geoalign.config.schema import Config
from geoalign.config.source import RawConfig
from geoalign.errors import ConfigError
from geoalign.report.held_out import comparisons
from geoalign.report.run_folder import RunRecord
from geoalign.report.svg import number
from geoalign.report.troubles import fallback

_CAMERA = {"trans": "metres", "rot": "degrees"}
"""Reward keys that say how far the camera is from the request, and their units."""
_KEY = re.compile(r"advantage/([^/]+)/mean")


def what_section(run: RunRecord) -> str:
    """What a retake model is, what this run gave it, and how the loop goes."""
    taught = _Taught.of(run)
    return f"""<section id="what"><h2>What this run is</h2>
<p>A <em>retake model</em> films a scene again: it is given a source video and a camera path, and generates the video
which that camera would have seen. geoalign trains one by <em>reinforcement learning</em>: of several retakes of one
request, {taught.favoured}. No correct video is shown.</p>
<p>{" ".join(_sentences(run, taught))}</p>{taught.loop}</section>"""


@dataclass(frozen=True, slots=True)
class _Taught:
    """What a run makes more likely.

    Attributes:
        weights: of each reward that it measured, 1 where its settings name none; None where that is not known.
        shuffled: whether the scores decide nothing, as a control.
    """

    weights: dict[str, float] | None
    shuffled: bool

    @classmethod
    def of(cls, run: RunRecord) -> _Taught:
        """From the settings, and from the keys of the metrics: settings may leave rewards unnamed."""
        named = run.setting("advantage.weights")
        keys = [match[1] for key in run.metric_keys("advantage/") if (match := _KEY.fullmatch(key))]
        weights = None
        if isinstance(named, dict) and keys:
            found = {key: named.get(key, 1.0) for key in keys}
            weights = {key: float(value) for key, value in found.items() if isinstance(value, int | float)}
        return cls(weights, run.setting("train.shuffle_advantages") is True)

    @property
    def nothing(self) -> bool:
        """Whether every weight is 0."""
        return self.weights is not None and not any(self.weights.values())

    @property
    def units(self) -> list[str]:
        """The units in which a camera that is closer to the request is rewarded."""
        return [unit for key, unit in _CAMERA.items() if (self.weights or {}).get(key, 0.0) > 0]

    @property
    def other(self) -> dict[str, float]:
        """What else counts, with its weight."""
        weights = (self.weights or {}).items()
        return {key: value for key, value in weights if value and not (key in _CAMERA and value > 0)}

    @property
    def favoured(self) -> str:
        """Which of several retakes become more likely, as markup."""
        if self.nothing:
            return "none is made more likely in this run, for no reward counts: every weight is 0"
        if self.shuffled:
            return (
                "those drawn by lot are made more likely in this run. It is a control "
                "(<code>train.shuffle_advantages</code>): its scores are measured and decide nothing"
            )
        parts = ["whose camera was closer to the request"] * bool(self.units)
        for way, sign in (("higher", 1), ("lower", -1)):
            names = [_told(key) for key, value in self.other.items() if sign * value > 0]
            parts += [f"that score {way} in {_listed(names)}"] * bool(names)
        read = ". The cameras are read from the pixels by an evaluator that is never told what was asked for"
        told = _listed(parts) or "that its rewards score higher"
        return f"those {told} are made more likely{read * bool(self.units)}"

    @property
    def counted(self) -> str:
        """What is rewarded with which weight, and what is measured only; markup."""
        weights = self.weights or {}
        counted = ", ".join(f"{_told(key)} {number(value, 2)}" for key, value in weights.items() if value)
        silent = _listed([_told(key) for key, value in weights.items() if not value])
        told = [f"What counts, with its weight: {counted}."] * bool(counted)
        return " ".join([*told, *[f"Measured without counting: {silent}."] * bool(silent)])

    @property
    def loop(self) -> str:
        """The loop in a drawing; markup."""
        steps = [("Request", "source video + camera path"), ("Model", "makes several retakes")]
        closer = "score higher"
        if self.units:
            off = f"{' and '.join(self.units)} off" + ", and other scores" * bool(self.other)
            steps += [("Evaluator", "reads cameras from pixels"), ("Compare", off)]
            closer = "are closer" if not self.other else "do better"
        else:
            steps += [("Rewards", "score every retake"), ("Compare", "with its siblings' scores")]
        boxes = "".join(f"<li><b>{title}</b><span>{subtitle}</span></li>" for title, subtitle in steps)
        again = f"retakes that {closer} than their siblings become more likely"
        if self.nothing or self.shuffled:
            again = "no retake becomes more likely" if self.nothing else "retakes drawn by lot become more likely"
        return f'<ol class="loop">{boxes}</ol><p class="loop-back note">and again: {again}</p>'


def _told(key: str) -> str:
    return escape(key.replace("_", " "))


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:])))


def _sentences(run: RunRecord, taught: _Taught) -> list[str]:
    """Each from settings or results that the run has; a run that says nothing gets none."""
    changing = _changing(run)
    told = [_training(run), _frames(run, changing), _changed(run, changing), taught.counted, _base(run)]
    return [sentence for sentence in told if sentence]


def told_changes(run: RunRecord) -> list[str]:
    """What the run went on with otherwise, one line for each time."""
    return [f"after {_counted(change.iterations, 'iteration')}: {change.what}" for change in run.changes]


def _training(run: RunRecord) -> str:
    conditions, size, total = (_whole(run, key) for key in ("groups.conditions", "groups.size", "train.iterations"))
    base = run.setting("train.base")
    start = f"This run starts from <code>{escape(str(base))}</code>." if base else ""
    if not (conditions and size and total):
        return start
    chosen = _whole(run, "learn.members")
    learnt = f" and learns from the {chosen} of them whose advantages are largest" if chosen else ""
    asked = _counted(conditions, "request")
    return f"{start} In each of {total} iterations it makes {size} retakes of each of {asked}{learnt}."


def _changing(run: RunRecord) -> dict[str, Any] | None:
    """The settings that CHANGE the run; None where they are of another version and cannot be told."""
    try:
        return validate(Config, RawConfig(run.config)).changes()
    except ConfigError:
        return None


def _frames(run: RunRecord, changing: dict[str, Any] | None) -> str:
    frames, height, width = (_whole(run, f"data.{name}") for name in ("num_frames", "height", "width"))
    steps, window = _whole(run, "flow.steps"), _whole(run, "window.size")
    if not (frames and height and width and steps):
        return ""
    learnt, drawn = "", _whole(run, "learn.window_steps")
    if window:
        learnt = f", of which {window} at a time {'is' if window == 1 else 'are'} stochastic"
        learnt += f", and {drawn} of these, drawn by lot, learnt from" if drawn else " and learnt from"
    fewer, until = _whole(run, "learn.short_frames"), _whole(run, "learn.short_iterations")
    length = _counted(frames, "frame")
    if fewer and until:
        length = f"{fewer} frames in the first {_counted(until, 'iteration')} and {frames} in the others,"
    # Where steps after the window are left out or reused, the grid is longer than what a retake takes.
    whole = changing is not None and not any(name.startswith(("flow.", "ode.reuse")) for name in changing)
    takes = "takes" if whole else "is sampled on a grid of"
    size = f"{width} \N{MULTIPLICATION SIGN} {height} pixels"
    return f"A retake has {length} of {size} and {takes} {_counted(steps, 'denoising step')}{learnt}."


def _changed(run: RunRecord, changing: dict[str, Any] | None) -> str:
    """What the run does otherwise than an exact one, and what it did otherwise than at its end."""
    told = ""
    if changing:
        listed = ", ".join(f"<code>{escape(f'{name}={value}')}</code>" for name, value in changing.items())
        told = f"To be cheaper it CHANGES what an exact run does: {listed}.{fallback(run)}"
    if run.changes:
        times = _counted(len(run.changes), "time")
        told += f" All this is of its last iterations: settings or data changed {times} on the way "
        told += '(<a href="#how">what and when</a>).'
    return told.strip()


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

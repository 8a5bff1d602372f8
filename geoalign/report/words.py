"""What the numbers mean in plain words; the report shows these texts next to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Better = Literal["lower", "higher", "one", "unknown"]


@dataclass(frozen=True, slots=True)
class Metric:
    """A held-out quantity: title, unit, which direction is better, one explaining sentence."""

    title: str
    unit: str
    better: Better
    meaning: str


def _gain(direction: str) -> Metric:
    return Metric(
        f"Travelled over asked, {direction}",
        "\N{MULTIPLICATION SIGN}",
        "one",
        "The factor that fits the motion asked for best to the one travelled, over all clips.",
    )


HELD_OUT = {
    "translation_error_m": Metric(
        "Position error", "m", "lower", "How far the camera of the generated clip is from where it was asked to be."
    ),
    "rotation_error_deg": Metric(
        "Rotation error",
        "\N{DEGREE SIGN}",
        "lower",
        "The angle between the view asked for and the view shown.",
    ),
    "scale_ratio": Metric(
        "Scale ratio",
        "\N{MULTIPLICATION SIGN}",
        "one",
        "Length of the path travelled over that of the path asked for; a trembling camera travels further.",
    ),
    "translation_gain": Metric(
        "Translation gain",
        "\N{MULTIPLICATION SIGN}",
        "one",
        "The factor that fits the path asked for best to the path travelled; blind to trembling.",
    ),
    "rot_err_deg": Metric(
        "RotErr",
        "\N{DEGREE SIGN}",
        "lower",
        "As published for ReDirector: the mean angle over all pairs of frames.",
    ),
    "trans_err": Metric(
        "TransErr", "", "lower", "As published for ReDirector: after a fit of scale, so blind to a wrong scale."
    ),
    "gain_sideways": _gain("to the sides"),
    "gain_forward": _gain("forward and backward over the ground"),
    "gain_vertical": _gain("up and down"),
    "gain_yaw": _gain("while turning"),
    "last_translation_error_m": Metric(
        "Position error at the last frame", "m", "lower", "As the position error, at the end of the clip."
    ),
    "last_rotation_error_deg": Metric(
        "Rotation error at the last frame", "\N{DEGREE SIGN}", "lower", "As the rotation error, at the end of the clip."
    ),
    "psnr_db": Metric(
        "Likeness to the truth", "dB", "higher", "PSNR against the true render; it is never part of a reward."
    ),
    "own_camera_psnr_db": Metric(
        "Likeness along its own camera",
        "dB",
        "higher",
        "PSNR against the true render along the camera that was read from the clip: the picture without the camera.",
    ),
    "explained_share": Metric(
        "Explained share", "", "higher", "The share of the picture that the source, moved by the camera, explains."
    ),
    "gradient_energy": Metric(
        "Gradient energy", "\N{MULTIPLICATION SIGN}", "one", "Sharpness over that of the truth; noise raises it too."
    ),
    "second_translation_error_m": Metric(
        "Position error, second evaluator", "m", "lower", "Read by another estimator that no reward uses."
    ),
    "second_rotation_error_deg": Metric(
        "Rotation error, second evaluator",
        "\N{DEGREE SIGN}",
        "lower",
        "Read by another estimator that no reward uses.",
    ),
    "second_scale_ratio": Metric(
        "Scale ratio, second evaluator", "\N{MULTIPLICATION SIGN}", "one", "As above, by the second evaluator."
    ),
    "second_translation_gain": Metric(
        "Translation gain, second evaluator", "\N{MULTIPLICATION SIGN}", "one", "As above, by the second evaluator."
    ),
}

SETS = {
    "presets": "Named movements (sweep, fly, slide, climb, arc, ...)",
    "random": "Unseen random curves",
    "mean": "Mean of named movements and random curves",
}

STAGES = {"source": "Source", "before": "Before", "after": "After", "truth": "Truth"}
"""Takes of a held-out film, as a viewer reads them; the truth is a render along the path asked for."""

PATHS = {
    "target": "path asked for",
    "source": "camera of the source",
    "before": "camera read before",
    "after": "camera read after",
}


@dataclass(frozen=True, slots=True)
class CurveGroup:
    """Curves under one heading: the keys that start with ``prefix`` and end with one of ``suffixes`` (if any).

    ``fixed``: every value is of the same scenes, paths and noise, so it is shown itself and not a moving average.
    """

    title: str
    meaning: str
    prefix: str
    suffixes: tuple[str, ...] = ()
    with_zero: bool = False
    hide_zeros: bool = False
    folded: bool = False
    fixed: bool = False

    def takes(self, key: str) -> bool:
        """Say whether a metric key belongs here."""
        return key.startswith(self.prefix) and (not self.suffixes or key.endswith(self.suffixes))


CURVE_NAMES = {
    "trans_m": "Position error (m)",
    "rot_deg": "Rotation error (\N{DEGREE SIGN})",
    "scale_ratio": "Scale ratio",
    "lost_fraction": "Lost cameras (share)",
    "saturated_fraction": "Saturated frames (share)",
    "invalid_fraction": "Masked samples (share)",
}
"""Curves that a reader should not have to decode, by what follows the prefix of their group."""

# A key goes to the first group that takes it.
CURVES = (
    CurveGroup(
        "Camera errors of the sampled clips",
        "In plain units, lower is better. Samples explore on purpose, so they are further off than the held-out clips.",
        "reward/",
        suffixes=("_m", "_deg"),
        with_zero=True,
    ),
    CurveGroup(
        "What is not trained on",
        "What the evaluators report beside the scores. The scale ratio is path length over path length, tracked is "
        "the share of the picture that an estimate explains, saturated the share of frames whose position error "
        "reaches the reward's bound, and lost the share of clips in which no camera could be read.",
        "reward/",
        suffixes=("_ratio", "residual", "/tracked", "_fraction"),
        folded=True,
    ),
    CurveGroup(
        "Rewards",
        "Scores of the model's own samples, which it is trained to raise. Camera rewards are negative errors.",
        "reward/",
    ),
    CurveGroup(
        "Held-out checks on the way", "As in the table above: fixed scenes, paths and noise.", "eval/", fixed=True
    ),
    CurveGroup(
        "Audit of the approximate steps",
        "Now and then one group is also finished exactly. The rank correlation says whether the approximation keeps "
        "the order of its samples, which the ratio cannot see; biases are in deviations of the group, PSNR and margin "
        "in dB. Exact tails are 1 in iterations that ran without the approximation, because an audit was bad.",
        "fidelity/",
    ),
    CurveGroup(
        "Numerical parity",
        "Before the first update, sampled steps that the learner computes again are compared with the rollout: all, or "
        "with levers.streaming the first or none. A difference of exactly 0 means that sampling and learning agree bit "
        "by bit, so that every later change of the ratio comes from learning.",
        "parity/",
        with_zero=True,
        folded=True,
    ),
    CurveGroup(
        "Policy update",
        "How far one update moves the policy. The ratio is new over old probability of the same samples and should "
        "stay near 1; the clipped share says how often the safety limit acted.",
        "policy/",
        folded=True,
    ),
    CurveGroup(
        "Advantages",
        "How the samples of a group compare with each other; without spread nothing is learnt.",
        "advantage/",
        folded=True,
    ),
    CurveGroup(
        "Samples left out",
        "Failures by cause; they are masked, never scored 0.",
        "failures/",
        hide_zeros=True,
        folded=True,
    ),
)

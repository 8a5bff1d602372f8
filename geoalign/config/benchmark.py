"""Settings of ``geoalign benchmark``: clips, camera paths, speeds, how retakes are made, and what measures them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from geoalign.config.base import Section
from geoalign.config.data import DEFAULT_NEGATIVE_PROMPT
from geoalign.config.training import Seed

PRESET_PATHS = (
    "pan_right", "pan_left", "tilt_up", "tilt_down", "zoom_in", "zoom_out", "translate_up", "translate_down",
    "arc_left", "arc_right",
)  # fmt: skip
Speed = Annotated[float, Field(gt=0)]
PlainName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.+-]*(_[A-Za-z0-9.+-]+)*$")]
"""A name that may stand in a file name, and in which ``__`` can separate parts."""


class EstimatorConfig(Section):
    """One pose estimator that reads the camera of every retake."""

    kind: str
    """Registered estimator: ``planar``, ``flow_pnp``, ``mapanything``, ``depth_anything_3``, ``package.module:Class`` or
    the name of an entry point in ``geoalign.evaluators``."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the estimator; an unknown one is an error that lists the known ones."""
    is_the_reward: bool = False
    """Whether the trained model was rewarded by this estimator: its columns are marked, because a model can learn its
    faults."""


class BenchmarkConfig(Section):
    """What ``geoalign benchmark run`` makes and measures."""

    clips: Path | None = None
    """Source clips: a data set in the layout of DAVIS (``JPEGImages/480p/NAME``), or a folder of videos or of folders
    of frames; unset: held-out scenes of the embedded world, whose true retake is known."""
    clip_list: Path | None = None
    """A text file with the names of the clips to take, one a line (DAVIS: ``ImageSets/2017/val.txt``); unset: all."""
    max_clips: int | None = Field(None, ge=1)
    """Take the first clips only, in the order of the list, else of their names; unset: all."""
    paths: tuple[str, ...] = Field(PRESET_PATHS, min_length=1)
    """Camera paths: presets or camera files."""
    speeds: tuple[Speed, ...] = Field((1.0,), min_length=1)
    """Factors of the motion per frame; every path is asked for at each."""
    size: tuple[int, int] = (480, 832)
    """Height and width of the retakes: clips are scaled to cover and cut at the centre."""
    max_frames: int | None = Field(None, ge=2)
    """Longest retake; unset: the native length, of which the codec's lengths (Wan: 4k + 1) keep the most."""
    caps: dict[str, int] = Field(default_factory=dict)
    """Longest retake by method, for methods with a length of their own (TrajectoryCrafter, CogNVS: 49)."""
    settings: Literal["default", "published"] = "published"
    """How retakes are sampled: by ``flow`` and the seed below, or as ReDirector publishes it (docs/benchmark.md lists
    every difference)."""
    seed: Seed = 0
    """Seed of the initial noise, which is a function of it and of the clip, path and speed: equal for all methods."""
    prompts: Path | None = None
    """JSON file with a prompt by clip name; unset: ``data.clips.caption_text`` for all."""
    negative_prompt: str = DEFAULT_NEGATIVE_PROMPT
    """Text of the second guidance pass, or ``@FILE``."""
    source_estimator: str | None = None
    """Estimator, by its name under ``estimators``, or tool that reads the camera of every source; unset: the camera file
    beside the clip, and without one a camera that does not move."""
    estimators: dict[str, EstimatorConfig] = Field(default_factory=dict)
    """Pose estimators by the name that tables print."""
    tools: tuple[str, ...] = ()
    """Foreign programs that measure the videos: ``vipe``, ``met3r``, ``dyn_met3r``, ``vbench``, or YAML files of your
    own."""
    table2_reader: str | None = None
    """Table 2 is over the clips whose base retakes this estimator or tool could all read; unset: over all clips."""
    resamples: int = Field(10_000, ge=100)
    """Bootstrap resamples behind every interval."""

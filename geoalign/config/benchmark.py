"""Settings of ``geoalign benchmark``: clips, camera paths, speeds, how retakes are made, and what measures them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from geoalign.config.base import Section
from geoalign.config.training import Seed

Factor = Annotated[float, Field(gt=0)]


class EstimatorConfig(Section):
    """One pose estimator that reads the camera of every retake."""

    kind: str
    """Registered estimator: ``planar``, ``flow_pnp``, ``mapanything``, ``depth_anything_3``, the name of an entry point
    in ``geoalign.evaluators``, or ``package.module:Class``: your own code, which is run."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the estimator; an unknown one is an error that lists the known ones."""
    is_the_reward: bool = False
    """Whether the trained model was rewarded by it: its columns are marked, because a model can learn its faults."""


class BenchmarkConfig(Section):
    """What ``geoalign benchmark run`` makes and measures."""

    clips: Path | None = None
    """Source clips: a data set in the layout of DAVIS (``JPEGImages/480p/NAME``), or a folder of videos or of folders
    of frames; unset: held-out scenes of the embedded world, whose true retake is known."""
    clip_list: Path | None = None
    """Text file with the names of the clips to take, one a line (DAVIS: ``ImageSets/2017/val.txt``); unset: all."""
    max_clips: int | None = Field(None, ge=1)
    """Take the first clips only, in the order of the list, else of their names; unset: all (embedded world: 10)."""
    paths: tuple[str, ...] | None = Field(None, min_length=1)
    """Camera paths: presets, camera files, or patterns of camera files with ``{clip}`` for the name of a clip, where
    every clip has paths of its own; unset: all ten presets."""
    speeds: tuple[Factor, ...] = Field((1.0,), min_length=1)
    """Factors of the motion per frame; every path is asked for at each."""
    size: tuple[int, int] | None = (480, 832)
    """Height and width of the retakes: clips are scaled to cover and cut at the centre; unset: the clip's own."""
    max_frames: int | None = Field(None, ge=2)
    """Longest retake of any method; unset: the native length. Models of ours cut it to a length that their codec takes
    (Wan: 4k + 1)."""
    caps: dict[str, Annotated[int, Field(ge=2)]] = Field(default_factory=dict)
    """Longest retake by method, for methods that have a limit of their own (TrajectoryCrafter and CogNVS: 49)."""
    settings: Literal["default", "published"] = "default"
    """How retakes are sampled: by ``flow`` and ``seed``, or as ReDirector publishes it (docs/benchmark.md lists every
    difference)."""
    seed: Seed = 0
    """Seed of the initial noise, which is a function of it and of clip, path and speed: equal for all methods."""
    condition_scales: dict[str, Factor] = Field(default_factory=dict)
    """Oracles by method: the translation that the model is asked for, as a multiple of the path's. Errors are always
    against the path itself."""
    prompts: Path | None = None
    """JSON file with a prompt by clip name; for other clips ``captioner``, else the clip list's caption, else
    ``data.clips.caption_text``."""
    captioner: Path | None = None
    """BLIP-2 folder that says what a clip shows, from its middle frame, for models that read text."""
    negative_prompt: str | None = None
    """Text of the second guidance pass, or ``@FILE``; unset: our own, and under ``settings: published`` the published
    one (``geoalign doctor --fetch-rewards``)."""
    source_reader: str | None = None
    """Estimator or tool that reads the camera of every source; unset: the camera file beside the clip, and without one
    a camera that does not move."""
    estimators: dict[str, EstimatorConfig] = Field(default_factory=dict)
    """Pose estimators by the name that tables print."""
    tools: tuple[str, ...] = ()
    """Foreign programs that measure the videos: ``vipe``, ``met3r``, ``dyn_met3r``, ``vbench``, or YAML files of your
    own."""
    base: str = "base"
    """Method that the others are compared with."""
    ablation: tuple[str, str] = ("aesthetic", "full")
    """Methods of table 3: trained with the aesthetic reward only, and with the full reward."""
    table_reader: str | None = None
    """Estimator or tool whose RotErr and TransErr tables 1 to 3 print; unset: ``vipe`` if it is among the tools, else
    the first estimator that is not the reward."""
    table2_reads_base: bool = True
    """Table 2 is over the clips of which ``table_reader`` could read every retake of ``base``."""
    resamples: int = Field(10_000, ge=100)
    """Bootstrap resamples behind every interval."""

    def longest(self, method: str) -> int | None:
        """Most frames of a retake of ``method``: ``max_frames`` or its own cap, whichever is less; None: its length."""
        return min((n for n in (self.max_frames, self.caps.get(method)) if n is not None), default=None)

    @model_validator(mode="after")
    def _readers_are_told_apart(self) -> Self:
        if both := sorted({*self.estimators} & {*self.tools}):
            raise ValueError(f"benchmark.estimators and benchmark.tools both name {both[0]!r}; rename the estimator")
        return self

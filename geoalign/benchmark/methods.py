"""What answers the conditions: a model of ours that retakes, or a folder of videos that another method made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch

from geoalign.benchmark.cases import Condition, check_method, find_videos, plain, video_of
from geoalign.benchmark.clips import Clips, Source
from geoalign.config.benchmark import BenchmarkConfig
from geoalign.config.data import DEFAULT_NEGATIVE_PROMPT
from geoalign.config.schema import Config
from geoalign.data.captions import remove_camera_motion
from geoalign.data.readers import AnyReader
from geoalign.data.video import PyAVReader, probe_clip, write_video
from geoalign.errors import DataError, UsageError
from geoalign.files.digest import content_hash, text_hash
from geoalign.files.parsing import read_json_object
from geoalign.files.shards import weight_files
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.jobs.encode import GUIDANCE, Encoders, read_text, reads_text_of
from geoalign.jobs.evaluate import held_out_retake
from geoalign.jobs.sample import choose_frames
from geoalign.models.captions import Captioner, load_captioner
from geoalign.models.codec_base import LatentCodec
from geoalign.policy.open import ModelFiles, describe
from geoalign.policy.policy import RetakePolicy
from geoalign.policy.published import CRF, STEPS, published_retake, truncated
from geoalign.rewards.vlm import templates
from geoalign.training.processes.device import device_of, dtype_of
from geoalign.types import Encodings, RetakeBatch

TRUTH = "truth"
"""Name of the method that shows the true retakes."""


class Method(Protocol):
    """One row of the tables."""

    name: str

    def identity(self) -> dict[str, Any]:
        """What must not change under a benchmark that is resumed."""
        ...

    def contents(self, conditions: Sequence[Condition]) -> dict[str, str]:
        """What its retakes of these conditions are made of or lie in, by name: hashes that must not change either,
        while other conditions may come."""
        ...

    def frames(self, condition: Condition, native: int) -> int:
        """How many frames its retake of a clip of ``native`` frames has; raises DataError if there is none."""
        ...

    def video(self, condition: Condition, source: Source, target: CameraTrajectory, out: Path) -> Path:
        """The retake: made and written to ``out``, or found elsewhere. Raises whatever goes wrong."""
        ...

    def close(self) -> None:
        """Give back memory; a method may be used again."""
        ...


class VideosMethod:
    """Videos of another method, called as the published script calls its own."""

    def __init__(self, name: str, folder: Path, cap: int | None) -> None:
        self.name, self._folder, self._cap = check_method(name), folder, cap
        self._videos = find_videos(folder)

    def identity(self) -> dict[str, Any]:
        """See :class:`Method`: their folder, in which rows name the files."""
        return {"videos": str(self._folder)}

    def contents(self, conditions: Sequence[Condition]) -> dict[str, str]:
        """See :class:`Method`: every video that is there."""
        found = {condition: video_of(self._videos, condition) for condition in conditions}
        return {video_name(self.name, c): content_hash(file) for c, file in found.items() if file is not None}

    def frames(self, condition: Condition, native: int) -> int:
        """See :class:`Method`."""
        count = probe_clip(AnyReader(PyAVReader()), self._file(condition)).frames
        return min(count, native, self._cap or count)

    def video(self, condition: Condition, source: Source, target: CameraTrajectory, out: Path) -> Path:
        """See :class:`Method`."""
        return self._file(condition)

    def close(self) -> None:
        """See :class:`Method`."""

    def _file(self, condition: Condition) -> Path:
        file = video_of(self._videos, condition)
        if file is None:
            raise DataError(f"{self._folder}: no video {condition.name}.mp4")
        return file


class TruthMethod:
    """The true retakes of a world that can render them: what readers say of these is their own error."""

    name = TRUTH

    def __init__(self, clips: Clips) -> None:
        self._clips = clips

    def identity(self) -> dict[str, Any]:
        """See :class:`Method`."""
        return {"truth": True}

    def contents(self, conditions: Sequence[Condition]) -> dict[str, str]:
        """See :class:`Method`: nothing that the clips do not say."""
        return {}

    def frames(self, condition: Condition, native: int) -> int:
        """See :class:`Method`."""
        return native

    def video(self, condition: Condition, source: Source, target: CameraTrajectory, out: Path) -> Path:
        """See :class:`Method`."""
        video = self._clips.truth(condition, target)
        if video is None:
            raise DataError("the true retake is not known")
        write_video(out, video[0], source.fps, lossless=True)
        return out

    def close(self) -> None:
        """See :class:`Method`."""


class ModelMethod:
    """A model that the project can open; its weights are read when the first retake is made."""

    def __init__(self, name: str, model: str, checkpoint: Path | None, config: Config, clips: Clips) -> None:
        self.name, self._config, self._lossless = check_method(name), config, clips.lossless
        self._clips = clips
        self._model, self._checkpoint = model, checkpoint
        self.files: ModelFiles = describe(model, checkpoint)
        self.device = device_of(config.run)
        settings = config.benchmark
        self._published = settings.settings == "published"
        self.dtype = torch.bfloat16 if self._published else dtype_of(config.run, self.device)
        self.reads_text = reads_text_of(self.files)
        self.guidance = GUIDANCE if self.reads_text else 1.0
        self._cap = settings.longest(name)
        self._encodings = lru_cache(maxsize=1)(self._encode)
        if self.reads_text:  # before the work, what is read from files
            _ = self._prompts, self._negative

    @property
    def steps(self) -> int:
        """Steps of one retake."""
        return STEPS if self._published else self._config.flow.steps

    def identity(self) -> dict[str, Any]:
        """See :class:`Method`; weights, and the text of all clips, by their content."""
        files = sorted({file for part in self.files.parts for file in weight_files(part.path)})
        told = {"model": self._model, "checkpoint": self._checkpoint and str(self._checkpoint)}
        if self.reads_text and (captioner := self._config.benchmark.captioner) is not None:
            files.append(captioner)
        return told | {"content": text_hash(*map(content_hash, files), self._negative if self.reads_text else "")}

    def contents(self, conditions: Sequence[Condition]) -> dict[str, str]:
        """See :class:`Method`: the text of every clip, of a captioner that which it is asked for."""
        clips = dict.fromkeys(condition.clip for condition in conditions) if self.reads_text else ()
        captioned = self._config.benchmark.captioner is not None
        told = {clip: self._prompts.get(clip) or ("" if captioned else self._clips.caption(clip)) for clip in clips}
        return {f"text of {clip}": text_hash(text) if text else "none of its own" for clip, text in told.items()}

    def frames(self, condition: Condition, native: int) -> int:
        """See :class:`Method`."""
        return self.longest_of(native)

    def video(self, condition: Condition, source: Source, target: CameraTrajectory, out: Path) -> Path:
        """See :class:`Method`."""
        batch = RetakeBatch(source.clip, target, ("",))
        batch = replace(batch, encodings=self._encodings(condition.clip, source))
        scale = self._config.benchmark.condition_scales.get(self.name, 1.0)
        if self._published:
            asked = replace(batch, target_camera=target.scale_translation(scale))
            frames: Any = truncated(published_retake(self.policy, asked)[0].cpu())
        else:
            seed, rows = self._config.benchmark.seed, torch.tensor([condition.noise_row])
            flow = self._config.flow
            made = held_out_retake(self.policy, batch, flow, seed=seed, condition_scale=scale, rows=rows)
            if not torch.isfinite(made).all():
                raise DataError("the model gave NaN or infinity")
            frames = made[0]
        write_video(out, frames, source.fps, crf=CRF, lossless=self._lossless)
        return out

    def close(self) -> None:
        """See :class:`Method`: model, codec and encoders."""
        for name in ("policy", "codec", "_encoders", "_captioner"):
            self.__dict__.pop(name, None)
        self._encodings.cache_clear()

    def prompt(self, clip: str, source: Source) -> str | None:
        """The prompt of a clip; None for a model that reads no text."""
        if not self.reads_text:
            return None
        if given := self._prompts.get(clip):
            return given
        if self._captioner is not None:
            caption = self._captioner.caption(source.clip.video[0])
            return caption if self._published else remove_camera_motion(caption) or caption
        return source.caption or self._config.data.clips.caption_text

    def longest_of(self, native: int) -> int:
        """Frames of its retake of a clip of ``native`` frames."""
        return choose_frames(self._rules, min(native, self._cap or native))

    @cached_property
    def _rules(self) -> LatentCodec:
        """The codec without its weights."""
        return self.files.codec_rules()

    @cached_property
    def codec(self) -> LatentCodec:
        """Pixels to latents."""
        return self.files.codec(dtype=self.dtype, device=self.device)

    @cached_property
    def policy(self) -> RetakePolicy:
        """The loaded model."""
        model, _ = self.files.network(dtype=self.dtype, device=self.device)
        return RetakePolicy(model.requires_grad_(False), self.codec, self.guidance)

    @cached_property
    def _encoders(self) -> Encoders:
        return Encoders(self.files, dtype=self.dtype, device=self.device)

    @cached_property
    def _captioner(self) -> Captioner | None:
        folder = self._config.benchmark.captioner
        return None if folder is None else load_captioner(folder, dtype=self.dtype, device=self.device)

    @cached_property
    def _prompts(self) -> Mapping[str, str]:
        file = self._config.benchmark.prompts
        return {} if file is None else _read_prompts(file, self._clips.names)

    @cached_property
    def _negative(self) -> str:
        given = self._config.benchmark.negative_prompt
        if given is not None:
            return read_text(given)
        return templates.load("wan_negative_prompt") if self._published else DEFAULT_NEGATIVE_PROMPT

    def _encode(self, clip: str, source: Source) -> Encodings | None:
        negative = self._negative if self.reads_text else ""
        batch = RetakeBatch(source.clip, source.clip.camera, ("",))
        return self._encoders(batch, self.prompt(clip, source), negative)


def video_name(method: str, condition: Condition) -> str:
    """Name of a method's own video of a condition among the contents of a benchmark."""
    return f"video {condition.name} of {method}"


def _read_prompts(file: Path, clips: Sequence[str]) -> dict[str, str]:
    """Prompts by the plain name of their clip; raises DataError for a file of another form, or of other clips."""
    told, fix = read_json_object(file), "expected {CLIP: PROMPT}"
    if wrong := [name for name, prompt in told.items() if not isinstance(prompt, str) or not prompt.strip()]:
        raise DataError(f"{file}: {wrong[0]} has no text; {fix}")
    found = {plain(name): prompt for name, prompt in told.items()}
    if len(found) < len(told):
        raise DataError(f"{file}: two of its clips have one plain name; {fix}, each clip once")
    if not found.keys() & {*clips}:
        raise DataError(f"{file}: has a prompt for none of the clips, of which the first is {clips[0]}; {fix}")
    return found


@dataclass(frozen=True, slots=True)
class MethodArguments:
    """Methods as a command line names them: ``NAME=MODEL``, ``NAME=CHECKPOINT`` and ``NAME=FOLDER``."""

    models: tuple[str, ...] = ()
    checkpoints: tuple[str, ...] = ()
    videos: tuple[str, ...] = ()

    def opened(self, config: Config, clips: Clips) -> list[Method]:
        """All methods, models first, and the truth last where it is known.

        Raises:
            UsageError: no method, one without a name, a name twice, or a checkpoint of no model.
            UserError: a model or a folder that cannot be opened, or a length of retakes that the clips cannot have.
        """
        models, checkpoints = _named("--model", self.models), _named("--checkpoint", self.checkpoints)
        videos = _named("--videos", self.videos)
        if not models and not videos:
            raise UsageError("nothing to compare: give --model NAME=MODEL or --videos NAME=FOLDER")
        if lost := sorted({*checkpoints} - {*models}):
            raise UsageError(f"--checkpoint {lost[0]}=...: there is no --model {lost[0]}=...")
        if both := sorted(({*models} & {*videos}) | ({TRUTH} & {*models, *videos})):
            raise UsageError(f"two methods are called {both[0]} ({TRUTH} is taken); give each a name of its own")
        found: list[Method] = []
        for name, model in models.items():
            checkpoint = Path(checkpoints[name]) if name in checkpoints else None
            found.append(ModelMethod(name, model, checkpoint, config, clips))
        longest = config.benchmark.longest
        found += [VideosMethod(name, Path(folder), longest(name)) for name, folder in videos.items()]
        if clips.knows_truth:
            found.append(TruthMethod(clips))
        if not clips.cuts:
            _check_lengths(found, config.benchmark, clips)
        return found


def _check_lengths(methods: Sequence[Method], settings: BenchmarkConfig, clips: Clips) -> None:
    """Refuse methods whose retakes are asked to be shorter than clips that cannot be cut."""
    native = clips.native_frames(clips.names[0])
    for method in methods:
        if (cap := settings.longest(method.name)) is not None and cap < native:
            by_cap = cap == settings.caps.get(method.name)
            setting = f"benchmark.caps of {method.name} {cap}" if by_cap else f"benchmark.max_frames {cap}"
            raise UsageError(
                f"{setting}: clips of this world have {native} frames, no fewer; unset it or set world.frames"
            )
        taken = method.longest_of(native) if isinstance(method, ModelMethod) else native
        if taken < native:
            raise UsageError(
                f"--model {method.name}: clips of this world have {native} frames, of which its codec takes {taken}; "
                f"set world.frames to {taken}"
            )


def _named(option: str, given: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise UsageError(f"{option} {text}: expected NAME=VALUE")
        if name in found:
            raise UsageError(f"{option} {name}=... is given twice")
        found[name] = value
    return found

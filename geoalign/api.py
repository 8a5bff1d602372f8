"""The public face that ``geoalign`` offers: what the verbs do, from Python, thin over the jobs (docs/api.md)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from geoalign.config.data import DEFAULT_NEGATIVE_PROMPT
from geoalign.config.load import load_config
from geoalign.config.schema import Config
from geoalign.errors import UsageError, argument, told_in_python
from geoalign.files.atomic import check_writable
from geoalign.frozen.device import named_device
from geoalign.geometry.cameras.door import open_camera, open_target
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.jobs.arguments import path_of, positive, shown, text_of, whole
from geoalign.jobs.encode import Encoders, choose_guidance, reads_text_of
from geoalign.jobs.sample import find_source_camera, read_inputs, sampler
from geoalign.jobs.sample_files import outputs, used_values, write_retake
from geoalign.jobs.score import find_source, list_videos, read_condition, score_video
from geoalign.jobs.train import run_training
from geoalign.models.codec import PatchCodec
from geoalign.policy import policy, retake
from geoalign.policy.formats import save_pretrained
from geoalign.policy.open import ModelFiles, describe
from geoalign.rewards.base import Reward
from geoalign.rewards.registry import build_reward, takes_evaluator
from geoalign.types import RetakeBatch

Name = str | Path
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, slots=True, eq=False)
class Retake:
    """One retake and what it was made from.

    Attributes:
        video: ``[F, 3, H, W]`` float32 in [-1, 1], on the CPU.
        fps: frames per second, those of the source.
        batch: the one condition: source video and camera, ground plane, target camera.
        arguments: what it was asked for, by name.
        used: what it was made with, given or found, by name.
    """

    video: Tensor
    fps: float
    batch: RetakeBatch
    arguments: Mapping[str, Any]
    used: Mapping[str, Any]

    @told_in_python()
    def save(self, path: Name) -> dict[str, Path]:
        """Write the .mp4 and, beside it, what ``geoalign sample`` writes; returns the files by what they are.

        Raises:
            UsageError: ``path`` is no .mp4.
            DataError: it cannot be written.
        """
        out = path_of("path", path)
        for file in outputs(out).values():
            check_writable(file)
        return write_retake(out, self.batch, self.video[None], self.fps, {"arguments": self.arguments}, self.used)


@dataclass(frozen=True, slots=True)
class RetakePolicy(policy.RetakePolicy):
    """A retake model with its codec, as a library user has it: read from files, used on files, written to a folder.

    Attributes:
        files: where the model came from; text and image encoders are looked for there. None: no encoders.
    """

    files: ModelFiles | None = None

    @classmethod
    @told_in_python()
    def from_pretrained(
        cls,
        path: Name,
        *,
        delta: Name | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Load a policy, frozen.

        Args:
            path: ``builtin:tiny_base``, a policy file, a run or checkpoint folder, an exported folder, or a folder of
                published weights (docs/checkpoints.md). Nothing is downloaded.
            delta: what was trained on top of it.
            device: where model and codec go.
            dtype: of the weights, and of a video autoencoder.

        Raises:
            UserError: files that are missing, damaged or do not belong together, a device that is not there, or a type
                in which nothing is computed.
        """
        if not isinstance(dtype, torch.dtype) or dtype not in _DTYPES:
            raise UsageError(f"dtype={dtype}: expected one of {', '.join(map(str, _DTYPES))}")
        place = named_device(str(device))
        files = describe(path_of("path", path), None if delta is None else path_of("delta", delta))
        model, _ = files.network(dtype=dtype, device=place)
        return cls(model.requires_grad_(False), files.codec(dtype=dtype, device=place), files=files)

    @told_in_python()
    def save_pretrained(self, folder: Name) -> None:
        """Write a folder that :meth:`from_pretrained` and ``--model`` read, every bit kept; a Wan VAE is not copied.

        Raises:
            CheckpointError: the folder exists already.
        """
        save_pretrained(
            self.model, path_of("folder", folder), codec=self.codec if isinstance(self.codec, PatchCodec) else None
        )

    @told_in_python()
    def retake(
        self,
        video: Name,
        path: Name | CameraTrajectory,
        *,
        speed: float = 1.0,
        frames: int | Literal["all"] | None = None,
        size: tuple[int, int] | None = None,
        source_camera: Name | None = None,
        intrinsics: tuple[float, float, float, float] | None = None,
        ground_plane: tuple[float, float, float, float] | None = None,
        prompt: str | None = None,
        negative_prompt: str | None = None,
        guidance: float | None = None,
        steps: int = 25,
        shift: float = 5.0,
        seed: int = 0,
    ) -> Retake:
        """Film a video again along another camera path.

        Args:
            video: a video file, or a folder of frames.
            path: a preset ("arc_left"), a camera file, or a path; its length is fitted to the video's.
            speed: multiplies the camera's motion per frame.
            frames: length; "all": the longest that fits the codec; default: that, but at most 81.
            size: (H, W) after scale and centre crop; default 480 x 832 with the Wan VAE, else the video's own.
            source_camera: camera of the source, a file or a preset; default: ``clip.npz`` beside ``clip.mp4``, else a
                camera that does not move.
            intrinsics: fx, fy, cx, cy of the source as fractions of (W, H, W, H); default: the camera file's, else
                60 degrees.
            ground_plane: (nx, ny, nz, d) with n . X = d in metres; default: the camera file's.
            prompt: what the video shows, for a model that reads text.
            negative_prompt: text of the second guidance pass; default: our own.
            guidance: of classifier-free guidance; default 5 for a model that reads text, else 1.
            steps, shift: of the sampler.
            seed: of the initial noise.

        Raises:
            UserError: anything that cannot be read, does not fit, that the model lacks, or that would have no effect.
        """
        asked = {name: _plain(value) for name, value in locals().items() if name not in ("self", "path")}
        asked["trajectory"] = _plain(path)  # as the JSON of the verb calls it
        file = path_of("video", video)
        target = path if isinstance(path, CameraTrajectory) else path_of("path", path)
        prompt = None if prompt is None else text_of("prompt", prompt)
        negative = None if negative_prompt is None else text_of("negative_prompt", negative_prompt)
        flow, seed = sampler(steps, shift), whole("seed", seed, 0)
        reads_text = self.files is not None and reads_text_of(self.files)
        scale = choose_guidance(guidance, reads_text, "this model", prompt=prompt, negative_prompt=negative)
        if source_camera is None:
            camera, _ = find_source_camera(file, lens=intrinsics is None, plane=ground_plane is None)
        else:
            camera = str(path_of("source_camera", source_camera))
        batch, fps = read_inputs(
            file, target, codec=self.codec, speed=speed, frames=frames, size=size, source_camera=camera,
            intrinsics=intrinsics, ground_plane=ground_plane,
        )  # fmt: skip
        negative = DEFAULT_NEGATIVE_PROMPT if negative is None else negative
        if self.files is not None:
            encoders = Encoders(self.files, dtype=self.dtype, device=self.device)
            batch = replace(batch, encodings=encoders(batch, prompt, negative))
        made = retake.retake(replace(self, guidance=scale), batch, flow, seed=seed, strict=True)
        return Retake(made[0].cpu(), fps, batch, asked, used_values(scale, prompt, negative, camera, None))


def _plain(value: Any) -> Any:
    """As JSON can say it."""
    if isinstance(value, CameraTrajectory):
        return "a CameraTrajectory"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(one) for one in value]
    if isinstance(value, Real) and not isinstance(value, bool | int | float):  # of NumPy
        return int(value) if isinstance(value, Integral) else float(value)
    return str(value) if isinstance(value, os.PathLike) else value


@told_in_python()
def load_trajectory(name: Name, frames: int | None = None, *, speed: float = 1.0) -> CameraTrajectory:
    """A camera path whose frame 0 is the identity.

    Args:
        name: a preset, a camera file of any format of docs/data.md, or ``FILE#CAMERA``.
        frames: length; a preset needs one, a file has its own, of which the first are taken or all spread over more.
        speed: multiplies the motion per frame.

    Returns:
        ``[frames]`` float32 camera-to-world with intrinsics.

    Raises:
        UserError: unknown preset, a preset without ``frames``, or a file that is missing, damaged or ambiguous.
    """
    name, speed = path_of("name", name), positive("speed", speed)
    count = open_camera(name, prefer="target").path.num_frames if frames is None else whole("frames", frames, 1)
    return open_target(name, count, speed=speed)


@told_in_python()
def score(
    videos: Name | Sequence[Name],
    target: Name,
    *,
    reward: str | Reward = "geometry",
    options: Mapping[str, Any] | None = None,
    source: Name | None = None,
    source_camera: Name | None = None,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
) -> list[dict[str, Any]]:
    """Score videos against a camera path; the first failure is raised (``geoalign score`` notes it and goes on).

    Args:
        videos: a file, a folder of videos, or several files.
        target: a preset or a camera file, such as the JSON that lies beside a retake.
        reward: a registered name, ``package.module:Class``, or a reward that :func:`geoalign.build_reward` built.
        options: of a named reward; ``evaluator`` is planar unless it says otherwise.
        source, source_camera: the video that was filmed again and its camera; of a retake its JSON tells both.
        frames: frames 0..frames-1 are scored; default: as many as the path has.
        size: (H, W) to score at; default: that of the video.

    Returns:
        for each video its numbers by name: ``score/KEY`` (higher is better), errors in metres and degrees, ``valid``.

    Raises:
        UserError: anything that is missing, damaged or does not fit.
    """
    built = _reward_of(reward, options)
    evaluator = getattr(getattr(built, "evaluator", None), "name", None)
    wanted = str(path_of("target", target))
    given = None if source is None else path_of("source", source)
    camera = None if source_camera is None else str(path_of("source_camera", source_camera))
    tasks = []
    for path in _listed(videos):
        found = find_source(path, wanted, given, camera)
        task = read_condition(wanted, found.video, found.camera, size, evaluator, frames, video=path)
        tasks.append((path, task))
    return [score_video(path, built, task)[0] for path, task in tasks]


def _listed(videos: Name | Sequence[Name]) -> list[Path]:
    if isinstance(videos, Sequence) and not isinstance(videos, str | bytes):
        if not videos:
            raise UsageError(f"{argument('videos', videos)}: there is none to score")
        return [path_of("videos", video) for video in videos]
    return list_videos(path_of("videos", videos))


def _reward_of(reward: str | Reward, options: Mapping[str, Any] | None) -> Reward:
    """The reward that scores: built of its name and options, or as it is."""
    if options is not None and not (isinstance(options, Mapping) and all(isinstance(name, str) for name in options)):
        raise UsageError(f"{argument('options', shown(options))}: expected values by name")
    if isinstance(reward, str):
        evaluator = {"evaluator": "planar"} if takes_evaluator(reward) else {}
        return build_reward(reward, evaluator | dict(options or {}))
    if not isinstance(reward, Reward):
        raise UsageError(f"{argument('reward', shown(reward))}: expected a name, or what geoalign.build_reward built")
    if options is not None:
        raise UsageError("options are those of a reward that is named; give them to geoalign.build_reward")
    return reward


@told_in_python()
def train(config: Name | Config, *overrides: str, resume: str | None = None) -> Path:
    """Train as ``geoalign train`` does.

    Args:
        config: a preset ("tiny_cpu"), a .yaml file, or a configuration.
        overrides: ``section.key=value`` that replace settings of a preset or file.
        resume: "auto" continues if there is a checkpoint, "latest" needs one, else a checkpoint folder.

    Returns:
        the run folder: ``summary.json``, ``metrics.jsonl``, the trained policy.

    Raises:
        UserError: a configuration or set-up that cannot work.
    """
    begin = None if resume is None else str(path_of("resume", resume))
    overrides = tuple(text_of("overrides", text) for text in overrides)
    if isinstance(config, Config):
        if overrides:
            raise UsageError("overrides replace settings of a preset or file; change a Config before it is given")
        return run_training(config, resume=begin)
    name = str(path_of("config", config))
    chosen = load_config(Config, name, overrides).asked_for(name, overrides)
    return run_training(chosen, resume=begin)

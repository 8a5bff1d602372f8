"""The public face that ``geoalign`` offers: what the verbs do, from Python, thin over the jobs (docs/api.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from geoalign.config.data import DEFAULT_NEGATIVE_PROMPT
from geoalign.config.flow import FlowConfig
from geoalign.config.load import load_config
from geoalign.config.schema import Config
from geoalign.errors import UsageError
from geoalign.geometry.cameras.door import open_camera, open_target
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.jobs.encode import Encoders, choose_guidance, reads_text_of
from geoalign.jobs.sample import find_source_camera, read_inputs
from geoalign.jobs.sample_files import write_retake
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


@dataclass(frozen=True, slots=True, eq=False)
class Retake:
    """One retake and what it was made from.

    Attributes:
        video: ``[F, 3, H, W]`` float32 in [-1, 1], on the CPU.
        fps: frames per second, those of the source.
        batch: the one condition: source video and camera, ground plane, target camera.
        arguments: what it was asked for, by name.
    """

    video: Tensor
    fps: float
    batch: RetakeBatch
    arguments: Mapping[str, Any]

    def save(self, path: Name) -> dict[str, Path]:
        """Write the .mp4 and, beside it, what ``geoalign sample`` writes; returns the files by what they are.

        Raises:
            UsageError: ``path`` is no .mp4.
            DataError: it cannot be written.
        """
        return write_retake(Path(path), self.batch, self.video[None], self.fps, {"arguments": self.arguments}, {})


@dataclass(frozen=True, slots=True)
class RetakePolicy(policy.RetakePolicy):
    """A retake model with its codec, as a library user has it: read from files, used on files, written to a folder.

    Attributes:
        files: where the model came from; text and image encoders are looked for there. None: no encoders.
    """

    files: ModelFiles | None = None

    @classmethod
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
            UserError: files that are missing, damaged or do not belong together.
        """
        files = describe(path, None if delta is None else Path(delta))
        model, _ = files.network(dtype=dtype, device=device)
        return cls(model.requires_grad_(False), files.codec(dtype=dtype, device=device), files=files)

    def save_pretrained(self, folder: Name) -> None:
        """Write a folder that :meth:`from_pretrained` and ``--model`` read, every bit kept; a Wan VAE is not copied.

        Raises:
            CheckpointError: the folder exists already.
        """
        save_pretrained(self.model, Path(folder), codec=self.codec if isinstance(self.codec, PatchCodec) else None)

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
        negative_prompt: str = DEFAULT_NEGATIVE_PROMPT,
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
            negative_prompt: text of the second guidance pass.
            guidance: of classifier-free guidance; default 5 for a model that reads text, else 1.
            steps, shift: of the sampler.
            seed: of the initial noise.

        Raises:
            UserError: anything that cannot be read, does not fit, or that the model lacks.
        """
        reads_text = self.files is not None and reads_text_of(self.files)
        if reads_text and prompt is None:
            raise UsageError("this model reads text: say what the video shows with prompt=...")
        camera = source_camera if source_camera is not None else find_source_camera(Path(video))[0]
        batch, fps = read_inputs(
            Path(video), path, codec=self.codec, speed=speed, frames=frames, size=size, source_camera=camera,
            intrinsics=intrinsics, ground_plane=ground_plane,
        )  # fmt: skip
        scale = choose_guidance(guidance, reads_text, "this model")
        if self.files is not None:
            encoders = Encoders(self.files, dtype=self.dtype, device=self.device)
            batch = replace(batch, encodings=encoders(batch, prompt, negative_prompt))
        flow = FlowConfig(steps=steps, shift=shift)
        made = retake.retake(replace(self, guidance=scale), batch, flow, seed=seed, strict=True)
        wanted = "a CameraTrajectory" if isinstance(path, CameraTrajectory) else str(path)
        arguments = {
            "video": str(video), "trajectory": wanted,
            "speed": speed, "prompt": prompt, "guidance": scale, "steps": steps, "shift": shift, "seed": seed,
        }  # fmt: skip
        return Retake(made[0].cpu(), fps, batch, arguments)


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
    count = frames if frames is not None else open_camera(name, prefer="target").path.num_frames
    return open_target(name, count, speed=speed)


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
    if isinstance(reward, str):
        evaluator = {"evaluator": "planar"} if takes_evaluator(reward) else {}
        reward = build_reward(reward, evaluator | dict(options or {}))
    paths = list_videos(Path(videos)) if isinstance(videos, str | Path) else [Path(video) for video in videos]
    rows = []
    for path in paths:
        found = find_source(path, str(target), _path(source), None if source_camera is None else str(source_camera))
        task = read_condition(str(target), found.video, found.camera, size, False, frames)
        rows.append(score_video(path, reward, task)[0])
    return rows


def _path(name: Name | None) -> Path | None:
    return None if name is None else Path(name)


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
    if isinstance(config, Config):
        if overrides:
            raise UsageError("overrides replace settings of a preset or file; change a Config before it is given")
        return run_training(config, resume=resume)
    chosen = load_config(Config, str(config), overrides).asked_for(config, overrides)
    return run_training(chosen, resume=resume)

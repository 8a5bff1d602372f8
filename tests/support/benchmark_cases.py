"""A folder in the layout of DAVIS, a random policy in the published layout, and readers that fail as they are told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tiny_base import tiny_vae
from torch import Tensor

from geoalign.benchmark.records import CaseFiles, ToolResult
from geoalign.config.load import load_config
from geoalign.config.model import ModelConfig
from geoalign.config.schema import Config
from geoalign.evaluators.base import PoseEstimate
from geoalign.geometry.cameras.door import open_camera
from geoalign.models.dit import RetakeDiT
from geoalign.policy.formats import save_pretrained
from geoalign.types import SourceClip

SIZE = (32, 48)
MODEL = ModelConfig(
    dim=96, heads=4, layers=1, ffn_dim=96, in_channels=32, out_channels=16, patch=(1, 2, 2), text_dim=16,
    text_length=1, freq_dim=32, source="frames", first_frame_given=False, camera="learned", pluecker_adapter=True,
    time_stride=4, space_stride=8, timestep_dtype="bfloat16",
)  # fmt: skip


def davis(root: Path, clips: dict[str, int]) -> Path:
    """``clips`` by name with their numbers of frames: drifting noise, the left quarter of which is annotated."""
    for seed, (name, frames) in enumerate(clips.items()):
        picture = np.random.default_rng(seed).integers(0, 255, (SIZE[0], SIZE[1] + frames, 3), dtype=np.uint8)
        for kind in ("JPEGImages", "Annotations"):
            (root / kind / "480p" / name).mkdir(parents=True)
        for frame in range(frames):
            shown = Image.fromarray(picture[:, frame : frame + SIZE[1]])
            shown.save(root / "JPEGImages" / "480p" / name / f"{frame:05d}.jpg")
            mask = np.zeros(SIZE, np.uint8)
            mask[:, : SIZE[1] // 4] = 1
            Image.fromarray(mask).save(root / "Annotations" / "480p" / name / f"{frame:05d}.png")
    return root


def random_policy(folder: Path, seed: int = 0) -> Path:
    """A scaled-down ReDirector with its autoencoder, as ``geoalign export --format diffusers`` writes one."""
    torch.manual_seed(seed)
    model = RetakeDiT(MODEL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_pretrained(model.bfloat16(), folder)
    tiny_vae().save_pretrained(folder / "vae")
    return folder


def davis_config(root: Path, *changes: str) -> Config:
    """The configuration ``smoke`` with :func:`davis_settings`."""
    return load_config(Config, "smoke", [*davis_settings(root), *changes])


def davis_settings(root: Path) -> tuple[str, ...]:
    """All clips of ``root``, a pan and a dolly, four steps, and an estimator that tells what it is told."""
    return (
        "run.device=cpu", "world=null", "flow.steps=4", f"benchmark.clips={root}",
        f"benchmark.size=[{SIZE[0]},{SIZE[1]}]",
        "benchmark.paths=[pan_right,zoom_in]", "benchmark.estimators={told: {kind: 'benchmark_cases:Told'}}",
        "benchmark.resamples=200", "benchmark.estimators.planar_second=null", "benchmark.estimators.flow_pnp=null",
    )  # fmt: skip


class Told:
    """Reads a camera that depends on the pixels, so that equal videos give equal numbers."""

    name = "told"
    stop: Callable[[], None] = staticmethod(lambda: None)
    """Called first: a test ends the process here."""

    def __call__(self, video: Tensor, source: SourceClip) -> PoseEstimate:
        type(self).stop()
        frames = video.shape[1]
        brightness = video.mean((2, 3, 4))
        c2w = torch.eye(4).repeat(1, frames, 1, 1)
        c2w[..., 2, 3] = (brightness - brightness[:, :1]) + 0.01 * torch.arange(frames)
        ones = torch.ones(1)
        return PoseEstimate(c2w, torch.arange(frames), ones, 0 * ones)


@dataclass
class FakeTool:
    """A tool that does with a case what its name says: ``{"zoom": "raises"}``; all others are read perfectly."""

    behaviour: dict[str, str] = field(default_factory=dict)
    name: str = "vipe"
    metrics: tuple[str, ...] = ("sharpness",)
    gives_poses: bool = True
    licence: str = "none"
    asked: list[str] = field(default_factory=list)
    content: dict[str, str] = field(default_factory=dict)

    def measure(self, case_files: CaseFiles, out: Path) -> ToolResult:
        self.asked.append(case_files.name)
        assert case_files.source_video.is_file() and case_files.retake_video.is_file()
        told = next((what for part, what in self.behaviour.items() if part in case_files.name), "reads")
        if told == "raises":
            raise RuntimeError("no camera in sight\nand a second line")
        if told == "hangs":
            return ToolResult("failed", "timed out after 2 s")
        c2w = open_camera(case_files.target, frames=case_files.frames).path.c2w.numpy().copy()
        if told == "identity":
            c2w[:] = np.eye(4)
        poses = out / "poses.npz"
        poses.parent.mkdir(parents=True, exist_ok=True)
        np.savez(poses, c2w=c2w, frames=np.arange(len(c2w)))
        if told == "half":
            poses.write_bytes(poses.read_bytes()[:200])
        return ToolResult("ok", "", {"sharpness": np.nan if told == "nan" else 0.5}, poses)

    def contents(self) -> dict[str, str]:
        return dict(self.content)

    def close(self) -> None:
        """Nothing to end."""

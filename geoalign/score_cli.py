"""``geoalign score``: score any video against a camera path, or probe a reward with videos that try to cheat it."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geoalign.errors import DataError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from geoalign.geometry.trajectory import CameraTrajectory
    from geoalign.rewards.base import Reward
    from geoalign.types import RetakeBatch

EXAMPLES = """\
examples:
  geoalign score --evaluator mapanything --set evaluator_options.checkpoint=weights/map-anything-apache \\
                 --video out.mp4 --trajectory target.json --plot
  geoalign score --reward geometry --video retakes/ --trajectory target.json --source in.mp4 --source-camera in.npz
  geoalign score --probes --json probes.json           does the embedded reward resist frozen, black, noise, ... videos?
  geoalign score --probes --evaluator flow_pnp         the same of another evaluator
"""
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi")
# Corner tracking wants larger frames than the embedded world's own.
PROBE_SIZES = {"flow_pnp": "120x208"}


def add_parser(subparsers: Any) -> None:
    """Register ``score``."""
    parser = subparsers.add_parser(
        "score",
        help="score a video against a camera path",
        description="Read the camera of a video in metres and compare it with a path.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--reward", default="geometry", help="registered reward (default geometry)")
    add("--evaluator", default="planar", help="pose evaluator of the geometry reward (default planar)")
    add(
        "--set", action="append", default=[], metavar="OPTION=VALUE",
        help="option of the reward, named as under rewards.NAME.options in a configuration (repeatable)",
    )  # fmt: skip
    add("--video", type=Path, help="video file, or a folder of them")
    add("--trajectory", type=Path, help="target camera path (json, npz, npy; see docs/conventions.md)")
    add("--source", type=Path, help="source video, for evaluators that compare with it (planar does)")
    add("--source-camera", type=Path, help="camera npz of the source, with ground_plane for the planar evaluator")
    add("--size", metavar="HxW", help="frame size to score at (default: that of the video; probes: the evaluator's)")
    add("--json", type=Path, metavar="FILE", help="write the scores there")
    add("--plot", action="store_true", help="write VIDEO.png with the estimated and the target path")
    add("--probes", action="store_true", help="score videos of the embedded world that try to cheat")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Score videos or run the probes."""
    from geoalign.config.rewards import RewardConfig
    from geoalign.config.source import parse_settings
    from geoalign.rewards.registry import build_rewards

    options = {"evaluator": args.evaluator} if args.reward in ("geometry", "source_consistency") else {}
    options |= parse_settings(args.set)
    reward = build_rewards({args.reward: RewardConfig(kind=args.reward, options=options)})[args.reward]
    if args.probes:
        return _run_probes(reward, args.size or PROBE_SIZES.get(args.evaluator), args.json)
    if args.video is None or args.trajectory is None:
        raise UsageError("score needs --video and --trajectory (or --probes); `geoalign score --help` has examples")
    rows = [_score_file(path, reward, args) for path in _videos(args.video)]
    _print_table(rows)
    if args.json:
        from geoalign.io_utils import atomic_write_json

        atomic_write_json(args.json, rows)
    return 0


def _videos(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in VIDEO_SUFFIXES)
        if not found:
            raise DataError(f"{path}: no video in this folder (looked for {', '.join(VIDEO_SUFFIXES)})")
        return found
    if not path.exists():
        raise DataError(f"{path}: no such video")
    return [path]


def _score_file(path: Path, reward: Reward, args: argparse.Namespace) -> dict[str, Any]:
    """Score one video; raises UserError naming the file that is wrong."""
    from geoalign.geometry.io import load_trajectory

    target = load_trajectory(args.trajectory)
    video = _read(path, target.num_frames, args.size)
    batch = _batch(video, target, args)
    output = reward(video, batch)
    row: dict[str, Any] = {"video": str(path), "valid": bool(output.valid[0])}
    row |= {f"score/{name}": float(value[0]) for name, value in output.scores.items()}
    row |= {name: float(value[0]) for name, value in {**output.parts, **output.diagnostics}.items()}
    if args.plot:
        _plot(path.with_suffix(".png"), reward, video, batch)
    return row


def _read(path: Path, frames: int, size: str | None) -> Tensor:
    from geoalign.data.frames import to_float
    from geoalign.data.video import PyAVReader

    reader = PyAVReader()
    found = reader.probe(path).frames
    if found < frames:
        raise DataError(f"{path}: {found} frames, but the trajectory has {frames}; give a path of {found} frames")
    shape = None if size is None else _shape(size)
    return to_float(reader.read(path, range(frames), shape))[None]


def _shape(size: str) -> tuple[int, int]:
    try:
        height, width = (int(part) for part in size.lower().split("x"))
    except ValueError as error:
        raise UsageError(f"--size {size}: expected HEIGHTxWIDTH, for instance 480x832") from error
    return height, width


def _batch(video: Tensor, target: CameraTrajectory, args: argparse.Namespace) -> RetakeBatch:
    """The condition of a single video; without --source the video's own first frame stands for the source."""
    from geoalign.data.citywalk import read_clip_camera
    from geoalign.geometry.trajectory import CameraTrajectory
    from geoalign.types import RetakeBatch, SourceClip

    frames, _, height, width = video.shape[1:]
    source, plane = video[:, :1].expand_as(video), None
    camera = CameraTrajectory.identity(frames, target.intrinsics[0])
    if args.source is not None:
        source = _read(args.source, frames, f"{height}x{width}")
    if args.source_camera is not None:
        camera, plane = read_clip_camera(args.source_camera, (height, width)).window(list(range(frames)))
        camera = camera.to(dtype=video.dtype)
    clip = SourceClip(
        source, CameraTrajectory.stack([camera]), None if plane is None else plane[None].float(), ("video",)
    )
    return RetakeBatch(clip, CameraTrajectory.stack([target.to(dtype=video.dtype)]), ("",))


def _print_table(rows: list[dict[str, Any]]) -> None:
    columns = [name for name in rows[0] if name != "video"]
    width = max(len(Path(row["video"]).name) for row in rows)
    print(f"{'video':<{width}}  " + "  ".join(f"{name:>18}" for name in columns))
    for row in rows:
        cells = (f"{row[name]:>18.4f}" if isinstance(row[name], float) else f"{row[name]!s:>18}" for name in columns)
        print(f"{Path(row['video']).name:<{width}}  " + "  ".join(cells))


def _plot(path: Path, reward: Reward, video: Tensor, batch: RetakeBatch) -> None:
    """Target and estimated camera centres from above and from the side, in metres."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from geoalign.io_utils import atomic_path

    evaluator = getattr(reward, "evaluator", None)
    if evaluator is None:
        raise UsageError(f"--plot needs a reward with a pose evaluator; {reward.name} has none")
    tracks = {"target": batch.target_camera.c2w[0], "estimated": evaluator(video, batch.source).c2w[0]}
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.2), constrained_layout=True)
    for axis, (a, b, title) in zip(axes, ((0, 2, "from above"), (0, 1, "along the first view")), strict=True):
        for label, c2w in tracks.items():
            axis.plot(c2w[:, a, 3], c2w[:, b, 3], marker="o", markersize=3, label=label)
        axis.set(title=title, xlabel=f"{'xyz'[a]} (m)", ylabel=f"{'xyz'[b]} (m)", aspect="equal")
    axes[0].legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=140)
    plt.close(figure)


def _run_probes(reward: Reward, size: str | None, json_path: Path | None) -> int:
    """Honest renders of the embedded world against cheats; exit code 1 if any cheat gets within its margin."""
    from geoalign.io_utils import atomic_write_json

    rows = probe_table(reward, size=None if size is None else _shape(size))
    print(f"{'probe':<14}{'score':>10}{'margin':>10}")
    for row in rows:
        print(f"{row['probe']:<14}{row['score']:>10.3f}{row['margin']:>10.3f}")
    if json_path:
        atomic_write_json(json_path, rows)
    return 0 if all(row["margin"] > 0 for row in rows[1:]) else 1


def probe_table(reward: Reward, count: int = 40, size: tuple[int, int] | None = None) -> list[dict[str, Any]]:
    """Mean score (sum of the reward's keys) of the honest render and of every probe, and how far each lies below it.

    ``wrong_scale`` is a true render along 1.4 times the requested motion.

    Args:
        reward: what is probed.
        count: scenes.
        size: frame height and width in pixels; None takes the embedded world's.
    """
    import torch

    from geoalign.config.world import WorldConfig
    from geoalign.rewards.probes import PROBES
    from geoalign.world.pairs import LabelBias, paired_videos

    world = WorldConfig()
    if size is not None:
        focal = world.focal_px * size[0] / world.height
        world = world.model_copy(update={"height": size[0], "width": size[1], "focal_px": focal})

    def render(bias: LabelBias | None) -> Any:
        return paired_videos(world, count, torch.Generator().manual_seed(5), style="real", bias=bias)

    pairs = render(None)
    videos = {"honest": pairs.truth, "wrong_scale": render(LabelBias(translation_mean=math.log(1.4))).truth}
    videos |= {name: probe(pairs.truth) for name, probe in PROBES.items()}
    scores = {}
    for name, video in videos.items():
        keys = reward(video, pairs.batch).scores
        scores[name] = float(torch.stack(list(keys.values())).sum(0).mean())
    return [{"probe": name, "score": score, "margin": scores["honest"] - score} for name, score in scores.items()]

"""``geoalign score``: score any video against a camera path, or probe a reward with videos that try to cheat it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geoalign.cli.options import (
    add_cameras,
    add_json,
    add_reward,
    check_json,
    frame_size,
    read_reward,
    whole,
    write_json,
)
from geoalign.errors import RewardError, RunError, UsageError, UserError

if TYPE_CHECKING:
    from geoalign.jobs.score import ScoringTask, Source
    from geoalign.rewards.base import Reward

_SIDE_BY_SIDE = 4
"""Up to so many videos are columns of a table whose lines are numbers."""

EPILOG = """\
Frames 0..F-1 of a video are compared with the F poses of the path (a preset has as many as the video); `frames` and
`video_frames` in the output say how many of how many that were. A video that fails becomes a row with an error, and the
others are scored all the same.
Exit codes: 0 all scored (probes: no cheat came out ahead), 1 a video failed or is invalid, 2 wrong usage.

What an evaluator needs:
  planar (default)        --source and --source-camera with ground_plane; compares with the source frame by frame
  flow_pnp                --source-camera with ground_plane; reads frame 0 and the video
                          of a retake by `geoalign sample` its JSON tells both; a camera npz beside --source is found
  mapanything             --set evaluator_options.checkpoint=FOLDER; any video, nothing else
  depth_anything_3        the same

examples:
  geoalign score --video out.mp4 --trajectory out.json                    a retake, and the path that it was asked for
  geoalign score --video retakes/ --trajectory target.json --source in.mp4 --source-camera in.npz --json scores.json
  geoalign score --evaluator mapanything --set evaluator_options.checkpoint=weights/map-anything-apache \\
                 --video out.mp4 --trajectory target.json --plot
  geoalign score --probes --json probes.json           does the embedded reward resist frozen, black, noise, ... videos?
  geoalign score --probes --evaluator flow_pnp         the same of another evaluator
"""


def add_parser(subparsers: Any, summary: str) -> None:
    """Register ``score``."""
    parser = subparsers.add_parser(
        "score",
        description=f"{summary}. The camera is read in metres.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add_reward(parser)
    add("--video", type=Path, help="video file, or a folder of them")
    add_cameras(
        parser, target="A file of F poses scores frames 0..F-1, a preset has the length of the video",
        source="with its ground plane for planar and flow_pnp",
    )  # fmt: skip
    add(
        "--frames",
        type=whole("--frames", 1),
        metavar="F",
        help="score frames 0..F-1 (default: as many as the path has)",
    )
    add("--source", type=Path, help="source video, for evaluators that compare with it (planar does)")
    add(
        "--size",
        type=frame_size,
        metavar="HxW",
        help="frame size to score at (default: that of the video; probes: the evaluator's)",
    )
    add_json(parser, "the scores")
    add(
        "--plot", action="store_true",
        help="write VIDEO.png beside each video (clip.mp4 gives clip.mp4.png) with the estimated and the target path; "
        "replaces earlier plots, never another picture",
    )  # fmt: skip
    add("--probes", action="store_true", help="score videos of the embedded world that try to cheat; takes no files")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Score videos or run the probes; everything that can be refused is refused before a reward is built."""
    kind, options = read_reward(args)
    _check_usage(args, kind, estimates="evaluator" in options)
    check_json(args)
    return _probe(args, kind, options) if args.probes else _score(args, kind, options)


def _check_usage(args: argparse.Namespace, kind: str, *, estimates: bool) -> None:
    if args.probes:
        files = ("video", "trajectory", "source", "source_camera", "frames", "plot")
        given = ", ".join(f"--{name.replace('_', '-')}" for name in files if getattr(args, name))
        if given:
            raise UsageError(f"--probes scores videos of the embedded world and reads no files; drop {given}")
    elif args.video is None or args.trajectory is None:
        raise UsageError("score needs --video and --trajectory (or --probes); `geoalign score --help` has examples")
    if args.plot and not estimates:
        raise UsageError(f"--plot draws the path that a pose evaluator reads, and reward {kind} has none")


def _build(kind: str, options: dict[str, Any]) -> Reward:
    from geoalign.rewards.registry import build_reward

    return build_reward(kind, options)


def _probe(args: argparse.Namespace, kind: str, options: dict[str, Any]) -> int:
    from geoalign.jobs.score_probes import PROBE_SIZES, print_probes, probe_table, resists

    rows = probe_table(_build(kind, options), size=args.size or PROBE_SIZES.get(options.get("evaluator", "")))
    if write_json(args, rows):
        print_probes(rows)
    return 0 if resists(rows) else 1


def _score(args: argparse.Namespace, kind: str, options: dict[str, Any]) -> int:
    from geoalign.jobs.score import list_videos
    from geoalign.jobs.score_plot import check_plot

    videos = list_videos(args.video)
    tasks = _tasks(args, videos, options.get("evaluator"))
    if args.plot:
        for path in videos:
            check_plot(path)
    reward = _build(kind, options)
    rows = [_row(path, reward, tasks[path], plot=args.plot, alone=path == args.video) for path in videos]
    if write_json(args, rows):
        _print_table(rows)
    _print_notes(rows, args.frames)
    return 1 if any("error" in row for row in rows) else 0


def _tasks(args: argparse.Namespace, videos: Sequence[Path], evaluator: Any) -> dict[Path, ScoringTask]:
    """What each video is compared with; says where a source was found that nobody gave."""
    from geoalign.jobs.score import find_source, read_condition

    tasks: dict[Source, ScoringTask] = {}
    found = {}
    for path in videos:
        source = find_source(path, args.trajectory, args.source, args.source_camera)
        if source not in tasks:
            tasks[source] = read_condition(
                args.trajectory, source.video, source.camera, args.size, evaluator, args.frames, video=path
            )  # fmt: skip
            if source.told_by:
                print(f"source   {source.video}, its camera told by {source.told_by}", file=sys.stderr)
        found[path] = tasks[source]
    return found


def _row(path: Path, reward: Reward, task: ScoringTask, *, plot: bool, alone: bool) -> dict[str, Any]:
    """Score one video of several: what fails is noted in its row. A single video that cannot be scored raises."""
    from geoalign.jobs.score import score_video
    from geoalign.jobs.score_plot import plot_scored

    try:
        row, video, batch = score_video(path, reward, task)
    except Exception as error:  # whatever it is, it must not take the other videos with it
        if alone and isinstance(error, UserError):
            raise
        if alone:
            raise RewardError(f"{path}: {_told(error)}") from error
        return {"video": str(path), "valid": False, "error": _told(error)}
    if plot and row["valid"]:
        try:
            plot_scored(path, reward, video, batch)
        except RunError as error:
            row["error"] = f"scored, but without its plot: {error}"
    return row


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    """The numbers to stdout: a line for each number of a few videos, a line for each video of many."""
    columns = list(dict.fromkeys(name for row in rows for name in row if name not in ("video", "error")))
    lines = [["video", *columns]]
    lines += [[Path(row["video"]).name, *(_cell(row.get(name)) for name in columns)] for row in rows]
    if len(rows) <= _SIDE_BY_SIDE:
        lines = [list(line) for line in zip(*lines, strict=True)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        rest = (f"{text:>{width}}" for text, width in zip(others, widths[1:], strict=True))
        print("  ".join([f"{first:<{widths[0]}}", *rest]))


def _print_notes(rows: Sequence[dict[str, Any]], asked: int | None) -> None:
    """To stderr what failed and of which videos only the first frames were scored, ``asked`` for or the path's."""
    for row in rows:
        if row.get("video_frames", 0) > row.get("frames", 0):
            why = f"the path has {row['frames']}" if asked is None else f"--frames {asked}"
            what = f"frames 0-{row['frames'] - 1} of {row['video_frames']} were scored: {why}"
            print(f"note: {row['video']}: {what}", file=sys.stderr)
        if "error" in row:
            print(f"failed: {row['video']}: {row['error'].removeprefix(row['video'] + ': ')}", file=sys.stderr)


def _cell(value: Any) -> str:
    if value is None or value != value:  # not in this row, or NaN
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)

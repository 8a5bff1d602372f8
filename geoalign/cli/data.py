"""``geoalign data check | trajectories | subset``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geoalign.cli.options import add_config, examples, positive, read_config, whole
from geoalign.errors import DataError

if TYPE_CHECKING:
    from geoalign.config.schema import Config
    from geoalign.data.trajectories import TrajectoryPool

EXAMPLES = """\
examples:
  geoalign data check --config tiny_cpu                    what is usable, what is not and why; cache intact?
  geoalign data trajectories --config tiny_cpu --plot paths.png
  geoalign data subset --table sekai-real-walking-hq.csv --hours 5 --out data/citywalk/clips
"""


def add_parser(subparsers: Any, summary: str) -> None:
    """Add ``data`` with its sub-verbs."""
    data = subparsers.add_parser(
        "data",
        description=summary,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = data.add_subparsers(dest="data_verb", required=True, metavar="check|trajectories|subset")
    check = verbs.add_parser(
        "check",
        help="count usable clips, camera paths and cache entries; list defects",
        **examples(
            "geoalign data check --config tiny_cpu", "geoalign data check --config node_8gpu data.root=/mnt/citywalk"
        ),
    )
    add_config(check)
    check.set_defaults(run=run_check)
    paths = verbs.add_parser(
        "trajectories",
        help="statistics of raw and rescaled target paths",
        **examples("geoalign data trajectories --config tiny_cpu --count 500 --plot paths.png"),
    )
    add_config(paths)
    paths.add_argument(
        "--count", type=whole("--count", 1), default=200, metavar="N", help="paths to draw (default 200)"
    )
    paths.add_argument("--plot", type=Path, metavar="FILE", help="write a figure (.png, .svg, .pdf)")
    paths.set_defaults(run=run_trajectories)
    subset = verbs.add_parser(
        "subset",
        help="list what to fetch of a published data set; downloads nothing",
        description="List what to fetch for some hours of Sekai, OmniWorld-CityWalk or OmniWorld-Game.",
        **examples(
            "geoalign data subset --table sekai-real-walking-hq.csv --hours 5 --out data/citywalk/clips",
            "geoalign data subset --table sekai-real-walking-hq.csv --table citywalk.csv --hours 20 --out clips",
            "geoalign data subset --table omniworld_game_metadata.csv --hours 10 --out scenes",
        ),
    )
    subset.add_argument(
        "--table", type=Path, action="append", required=True, metavar="FILE",
        help="published csv or jsonl; given twice: only clips that both list, with the cells of the first",
    )  # fmt: skip
    subset.add_argument("--hours", type=positive("--hours"), required=True, metavar="N", help="hours of video to reach")
    subset.add_argument("--seed", type=whole("--seed", 0), default=0, help="another choice (default 0)")
    subset.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the lists are written")
    subset.set_defaults(run=run_subset)


def run_check(args: argparse.Namespace) -> int:
    """Probe every clip, its camera file and all camera paths, verify the cache that the run reads.

    Exit 1 if too much is unusable or that cache is damaged.
    """
    from geoalign.data.clips import list_clips
    from geoalign.data.loader import ClipLoader, cause_of
    from geoalign.data.prepare import chosen_starts
    from geoalign.data.readers import local_device, open_reader
    from geoalign.data.tally import Tally
    from geoalign.data.trajectories import load_pool

    run = read_config(args)
    config = run.data
    clips, paths = Tally("clips"), Tally("camera paths")
    loader = ClipLoader(config, open_reader(config.clips.reader, local_device()))
    windows, may_estimate = 0, config.prepare.evaluator is not None
    for record in list_clips(config.clips_path, config.clips, clips):
        try:
            starts = loader.starts(record)
            last = chosen_starts(starts, config.prepare.windows_per_clip)[-1] if config.use_cache else starts[-1]
            loader.check_camera(record, last, may_estimate=may_estimate)
            windows += len(starts)
        except DataError as error:
            clips.accepted -= 1
            clips.reject(record.clip_id, cause_of(error, record))
    clips.remarks.update(loader.remarks())
    print(f"{clips.summary()}\n  {windows:,} windows of {config.num_frames} frames at stride {config.clips.stride}")
    pool = load_pool(config.trajectories_path, config.num_frames, config.trajectories, paths, "all")
    print(f"{paths.summary()}\n  {len(pool):,} windows of {config.num_frames} frames")
    clips.check(config.clips.max_bad_fraction)
    _check_cache(run)
    return 0


def _check_cache(config: Config) -> None:
    """Verify the cache that the run reads, if it reads one; raises DataError for none that fits, or a damaged file."""
    from geoalign.jobs.prepare import open_prepared
    from geoalign.jobs.progress import bytes_text

    cache = config.data.cache
    if not config.data.use_cache:
        print(f"cache {cache}: this run does not use it (data.use_cache)")
        return
    if not cache.is_dir():
        print(f"cache {cache}: nothing prepared")
        return
    folder = open_prepared(config)
    entries = folder.readable()
    used = sum(file.stat().st_size for file in folder.path.rglob("*") if file.is_file())
    damaged = [f"{name}: {defect}" for name, defect in folder.verify()]
    print(f"cache {folder.path}: {len(entries):,} windows, {bytes_text(used)}, {len(damaged)} damaged files")
    if damaged:
        print("\n".join(f"  {line}" for line in damaged))
        raise DataError(f"{cache}: delete the damaged files above and run `geoalign prepare` again")


def run_subset(args: argparse.Namespace) -> int:
    """Choose whole videos or scenes and write what to fetch."""
    from geoalign.data.subset import choose

    found = choose(args.table, args.hours, args.seed)
    if found.hours < args.hours:
        print(f"the table holds no more than {found.hours:.2f} hours")
    files = found.write(args.out)
    what = "clips of" if found.kind == "clips" else "scenes,"
    print(
        f"{found.hours:.2f} hours: {len(found.items):,} {what} {len(found.sources):,} "
        f"{'videos' if found.kind == 'clips' else 'archives'}, about {found.gigabytes:.2g} GB"
    )
    if found.left_out:
        print(f"{found.left_out:,} rows name neither a clip nor a scene, or are listed twice")
    if found.misfits:
        line, cause = found.misfits[0]
        print(f"{len(found.misfits):,} rows do not fit the table and were left out; the first, line {line}: {cause}")
    print("\n".join(f"wrote {file}" for file in files))
    return 0


def run_trajectories(args: argparse.Namespace) -> int:
    """Draw target paths as training does and show what the rescale did to them."""
    from geoalign.data.tally import Tally
    from geoalign.data.trajectories import load_pool
    from geoalign.files.atomic import check_writable

    config = read_config(args)
    if args.plot is not None:
        check_writable(args.plot, (".png", ".svg", ".pdf"))
    tally = Tally("camera paths")
    pool = load_pool(config.data.trajectories_path, config.data.num_frames, config.data.trajectories, tally)
    print(tally.summary())
    _report_paths(config, pool, args.count, args.plot)
    return 0


def _report_paths(config: Config, pool: TrajectoryPool, count: int, plot: Path | None) -> None:
    from geoalign.data.trajectories import PathRescaler, draw_path

    rescaler = PathRescaler(config.data.trajectories.rescale)
    draws = [draw_path(pool, rescaler, config.run.seed, 0, group) for group in range(count)]
    results = [result for _, result in draws]
    fps = config.data.trajectories.rescale.play_fps
    print(f"{count} target paths of {len(pool)} windows, {rescaler.drawn} drawn; speeds per second at {fps:g} fps")
    for title, unit, values in (
        ("peak speed", "m/s", [result.peak_translation for result in results]),
        ("peak turn", "deg/s", [result.peak_rotation for result in results]),
        ("path length", "m", [result.path_m for result in results]),
        ("yaw span", "deg", [result.yaw_deg for result in results]),
    ):
        low, middle, high = (sorted(values)[int(q * (len(values) - 1))] for q in (0.05, 0.5, 0.95))
        print(f"  {title:<12} 5% {low:8.3f}   median {middle:8.3f}   95% {high:8.3f} {unit}")
    for title, counts in (("rejected", rescaler.rejected), ("adjusted", rescaler.adjusted)):
        print(f"  {title}: {', '.join(f'{name} {number}' for name, number in counts.most_common()) or 'none'}")
    if plot is not None:
        from geoalign.data.plots import plot_paths

        plot_paths(plot, [pool.raw(index) for index, _ in draws], results, config.data.trajectories.rescale)
        print(f"figure: {plot}")

"""Windows per second of each video reader and of the cache, and peak memory; one JSON line per measurement.

python profiling/model/bench_data.py --height 720 --width 1280 --frames 81 --stride 2 --out profiling/results/data.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from geoalign.config.data import ClipsConfig, DataConfig
from geoalign.data.cache import open_cache
from geoalign.data.dali import DaliReader
from geoalign.data.prepare import data_settings, prepare
from geoalign.data.video import PyAVReader, write_video
from geoalign.geometry.cameras.camera_file import write_clip_camera
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.jobs.environment import describe_environment

CLIP = "clip.mp4"


class MeanEncoder:
    """A latent of the Wan VAE's size without its cost: measures reading, not encoding."""

    identity: Mapping[str, str] = {"codec": "pooled"}

    def encode(self, frames: Tensor, prompt: str) -> Mapping[str, Tensor]:
        """``[16, T, h, w]`` like the Wan VAE (4 x 8 x 8 compression)."""
        pooled = torch.nn.functional.avg_pool2d(frames[::4].mean(1), 8)
        return {"latents": pooled.expand(16, *pooled.shape)}

    def caption(self, frames: Tensor) -> str | None:
        """None."""
        return None

    def estimate_camera(self, frames: Tensor) -> None:
        """None."""
        return None


def measure(name: str, config: DataConfig, seconds: float, device: int | None) -> dict[str, object]:
    """Windows per second of the cache or of a reader, and this process's peak memory, over at least ``seconds``.

    Runs in a process of its own, so that the peak is the reader's; what the imports alone need is stated beside it.
    """
    idle = _peak_mb()
    if name == "cache":
        folder = open_cache(config.cache, data_settings(config))
        entry = next(iter(folder.entries().values()))

        def task() -> object:
            return folder.read(entry)
    else:
        reader = PyAVReader() if name == "pyav" else DaliReader(device)
        clip, span = config.clips_path / CLIP, (config.num_frames - 1) * config.clips.stride + 1
        indices = list(range(0, span, config.clips.stride))

        def task() -> object:
            return reader.read(clip, indices, (config.height, config.width))

    task()  # warm-up: codecs are opened, pipelines built
    count, begin = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < seconds:
        task()
        count += 1
    return {"name": name, "windows_per_s": count / elapsed, "peak_rss_mb": _peak_mb(), "idle_rss_mb": idle}


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write_clip(config: DataConfig, source: tuple[int, int]) -> None:
    """A moving VP9 clip of ``source`` (H, W) with its camera file, long enough for one window; prepares it."""
    span = (config.num_frames - 1) * config.clips.stride + 1
    low = torch.rand(1, 3, 9, 16, generator=torch.Generator().manual_seed(0))
    picture = torch.nn.functional.interpolate(low, size=source, mode="bicubic").clamp(0, 1)[0]
    frames = [(torch.roll(picture, 3 * i, 2) * 255).byte().permute(1, 2, 0) for i in range(span)]
    clip = config.clips_path / CLIP
    write_video(clip, torch.stack(frames), 30, codec="libvpx-vp9", crf=30)
    write_clip_camera(clip.with_suffix(".npz"), CameraTrajectory.identity(span), source)
    prepare(config, MeanEncoder())


def main() -> None:
    """Measure and print or append rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in (("height", 720), ("width", 1280), ("frames", 81), ("stride", 2)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--size", type=int, nargs=2, default=(480, 832), metavar=("H", "W"))
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--device", type=int, help="GPU of the DALI reader; default CPU")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    size = tuple(args.size)
    with tempfile.TemporaryDirectory() as scratch:
        config = DataConfig(
            root=Path(scratch), cache=Path(scratch) / "cache", num_frames=args.frames, height=size[0], width=size[1],
            clips=ClipsConfig(stride=args.stride),
        )  # fmt: skip
        with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as fresh:
            fresh.submit(write_clip, config, (args.height, args.width)).result()
            names = ("cache", "pyav", "dali")
            rows = [fresh.submit(measure, name, config, args.seconds, args.device).result() for name in names]
    machine = describe_environment()
    facts = {"codec": "vp9", "date": time.strftime("%Y-%m-%d"), "threads": torch.get_num_threads()}
    facts |= {name: machine[name] for name in ("device", "cores", "commit", "versions")} | {"frames": args.frames}
    facts |= {"load_1m": round(os.getloadavg()[0], 1)}  # other work on the machine shows here
    facts |= {"source": [args.height, args.width], "size": list(size), "stride": args.stride, "dali_gpu": args.device}
    lines = "".join(json.dumps(row | facts) + "\n" for row in rows)
    sys.stdout.write(lines)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a") as stream:
            stream.write(lines)


if __name__ == "__main__":
    main()

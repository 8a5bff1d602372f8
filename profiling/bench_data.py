"""Windows per second of each video reader and of the cache, and peak memory; one JSON line per measurement.

python profiling/bench_data.py --height 720 --width 1280 --frames 81 --stride 2 --out profiling/results/data.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from geoalign.config.data import ClipsConfig, DataConfig
from geoalign.data.cache import open_cache
from geoalign.data.citywalk import write_clip_camera
from geoalign.data.dali import DaliReader
from geoalign.data.prepare import data_settings, prepare
from geoalign.data.video import PyAVReader, write_video
from geoalign.geometry.trajectory import CameraTrajectory


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


def measure(name: str, task: Callable[[], object], seconds: float) -> dict[str, object]:
    """Repeat ``task`` (after one warm-up) for at least ``seconds``."""
    task()
    count, begin = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < seconds:
        task()
        count += 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"name": name, "windows_per_s": count / elapsed, "peak_rss_mb_so_far": peak}


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
    span = (args.frames - 1) * args.stride + 1
    indices, size = range(0, span, args.stride), tuple(args.size)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        clip = Path(scratch) / "clips" / "clip.mp4"
        low = torch.rand(1, 3, 9, 16, generator=torch.Generator().manual_seed(0))
        picture = torch.nn.functional.interpolate(low, size=(args.height, args.width), mode="bicubic").clamp(0, 1)[0]
        frames = [(torch.roll(picture, 3 * i, 2) * 255).byte().permute(1, 2, 0) for i in range(span)]
        write_video(clip, torch.stack(frames), 30, codec="libvpx-vp9", crf=30)
        del frames
        write_clip_camera(clip.with_suffix(".npz"), CameraTrajectory.identity(span), (args.height, args.width))
        config = DataConfig(
            root=Path(scratch), cache=Path(scratch) / "cache", num_frames=args.frames, height=size[0], width=size[1],
            clips=ClipsConfig(stride=args.stride),
        )  # fmt: skip
        prepare(config, MeanEncoder())
        folder = open_cache(config.cache, data_settings(config))
        entry = next(iter(folder.entries().values()))
        rows.append(measure("cache", lambda: folder.read(entry), args.seconds))
        for reader in (PyAVReader(), DaliReader(args.device)):
            rows.append(measure(reader.name, lambda: reader.read(clip, list(indices), size), args.seconds))  # noqa: B023
    facts = {"codec": "vp9", "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    facts |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "frames": args.frames}
    facts |= {"source": [args.height, args.width], "size": list(size), "stride": args.stride, "dali_gpu": args.device}
    lines = "".join(json.dumps(row | facts) + "\n" for row in rows)
    sys.stdout.write(lines)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a") as stream:
            stream.write(lines)


if __name__ == "__main__":
    main()

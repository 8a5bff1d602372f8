"""Frame pre-processing: the native op against the path through an mp4 file and Pillow.

    OMP_NUM_THREADS=1 python profiling/ops/bench_preprocess.py [--frames N] [--size HxW] [--repeats N] [--out FILE]

Every path starts from one decoded bfloat16 clip in [-1, 1] in memory and ends with the inputs of all three reward
models, every frame in every output, on one thread:

* `mp4+pillow`: 8-bit frames, H.264 in memory (libx264, PyAV's default preset, one thread), decode, Pillow resizes,
  numpy normalisation and patch order; what a scorer that reads video files does.
* `pillow`: the same without the file.
* `torch`: `geoalign_kernels.frame_preprocess` with its plain torch reference, which runs where there is no compiler.
* `native`: the same op, C++ twin.

Before anything is timed, the outputs of all paths are compared: same shapes and dtype, and the same picture up to what
H.264 loses. Time is CPU time of the process (user and system), because other work may share the machine's cores; the
median of the repeats is quoted, after one warm-up. The clip is a moving texture with noise from a fixed seed.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

import geoalign_kernels as gk
from geoalign.frozen.mapanything_images import IMAGENET_MEAN, IMAGENET_STD, plan_resize
from geoalign.frozen.qwen_patches import CLIP_MEAN, CLIP_STD, fit_size
from geoalign.jobs.environment import describe_environment

Frames = list[np.ndarray]
PATHS = {
    "mp4+pillow": "bf16 clip > uint8 > mp4 in memory (libx264, PyAV) > decode > Pillow > numpy normalise, patches",
    "pillow": "bf16 clip > uint8 > Pillow > numpy normalise, patches",
    "torch": "bf16 clip > geoalign_kernels.frame_preprocess, torch reference",
    "native": "bf16 clip > geoalign_kernels.frame_preprocess, C++ twin",
}
"""What each row of the result file ran; all end in the same float32 inputs."""
MOST_LOSS = 4 / 255 / 0.22
"""Mean difference of a path, in normalised units: four 8-bit levels, which libx264's default quality stays below."""


def make_clip(frames: int, height: int, width: int) -> Tensor:
    """[1, T, 3, H, W] bfloat16 in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.arange(height)[:, None] / height, torch.arange(width)[None] / width
    images = []
    for t in range(frames):
        waves = [torch.sin(20 * (x + 0.01 * t) + c) * torch.cos(14 * (y - 0.006 * t)) for c in range(3)]
        images.append(0.8 * torch.stack(waves) + 0.03 * torch.randn(3, height, width, generator=generator))
    return torch.stack(images)[None].clamp(-1, 1).bfloat16()


def to_frames(clip: Tensor) -> Frames:
    levels = ((clip[0].float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return list(levels.permute(0, 2, 3, 1).contiguous().numpy())


def through_mp4(frames: Frames) -> Frames:
    """The frames after H.264, yuv420p."""
    memory = io.BytesIO()
    with av.open(memory, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=16)
        stream.height, stream.width, stream.pix_fmt, stream.thread_count = *frames[0].shape[:2], "yuv420p", 1
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())
    memory.seek(0)
    with av.open(memory) as source:
        source.streams.video[0].thread_count = 1
        return [frame.to_ndarray(format="rgb24") for frame in source.decode(video=0)]


def with_pillow(frames: Frames, fitted: tuple[int, int]) -> list[np.ndarray]:
    """Geometry images, clip patches and still patches; the patches of both share one resize."""
    height, width = frames[0].shape[:2]
    crop = plan_resize(height, width)
    top, left = crop.offset
    box = (left, top, left + crop.output[1], top + crop.output[0])
    images, resized = [], []
    for frame in frames:
        image = Image.fromarray(frame)
        cut = np.asarray(image.resize(crop.resized[::-1], Image.Resampling.LANCZOS).crop(box))
        images.append(_normalise(cut, IMAGENET_MEAN, IMAGENET_STD))
        whole = np.asarray(image.resize(fitted[::-1], Image.Resampling.BICUBIC))
        resized.append(_normalise(whole, CLIP_MEAN, CLIP_STD))
    planes = np.stack(resized)
    return [np.stack(images), _patches(planes), _patches(np.repeat(planes, 2, axis=0))]


def _normalise(image: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    values = (image.astype(np.float32) / 255 - np.float32(mean)) / np.float32(std)
    return np.ascontiguousarray(values.transpose(2, 0, 1))


def _patches(planes: np.ndarray) -> np.ndarray:
    count, _, height, width = planes.shape
    x = planes.reshape(count // 2, 2, 3, height // 28, 2, 14, width // 28, 2, 14)
    return np.ascontiguousarray(x.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)).reshape(count // 2, -1, 1176)


def refuse_unequal_work(outputs: dict[str, list[np.ndarray]]) -> None:
    """Every path must give the same three inputs."""
    for name, arrays in outputs.items():
        for got, wanted in zip(arrays, outputs["native"], strict=True):
            if got.shape != wanted.shape or got.dtype != wanted.dtype:
                raise SystemExit(f"{name} gives {got.dtype} {got.shape}, native {wanted.dtype} {wanted.shape}")
            loss = float(np.abs(got - wanted).mean())
            if loss > MOST_LOSS:
                raise SystemExit(f"{name} shows another picture than native: {loss:.3f} on average")


def timed(call: Any, repeats: int) -> dict[str, float]:
    """CPU milliseconds: median, least and most of `repeats` after one warm-up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(1e3 * (time.process_time() - start))
    return {"cpu_ms_median": statistics.median(times), "cpu_ms_min": min(times), "cpu_ms_max": max(times)}


def environment() -> dict[str, Any]:
    """First row of the result: hardware, versions, the commit of this checkout, and other work on the machine."""
    machine = describe_environment()
    versions = machine["versions"] | {name: metadata.version(name) for name in ("av", "pillow")}
    facts = {name: machine[name] for name in ("device", "cores", "commit")}
    return {"kind": "environment", **facts, "versions": versions, "load_1m": round(os.getloadavg()[0], 1)}


@torch.no_grad()
def main() -> None:
    """Runs the four paths and writes one row each, ratios to `mp4+pillow` included."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", default="480x832")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "preprocess-cpu.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(1)
    height, width = map(int, options.size.split("x"))
    clip, crop = make_clip(options.frames, height, width), plan_resize(height, width)
    fitted = fit_size(height, width, factor=28, min_pixels=100_352, max_pixels=200_704)
    every = tuple(range(options.frames))
    plan = gk.frame_plan(
        (height, width), options.frames, gk.CropTarget(crop.resized, crop.output, crop.offset), fitted,
        geometry_frames=every, clip_frames=every, still_frames=every,
        geometry_statistics=(IMAGENET_MEAN, IMAGENET_STD), patch_statistics=(CLIP_MEAN, CLIP_STD),
    )  # fmt: skip

    def with_op(backend: str) -> list[np.ndarray]:
        with gk.use_backend(backend, "frame_preprocess"):
            geometry, pairs, stills = gk.frame_preprocess(clip, plan)
        return [geometry[0].numpy(), pairs[0].numpy(), stills[0].numpy()]

    paths = {
        "mp4+pillow": lambda: with_pillow(through_mp4(to_frames(clip)), fitted),
        "pillow": lambda: with_pillow(to_frames(clip), fitted),
        "torch": lambda: with_op("reference"),
        "native": lambda: with_op("cpp"),
    }
    refuse_unequal_work({name: call() for name, call in paths.items()})
    rows: list[dict[str, Any]] = [environment()]
    for name, call in paths.items():
        row: dict[str, Any] = {"kind": "path", "name": name, "path": PATHS[name], "threads": 1}
        row |= {"frames": options.frames, "size": options.size}
        row |= {"repeats": options.repeats, **timed(call, options.repeats)}
        row["cpu_ms_per_frame"] = row["cpu_ms_median"] / options.frames
        rows.append(row)
        print(f"{name:12} {row['cpu_ms_per_frame']:8.2f} ms of CPU per frame")
    for row in rows[1:]:
        row["times_native"] = row["cpu_ms_median"] / rows[-1]["cpu_ms_median"]
    print(", ".join(f"{row['name']} {row['times_native']:.1f}x" for row in rows[1:]), "the time of native")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()

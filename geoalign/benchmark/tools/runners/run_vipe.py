"""ViPE by its command line: the camera of a video, and with ``dense`` also depth, masks, intrinsics and frames.

Options: ``pipeline``; ``size`` (H, W) to stretch the video to first, None for its own; ``dense``.
Files: ``poses.npz`` with c2w ``[K, 4, 4]``, frames ``[K]`` and intrinsics ``[K, 4]``, fractions of (W, H, W, H); dense
also ``scene.npz`` with depth ``[F, H, W]`` float16 in metres and moving ``[F, H, W]`` bool (instances and sky), and
``rgb.mp4``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_NAME = "video"


def load(options: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Nothing stays loaded: the command line takes one video a process."""
    program = shutil.which("vipe")
    if program is None:
        raise FileNotFoundError("no program vipe in PATH")

    def measure(request: dict[str, Any]) -> dict[str, Any]:
        folder = Path(request["folder"])
        video = folder / f"{_NAME}.mp4"
        if options["size"]:
            stretch(request["retake_video"], video, tuple(options["size"]))
        else:
            os.symlink(os.path.abspath(request["retake_video"]), video)
        found = folder / "vipe"
        command = [program, "infer", str(video), "--output", str(found), "--pipeline", options["pipeline"]]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, check=False)
        if done.returncode:
            raise RuntimeError(f"vipe infer ended with exit code {done.returncode}")
        with np.load(found / "pose" / f"{_NAME}.npz") as pose, np.load(found / "intrinsics" / f"{_NAME}.npz") as lens:
            c2w, frames, pixels = pose["data"], pose["inds"], lens["data"]
        camera = {"c2w": c2w.astype(np.float64), "frames": frames.astype(np.int64), "intrinsics": pixels / sides(video)}
        np.savez(folder / "poses.npz", **camera)
        if options["dense"]:
            save_scene(found, folder, request["frames"])
        return {"poses": len(c2w)}

    return measure


def stretch(source: str, target: Path, size: tuple[int, int]) -> None:
    """Write ``source`` at (H, W), its shape ignored, as MPEG-4, which is what the published evaluation gives ViPE."""
    import cv2

    film = cv2.VideoCapture(source)
    code = cv2.VideoWriter.fourcc(*"mp4v")
    out = cv2.VideoWriter(str(target), code, film.get(cv2.CAP_PROP_FPS) or 25.0, size[::-1])
    if not film.isOpened() or not out.isOpened():
        raise OSError(f"{source} cannot be read, or {target} not be written, by OpenCV")
    while True:
        more, frame = film.read()
        if not more:
            break
        out.write(cv2.resize(frame, size[::-1]))
    film.release()
    out.release()


def sides(video: Path) -> Any:
    """(W, H, W, H) of a video in pixels, float64."""
    import cv2

    film = cv2.VideoCapture(str(video))
    width, height = film.get(cv2.CAP_PROP_FRAME_WIDTH), film.get(cv2.CAP_PROP_FRAME_HEIGHT)
    film.release()
    return np.array([width, height, width, height], np.float64)


def save_scene(found: Path, folder: Path, count: int) -> None:
    """Bring depth, masks and frames into files that numpy and any player read."""
    depth = np.stack([read_depth(data) for data in members(found / "depth" / f"{_NAME}.zip", count)])
    moving = np.stack([read_mask(data) for data in members(found / "mask" / f"{_NAME}.zip", count)])
    np.savez(folder / "scene.npz", depth=depth, moving=moving)
    os.replace(found / "rgb" / f"{_NAME}.mp4", folder / "rgb.mp4")


def members(archive: Path, count: int) -> list[bytes]:
    """The files of an archive in the order of their frame numbers; a frame that is missing is an error."""
    with zipfile.ZipFile(archive) as opened:
        by_frame = {int(name.split(".")[0]): name for name in opened.namelist()}
        if sorted(by_frame) != list(range(count)):
            raise ValueError(f"{archive.parent.name}/{archive.name} holds {len(by_frame)} of {count} frames")
        return [opened.read(by_frame[frame]) for frame in range(count)]


def read_depth(data: bytes) -> Any:
    """``[H, W]`` float16 of an EXR file with the one channel Z."""
    import io

    import OpenEXR

    opened = OpenEXR.InputFile(io.BytesIO(data))
    window = opened.header()["dataWindow"]
    height, width = window.max.y - window.min.y + 1, window.max.x - window.min.x + 1
    pixels = opened.channels(["Z"])[0]
    kind = {2 * height * width: np.float16, 4 * height * width: np.float32}[len(pixels)]
    return np.frombuffer(pixels, kind).reshape(height, width).astype(np.float16)


def read_mask(data: bytes) -> Any:
    """``[H, W]`` bool of a PNG with instance numbers: 0 is the static scene."""
    import cv2

    mask = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if mask is None or mask.ndim != 2:
        raise ValueError("a mask of ViPE is no PNG of one channel")
    return mask != 0

"""VBench by its Python API on one video of one's own, one dimension after another.

The command line starts `python` of the PATH and ends with 0 whatever happens to it, so only the files tell. Options:
``dimensions``; ``device``, where auto takes CUDA if there is any. Each value is VBench's own mean over its (one) video.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def load(options: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Import once; VBench itself loads the network of a dimension anew for every video."""
    import torch
    import vbench

    device = options["device"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    prompts = str(Path(vbench.__file__).parent / "VBench_full_info.json")

    def measure(request: dict[str, Any]) -> dict[str, Any]:
        folder = Path(request["folder"])
        videos = folder / "videos"
        videos.mkdir()
        shutil.copyfile(request["retake_video"], videos / "retake.mp4")
        values = {}
        for dimension in options["dimensions"]:
            place = folder / dimension
            vbench.VBench(torch.device(device), prompts, str(place)).evaluate(
                videos_path=str(videos), name=dimension, dimension_list=[dimension], mode="custom_input"
            )
            values[dimension] = read_value(place / f"{dimension}_eval_results.json", dimension)
        return values

    return measure


def read_value(path: Path, dimension: str) -> float:
    """The mean of a result file ``{dimension: [mean, [{video_path, video_results}]]}`` over exactly one video."""
    if not path.is_file():
        raise FileNotFoundError(f"VBench left no {os.path.basename(path)}")
    mean, videos = json.loads(path.read_text())[dimension]
    if len(videos) != 1:
        raise ValueError(f"VBench measured {len(videos)} videos of 1 in {dimension}")
    return float(mean)

"""Environments with stand-ins for ViPE, MEt3R, FeatUp and VBench that take the real arguments and write the real files.

Each reads from ``behaviour`` in its environment, at every case, what it shall do.
"""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import exr

VIPE = '''
"""The command line of ViPE 1.2: infer VIDEO --output DIR --pipeline NAME."""
import argparse, os, subprocess, sys, time, zipfile
from pathlib import Path

parser = argparse.ArgumentParser()
infer = parser.add_subparsers().add_parser("infer")
infer.add_argument("video", type=Path)
infer.add_argument("--output", type=Path)
infer.add_argument("--pipeline")
asked = parser.parse_args()
assert asked.pipeline in ("default", "only_pose") and asked.video.exists()
root = Path(sys.argv[0]).parents[1]
behaviour = (root / "behaviour").read_text()
if (root / "by_case").exists():
    for line in (root / "by_case").read_text().splitlines():
        part, how = line.split()
        behaviour = how if part in str(asked.video) else behaviour
with (root / "cases").open("a") as cases:
    cases.write(behaviour + chr(10))
print("Reading video stream:  50%|###   |" + chr(13) + "Reading video stream: 100%|######|")
if behaviour == "once":
    (root / "behaviour").write_text("well")
if behaviour in ("raise", "once"):
    raise RuntimeError("CUDA out of memory. Tried to allocate 9.00 GiB")
if behaviour == "hang":
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    (root / "child.part").write_text(str(child.pid))
    os.replace(root / "child.part", root / "child")
    time.sleep(600)
import cv2
import numpy as np
from OpenEXR import encode

film, frames = cv2.VideoCapture(str(asked.video)), []
while (read := film.read())[0]:
    frames.append(read[1])
count, (height, width) = len(frames), frames[0].shape[:2]
name = asked.video.stem
for folder in ("pose", "intrinsics", "rgb", "depth", "mask"):
    (asked.output / folder).mkdir(parents=True)
inds = np.arange(count)
poses = np.tile(np.eye(4, dtype=np.float32), (count, 1, 1))
poses[:, 0, 3] = 2.0 / width * inds  # one pixel a frame at depth 2 with fx = width
if behaviour == "identity":
    poses[:] = np.eye(4)
if behaviour == "nan":
    poses[1] = np.nan
kept = inds[:-1] if behaviour == "lost" else inds
np.savez(asked.output / "pose" / f"{name}.npz", data=poses[kept], inds=kept)
lens = np.tile(np.array([width, width, width / 2, height / 2], np.float32), (count, 1))
np.savez(asked.output / "intrinsics" / f"{name}.npz", data=lens, inds=inds)
if behaviour == "half":
    file = asked.output / "pose" / f"{name}.npz"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
if asked.pipeline == "default":
    (asked.output / "rgb" / f"{name}.mp4").write_bytes(asked.video.read_bytes())
    mask = np.zeros((height, width), np.uint8)
    mask[4:9, 6:16] = 3
    with zipfile.ZipFile(asked.output / "depth" / f"{name}.zip", "w") as depths:
        for index in range(count - (behaviour == "shallow")):
            depths.writestr(f"{index:05d}.exr", encode(np.full((height, width), 2.0)))
    with zipfile.ZipFile(asked.output / "mask" / f"{name}.zip", "w") as masks:
        for index in range(count):
            masks.writestr(f"{index:05d}.png", cv2.imencode(".png", mask)[1].tobytes())
'''

MET3R = '''
"""The class of MEt3R 0.0.1; the score is the mean difference of the two views."""
import time
from pathlib import Path
import torch

ROOT = Path(__file__).parents[1]

class MEt3R(torch.nn.Module):
    def __init__(self, img_size=256, use_norm=True, backbone="mast3r", feature_backbone="dino16",
                 feature_backbone_weights="mhamilton723/FeatUp", upsampler="featup", distance="cosine", freeze=True,
                 rasterizer_kwargs={}):
        super().__init__()
        assert (img_size, backbone, feature_backbone, upsampler, distance) == (
            None, "mast3r", "dino16", "featup", "cosine")
        (ROOT / "cases").open("a").write("load" + chr(10))

    def forward(self, images, return_overlap_mask=False, return_score_map=False, return_projections=False):
        behaviour = (ROOT / "behaviour").read_text()
        assert images.shape[:3] == (1, 2, 3) and images.abs().max() <= 1, images.shape
        if behaviour == "raise":
            raise ValueError("no overlap")
        if behaviour == "crash":
            import os
            print("Segmentation fault soon")
            os.kill(os.getpid(), 11)
        score = (images[:, 0] - images[:, 1]).abs().mean((1, 2, 3))
        return (score * torch.nan if behaviour == "nan" else score,)
'''

FEATUP_UTIL = """
def norm(image):
    assert image.shape[1] == 3 and 0 <= image.min() and image.max() <= 1
    return image
"""

FEATUP_HUB = '''
"""The entry of FeatUp for torch.hub; the features are 1, 2, 3 everywhere."""
import torch

class Features(torch.nn.Module):
    def forward(self, image):
        return torch.tensor([1.0, 2.0, 3.0])[None, :, None, None].expand(1, 3, *image.shape[2:])

def dino16(pretrained=True, use_norm=True):
    return Features()
'''

VBENCH = '''
"""The class of VBench 0.1.5 and its result files."""
import json, os
from pathlib import Path

ROOT = Path(__file__).parents[2]
CUSTOM = ("subject_consistency", "background_consistency", "motion_smoothness", "dynamic_degree", "aesthetic_quality",
          "imaging_quality")

class VBench:
    def __init__(self, device, full_info_dir, output_path):
        self.output_path = output_path
        os.makedirs(output_path, exist_ok=True)

    def evaluate(self, videos_path, name, prompt_list=[], dimension_list=None, local=False, read_frame=False,
                 mode="vbench_standard", **kwargs):
        assert mode == "custom_input" and not kwargs
        behaviour = (ROOT / "behaviour").read_text()
        videos = [os.path.join(videos_path, file) for file in os.listdir(videos_path) if file.endswith(".mp4")]
        results = {}
        for dimension in dimension_list:
            place = CUSTOM.index(dimension)
            if behaviour == "raise" and place == 4:
                raise RuntimeError("clip cannot be loaded")
            each = [{"video_path": video, "video_results": place + 0.5} for video in videos]
            results[dimension] = [(place + 0.5) / (100 if dimension == "imaging_quality" else 1), each]
        text = json.dumps(results)
        if behaviour == "silent":
            return
        target = Path(self.output_path) / f"{name}_eval_results.json"
        target.write_text(text[: len(text) // 2] if behaviour == "half" else text)
'''


def environment(
    root: Path, name: str, distribution: str, version: str, modules: Mapping[str, str], programs: Mapping[str, str]
) -> Path:
    """Make the environment ``root/name``: a Python that finds the modules, and programs beside it."""
    folder = root / name
    site, programs_folder = folder / "site", folder / "bin"
    info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    programs_folder.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    for module, text in modules.items():
        (site / module).parent.mkdir(parents=True, exist_ok=True)
        (site / module).write_text(text)
    python = programs_folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{site}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    for program, text in programs.items():
        (programs_folder / program).write_text(f"#!{python}\n{text}")
        (programs_folder / program).chmod(0o755)
    behave(root, name, "well")
    return folder


def vipe(root: Path, version: str = "1.2.0") -> Path:
    """ViPE with the pipeline of ReDirector."""
    modules = {"OpenEXR.py": Path(str(exr.__file__)).read_text(), "vipe/_configs/pipeline/only_pose.yaml": ""}
    return environment(root, "vipe", "nvidia-vipe", version, modules, {"vipe": VIPE})


def met3r(root: Path) -> Path:
    """MEt3R and FeatUp; torch.hub finds the latter in ``hub``."""
    modules = {"met3r.py": MET3R, "featup/__init__.py": "", "featup/util.py": FEATUP_UTIL}
    folder = environment(root, "met3r", "met3r", "0.0.1", modules, {})
    hub = folder / "hub" / "mhamilton723_FeatUp_main"
    hub.mkdir(parents=True)
    (hub / "hubconf.py").write_text(FEATUP_HUB)
    return folder


def vbench(root: Path) -> Path:
    """VBench."""
    return environment(root, "vbench", "vbench", "0.1.5", {"vbench/__init__.py": VBENCH}, {})


def behave(root: Path, name: str, how: str) -> None:
    """Say what the tool in ``root/name`` does from now on, and forget what it did."""
    (root / name / "behaviour").write_text(how)
    (root / name / "cases").unlink(missing_ok=True)


def behave_by_case(root: Path, name: str, behaviours: Mapping[str, str]) -> None:
    """Say what the tool does from now on with videos whose path holds a text."""
    (root / name / "by_case").write_text("".join(f"{part} {how}\n" for part, how in behaviours.items()))


def impatient_timer(folder: Path) -> type[threading.Thread]:
    """A ``threading.Timer`` whose time is up as soon as the tool in ``folder`` hangs, whatever the load of the machine.

    The process that hangs there is named in the file ``hung`` from then on.
    """

    class Timer(threading.Thread):
        def __init__(self, seconds: float, function: Callable[[], None]) -> None:
            super().__init__(daemon=True)
            self.seconds, self.function, self.cancelled = seconds, function, threading.Event()

        def run(self) -> None:
            while not (folder / "child").exists():
                if self.cancelled.wait(0.02):
                    return
            (folder / "child").replace(folder / "hung")
            self.function()

        def cancel(self) -> None:
            self.cancelled.set()

    return Timer


def cases(root: Path, name: str) -> list[str]:
    """What the tool did in each of its cases since."""
    path = root / name / "cases"
    return path.read_text().split() if path.exists() else []


def remove(root: Path, name: str) -> None:
    """Take an environment away."""
    shutil.rmtree(root / name)

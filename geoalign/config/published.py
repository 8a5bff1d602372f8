"""Published weights and data: where they come from, under which licence, how large they are, where presets look.

One row for each. The loaders' messages, ``geoalign doctor`` and docs/real-weights.md say what stands here; the presets'
paths lie in these folders (a test compares both).
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_OF_FILES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
"""Suffixes of weights; "Wan2.1-Fun" has a dot too."""


@dataclass(frozen=True, slots=True)
class Published:
    """Something to fetch once, on a machine with a network.

    Attributes:
        title: what it is.
        licence: of the files, as their page states it.
        gigabytes: on the disk (1e9 bytes), counted from the published shapes or stated by the page.
        folder: where the presets look for it.
        get: the command, with ``{folder}`` where the files go.
        use: what of geoalign reads it.
        files: what ``get`` leaves in the folder that settings name by itself.
    """

    title: str
    licence: str
    gigabytes: float
    folder: str
    get: str
    use: str
    files: tuple[str, ...] = ()

    def line_for(self, path: Path) -> str:
        """The command that puts the file ``path`` there; for a name that the download does not have, what to do."""
        for name in self.files:
            parts = Path(name).parts
            if path.parts[-len(parts) :] == parts:
                return self.line(Path(*path.parts[: -len(parts)]))
        return "put it there, or name the one that you have"

    def line_into(self, path: Path) -> str:
        """The command for a folder that settings name, or for a file in one as :meth:`line_for`."""
        return self.line_for(path) if path.suffix in _OF_FILES else self.line(path)

    def line(self, folder: Path | str | None = None) -> str:
        """The command that fetches it into ``folder`` (default: where the presets look)."""
        return self.get.replace("{folder}", shlex.quote(os.fspath(folder or self.folder)))


def _hub(repository: str, *files: str, data: bool = False) -> str:
    """``hf download``; a pattern among ``files`` makes all of them patterns, as names would switch patterns off."""
    patterns = any("*" in file for file in files)
    chosen = [f'--include "{file}"' if patterns else file for file in files]
    return " ".join(["hf download", repository, *["--repo-type dataset"] * data, *chosen, "--local-dir {folder}"])


_WAN = ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl")
BASE = Published(
    "Wan2.1-Fun-V1.1-1.3B-Control-Camera: transformer, Wan VAE, umT5 and CLIP encoders",
    "Apache-2.0", 20, "weights/Wan2.1-Fun-V1.1-1.3B-Control-Camera",
    _hub("alibaba-pai/Wan2.1-Fun-V1.1-1.3B-Control-Camera"), "the base of train and sample, and their encoders",
    (*_WAN, "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"),
)  # fmt: skip
REDIRECTOR = Published(
    "ReDirector: self-attention trained on top of the base", "Apache-2.0 (its code; the files state none)", 1.4,
    "weights/redirector", _hub("byeongjun-park/ReDirector", "step20000.safetensors"),
    "train.delta, sample --checkpoint", ("step20000.safetensors",),
)  # fmt: skip
WAN_T2V = Published(
    "Wan2.1-T2V-1.3B: transformer, Wan VAE and umT5", "Apache-2.0", 17, "weights/Wan2.1-T2V-1.3B",
    _hub("Wan-AI/Wan2.1-T2V-1.3B"), "the base of ReCamMaster", _WAN,
)  # fmt: skip
RECAMMASTER = Published(
    "ReCamMaster: a whole state dict", "MIT (its code)", 6, "weights/recammaster",
    _hub("KwaiVGI/ReCamMaster-Wan2.1", "step20000.ckpt"), "train.delta of recammaster_node_8gpu",
    ("step20000.ckpt",),
)  # fmt: skip
MAPANYTHING = Published(
    "MapAnything v1.1: metric cameras", "Apache-2.0", 4.9, "weights/map-anything-apache",
    _hub("facebook/map-anything-apache", "model.safetensors"), "the geometry reward, and source cameras",
    ("model.safetensors",),
)  # fmt: skip
MAPANYTHING_V1 = Published(
    "MapAnything v1", "Apache-2.0", 2.3, "weights/map-anything-apache-v1",
    _hub("facebook/map-anything-apache-v1", "model.safetensors"), "the same with layout v1", ("model.safetensors",),
)  # fmt: skip
VIDEOALIGN = Published(
    "VideoAlign: visual and motion quality, with its tokenizer", "MIT (its code)", 5.1, "weights/videoalign",
    _hub("KlingTeam/VideoReward", "checkpoint-11352/*"), "the videoalign reward",
    ("checkpoint-11352/model.pth", "checkpoint-11352/tokenizer"),
)  # fmt: skip
HPSV3 = Published(
    "HPSv3: human preference of frames", "Apache-2.0", 16.6, "weights/hpsv3",
    _hub("MizzenAI/HPSv3", "HPSv3.safetensors"), "the hpsv3 reward", ("HPSv3.safetensors",),
)  # fmt: skip
HPSV3_TOKENIZER = Published(
    "Tokenizer of Qwen2-VL-7B-Instruct", "Apache-2.0", 0.02, "weights/qwen2-vl-7b",
    _hub("Qwen/Qwen2-VL-7B-Instruct", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
    "the hpsv3 reward",
)  # fmt: skip
BLIP2 = Published(
    "BLIP-2 OPT-2.7B: captions of clips", "MIT", 15.5, "weights/blip2-opt-2.7b",
    _hub("Salesforce/blip2-opt-2.7b", "*.json", "*.txt", "model*.safetensors"),
    "prepare with caption blip2, sample --captioner",
)  # fmt: skip
DEPTH_ANYTHING = Published(
    "Depth Anything 3, nested giant: a second metric estimator", "CC-BY-NC 4.0", 6.8, "weights/da3",
    _hub("depth-anything/DA3NESTED-GIANT-LARGE-1.1"), "the evaluator depth_anything_3, for one in the benchmark",
)  # fmt: skip
TEMPLATES = Published(
    "Prompts of VideoAlign and HPSv3", "MIT", 0.001, "~/.cache/geoalign/reward-templates",
    "geoalign doctor --fetch-rewards", "the rewards videoalign and hpsv3",
)  # fmt: skip
CLIPS = Published(
    "Sekai-Real-Walking-HQ, of which OmniWorld-CityWalk is a part: table of clips (the videos are on YouTube)",
    "non-commercial research; the videos belong to their makers", 10, "data/citywalk/clips",
    _hub("Lixsp11/Sekai-Project", "train/sekai-real-walking-hq.csv", data=True).replace("{folder}", "data/citywalk")
    + " && geoalign data subset --table data/citywalk/train/sekai-real-walking-hq.csv --hours 5 --out {folder}",
    "source clips",
)  # fmt: skip
CAMERAS = Published(
    "OmniWorld-Game: camera archives, without pixels", "CC BY-NC-SA 4.0", 4, "data/citywalk/trajectories",
    _hub(
        "InternRobotics/OmniWorld", "annotations/OmniWorld-Game/*/*_others.tar.gz",
        "metadata/omniworld_game_metadata.csv", data=True,
    ),
    "target camera paths",
)  # fmt: skip

DAVIS = Published(
    "DAVIS 2017 (trainval, 480p), for the benchmark: films as pictures",
    "BSD (its code); the films belong to their makers", 0.8, "data/davis",
    "get the 480p trainval archive from https://davischallenge.org/davis2017/code.html and unpack it so that "
    "{folder}/JPEGImages/480p exists",
    "`geoalign benchmark` of the preset davis",
)  # fmt: skip

WEIGHTS = (BASE, REDIRECTOR, MAPANYTHING, VIDEOALIGN, HPSV3, HPSV3_TOKENIZER, TEMPLATES, BLIP2)
"""What to fetch for the presets of the paper, in the order of docs/real-weights.md."""
OTHERS = (WAN_T2V, RECAMMASTER, DEPTH_ANYTHING)
"""What further presets and evaluators read."""
DATA = (CLIPS, CAMERAS, DAVIS)
"""The data sets of the presets: two for training, one for the benchmark."""


def gigabytes_of(fixes: Iterable[str]) -> float:
    """What the commands among ``fixes`` fetch, each row once."""
    told = list(fixes)
    rows = (*WEIGHTS, *OTHERS, *DATA, MAPANYTHING_V1)
    return sum(row.gigabytes for row in rows if any(fix.startswith(row.get.split("{folder}")[0]) for fix in told))

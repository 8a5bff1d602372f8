"""What the owner of the weights does: doctor on an empty machine, files to where the docs say, prepare, train, sample.

Weights are tiny and random, but lie in the published forms at the places of docs/real-weights.md.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from repository import ROOT
from safetensors.torch import save_file
from tiny_base import MODEL, write_base
from tiny_captioner import save_tiny_blip2, toy_tokenizer
from tiny_scorers import POSE
from tiny_vlm import make_small, write_hpsv3, write_templates, write_videoalign

from geoalign.cli.main import main
from geoalign.config.published import (
    BASE,
    BLIP2,
    DATA,
    HPSV3,
    HPSV3_TOKENIZER,
    MAPANYTHING,
    OTHERS,
    REDIRECTOR,
    VIDEOALIGN,
    WEIGHTS,
)
from geoalign.evaluators.mapanything import checkpoint
from geoalign.evaluators.mapanything.network import PoseNetwork
from geoalign.files.atomic import read_jsonl
from geoalign.rewards.vlm.templates import FOLDER_VARIABLE

IMAGE_DIM, TEXT_DIM, SIDE = 16, 16, 28
HOME = Path(BASE.folder)
# The preset of one GPU at the size of a test. Encoders are folders here: their original files have one size only.
SETTINGS = {
    "extends": "single_gpu",
    "run": {"name": "first", "device": "cpu", "compile": False, "threads": 1},
    "data": {
        "num_frames": 5, "height": 48, "width": 64,
        "clips": {"stride": 1, "val_fraction": 0.0},
        "trajectories": {"val_fraction": 0.0, "rescale": {"max_outlier_ratio": 30.0}},
        "prepare": {
            "text": str(HOME / "text_encoder"), "tokenizer": str(HOME / "tokenizer"), "text_length": 8,
            "image": str(HOME / "image_encoder"),
        },
    },
    "model": MODEL | {"image_dim": IMAGE_DIM},
    "flow": {"steps": 4},
    "window": {"size": 1, "interval": 1, "max_start": 1},
    "groups": {"conditions": 1, "size": 2},
    "train": {"iterations": 1},
}  # fmt: skip


def geoalign(*arguments: str) -> int:
    return main([arguments[0], "--config", "first.yaml", *arguments[1:]])


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with a configuration; networks of the scorers are as small as the files will be."""
    make_small(monkeypatch)
    monkeypatch.setattr(checkpoint, "LAYOUTS", {"v1.1": POSE})
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "templates"))
    monkeypatch.chdir(tmp_path)
    plain = yaml.safe_dump(json.loads(json.dumps(SETTINGS)))
    (tmp_path / "first.yaml").write_text(plain)
    return tmp_path


def write_encoders(home: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    small = {"num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 16, "feed_forward_proj": "gated-gelu"}
    UMT5EncoderModel(UMT5Config(vocab_size=19, d_model=TEXT_DIM, **small)).save_pretrained(home / "text_encoder")
    toy_tokenizer().save_pretrained(home / "tokenizer")
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    vision = CLIPVisionConfig(hidden_size=IMAGE_DIM, image_size=SIDE, patch_size=14, **layers)
    CLIPVisionModel(vision).save_pretrained(home / "image_encoder")


def write_weights(folder: Path) -> None:
    write_base(folder / HOME, folder / REDIRECTOR.folder / "step20000.safetensors", image_dim=IMAGE_DIM)
    write_encoders(folder / HOME)
    save_tiny_blip2(folder / BLIP2.folder)
    (folder / MAPANYTHING.folder).mkdir(parents=True)
    save_file(PoseNetwork(POSE).state_dict(), folder / MAPANYTHING.folder / "model.safetensors")
    write_videoalign(folder / VIDEOALIGN.folder)
    file, _, _ = write_hpsv3(folder / HPSV3.folder)
    shutil.move(file.parent / "tokenizer", folder / HPSV3_TOKENIZER.folder)
    write_templates(folder / "templates")


def write_data() -> None:
    """Clips and camera archives in the published forms, one clip without a camera; no stamp of a rendered world."""
    world = ["world.clips=3", "world.trajectories=4", "data.root=data/citywalk"]
    assert main(["world", "render", "--config", "smoke", *world]) == 0
    Path("data/citywalk/world.json").unlink()
    next(Path("data/citywalk/clips").rglob("*.npz")).unlink()


def test_from_an_empty_machine_to_a_trained_policy(machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert geoalign("doctor") == 1
    said = capsys.readouterr().out
    needed = [*WEIGHTS, *(row for row in DATA if row.folder != "data/davis")]
    for row in needed:
        assert row.line() in said, row.title
    assert "builtin" not in said

    assert geoalign("train") == 1
    error = capsys.readouterr().err
    lines = [row.line() for row in needed if row.folder != BLIP2.folder]
    assert all(line in error for line in lines) and "builtin" not in error
    assert not (machine / "runs").exists()

    write_weights(machine)
    write_data()
    assert geoalign("doctor") == 1
    said = capsys.readouterr().out
    assert "\n        geoalign prepare --config first.yaml\n" in said  # as it is to be typed
    rows = [line for line in said.splitlines() if line.startswith(("  [ ] ", "  [!] "))]
    assert [row.split("  ")[1].strip() for row in rows if "flash-attn" not in row] == ["[ ] prepared windows"]
    assert geoalign("prepare") == 0
    assert geoalign("doctor", "--json", "found.json") == 0
    found = json.loads((machine / "found.json").read_text())["checks"]
    assert {row["state"] for row in found} == {"present"} and len(found) > 15

    assert geoalign("train") == 0
    row = read_jsonl(machine / "runs" / "first" / "metrics.jsonl")[0]
    assert {"reward/trans", "reward/rot", "reward/vis", "reward/mot", "reward/hps"} <= row.keys()
    assert row["parity/log_prob_diff_max"] == 0.0

    clip = next(machine.glob("data/citywalk/clips/files/*/*.mp4"))
    capsys.readouterr()
    command = ["sample", "--model", "runs/first", "--video", str(clip), "--trajectory", "arc_left", "--out", "out.mp4"]
    assert main([*command, "--prompt", "a bear walks", "--steps", "2", "--size", "48x64", "--frames", "5"]) == 0
    assert (machine / "out.mp4").stat().st_size > 0
    (line,) = capsys.readouterr().err.splitlines()  # ours; no library has anything to say
    assert re.fullmatch(r"\d\d:\d\d:\d\d sample: loading", line)

    benchmark = ["benchmark", "run", "--config", "first.yaml", "--model", "base=runs/first", "--dry-run"]
    assert main([*benchmark, "benchmark.clips=data/citywalk/clips", "benchmark.size=[48,64]"]) == 2  # as the run
    assert "nothing would be measured" in capsys.readouterr().err
    readers = "benchmark.estimators={flow: {kind: flow_pnp}}"
    assert main([*benchmark, "benchmark.clips=data/citywalk/clips", "benchmark.size=[48,64]", readers]) == 0

    weights = machine / HPSV3.folder / "HPSv3.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    capsys.readouterr()
    assert geoalign("doctor") == 1
    assert "[!] HPSv3 weights" in capsys.readouterr().out


def test_the_presets_look_where_the_table_and_the_docs_say() -> None:
    """Every path of a preset lies in the folder of a row, and every row stands in the docs with all that it says."""
    folders = [row.folder for row in (*WEIGHTS, *OTHERS, *DATA)]
    for preset in sorted((ROOT / "configs").glob("*.yaml")):
        for path in _paths(yaml.safe_load(preset.read_text())):
            assert any(path == folder or path.startswith(f"{folder}/") for folder in folders), (preset.name, path)
    page = (ROOT / "docs" / "real-weights.md").read_text("utf-8")
    for row in (*WEIGHTS, *OTHERS, *DATA):
        for part in (row.title, row.licence, f"{row.gigabytes:g} GB", f"`{row.folder}`", row.line()):
            assert part in page, part
    elsewhere = "".join((ROOT / "docs" / name).read_text("utf-8") for name in ("rewards.md", "checkpoints.md"))
    for row in (MAPANYTHING, VIDEOALIGN, HPSV3, HPSV3_TOKENIZER):
        assert row.line() in elsewhere


def _paths(value: object) -> list[str]:
    if isinstance(value, dict):
        return [path for part in value.values() for path in _paths(part)]
    return [value] if isinstance(value, str) and value.startswith(("weights/", "data/davis")) else []

"""Files that ask for too much, are no files, or name what is not theirs."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import CASES, classify
from safetensors.torch import save_file

from geoalign.cli import main as cli
from geoalign.config.data import DataConfig, TrajectoriesConfig
from geoalign.config.load import load_config
from geoalign.config.model import ModelConfig
from geoalign.config.schema import Config
from geoalign.config.world import WorldConfig
from geoalign.data.omniworld import load_scene
from geoalign.data.tables import read_table
from geoalign.data.tally import Tally
from geoalign.errors import CheckpointError, ConfigError, DataError
from geoalign.files.arrays import read_arrays
from geoalign.files.parsing import parse_json
from geoalign.files.weights import TensorFile
from geoalign.geometry.cameras.door import open_camera
from geoalign.policy.files import read_policy_file
from geoalign.world.dataset import write_world


def test_no_single_flipped_bit_of_an_archive_changes_a_pose(tmp_path: Path) -> None:
    case = CASES["camera archive"]
    case.make(tmp_path)
    file = next(tmp_path.iterdir())
    sound, truth, rng = file.read_bytes(), case.read(tmp_path), np.random.default_rng(3)
    for _ in range(150):
        flipped = bytearray(sound)
        flipped[int(rng.integers(0, len(sound)))] ^= 1 << int(rng.integers(0, 8))
        file.write_bytes(flipped)
        with contextlib.suppress(DataError):
            assert case.read(tmp_path) == truth  # a time stamp in the header is no content


def _zip_of_zeros(path: Path, size: int) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (size,)})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("c2w.npy", "w") as member:
        member.write(header.getvalue())
        for _ in range(size >> 20):
            member.write(bytes(1 << 20))


def test_an_npz_of_a_gigabyte_of_zeros_is_not_inflated(tmp_path: Path) -> None:
    _zip_of_zeros(tmp_path / "camera.npz", 1 << 30)
    outcome, said = classify(lambda: bool(open_camera(tmp_path / "camera.npz")))
    assert outcome == "clear_error" and "are read here" in said


@pytest.mark.parametrize("shape", ["(1099511627776,)", "(-1, -1000)", "(True,)", "(3.5,)"])
def test_a_header_of_an_array_is_compared_with_its_bytes(shape: str, tmp_path: Path) -> None:
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    text = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(64)
    (tmp_path / "a.npy").write_bytes(text)
    with pytest.raises(DataError, match=r"a\.npy"):
        read_arrays(tmp_path / "a.npy", DataError)


@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_are_what_numpy_reads(order: str, tmp_path: Path) -> None:
    values = np.asarray(np.arange(24.0).reshape(2, 3, 4), order=order)
    np.savez(tmp_path / "a.npz", x=values, text=np.array(["é", "b"]), scalar=np.array(3))
    found = read_arrays(tmp_path / "a.npz", DataError)
    with np.load(tmp_path / "a.npz") as expected:
        assert isinstance(found, dict) and found.keys() == set(expected.files)
        assert all(np.array_equal(found[name], expected[name]) for name in found)


def test_an_archive_that_inflates_without_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "0123456789ab_others.tar.gz"
    with gzip.open(path, "wb") as stream:
        entry = tarfile.TarInfo("split_info.json")
        entry.size = 1 << 29
        stream.write(entry.tobuf())
        for _ in range(512):
            stream.write(bytes(1 << 20))
    tally = Tally("camera paths")
    assert classify(lambda: not load_scene(path, 4, TrajectoriesConfig(), tally)) == ("accepted_rightly", "")
    assert "unreadable archive" in tally.summary()


@pytest.mark.parametrize(
    ("text", "said"),
    [('{"a": {"b": 1, "b": 2}}', "'b' is there twice"), ("9" * 400, "an integer of 400 digits"),
     ('[-' + "9" * 5000 + "]", "digits"), ('{"a": 1,}', "not valid JSON")],
)  # fmt: skip
def test_json_that_would_be_read_as_something_else_is_refused(text: str, said: str) -> None:
    with pytest.raises(DataError, match=f"^here: .*{said}"):
        parse_json(text, "here")
    assert parse_json('{"a": [1, {"a": 12345678901234567890}]}', "here") == {"a": [1, {"a": 12345678901234567890}]}


@pytest.mark.parametrize("command", [["--version"], ["no-such-verb"]])
def test_a_full_disk_behind_the_output_is_one_line_and_an_exit_code(command: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "geoalign", *command], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
        lost = subprocess.run([sys.executable, "-m", "geoalign", *command], stdout=full, stderr=full, check=False)
    assert done.returncode == lost.returncode == (1 if command == ["--version"] else 2)
    (line,) = done.stderr.splitlines()
    assert "No space left on device; free disk space" in line or "no such verb" in line


def test_pipes_and_devices_are_refused(tmp_path: Path) -> None:
    for name in ("camera.npz", "table.csv", "weights.safetensors", "x_others.tar.gz"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match="not a regular file"):
        open_camera(tmp_path / "camera.npz")
    with pytest.raises(DataError, match="not a regular file"):
        read_table(tmp_path / "table.csv")
    with pytest.raises(CheckpointError):
        TensorFile(tmp_path / "weights.safetensors")
    assert load_scene(tmp_path / "x_others.tar.gz", 4, TrajectoriesConfig(), tally := Tally("camera paths")) == []
    assert "unreadable archive" in tally.summary()
    with pytest.raises(ConfigError):
        load_config(Config, "/dev/zero")


def test_a_header_that_asks_for_a_billion_layers_is_refused(tmp_path: Path) -> None:
    settings = json.loads(ModelConfig().model_dump_json()) | {"layers": 10**9}
    metadata = {"kind": "geoalign-policy", "model": json.dumps(settings), "codec": "{}", "notes": "{}"}
    save_file({"model.a": torch.ones(1)}, tmp_path / "p.safetensors", metadata)
    outcome, said = classify(lambda: bool(read_policy_file(tmp_path / "p.safetensors")))
    assert outcome == "clear_error" and "layers" in said


@pytest.mark.parametrize("name", ["../{v}", "{absolute}", "clips/files/../../../{v}", "link/metadata.csv", "photo.jpg"])
def test_a_stamp_cannot_make_the_world_delete_what_is_not_its_own(name: str, tmp_path: Path) -> None:
    root, victim = tmp_path / "data", tmp_path / "files" / "drone00000" / "drone00000_0000000_0000005.mp4"
    root.mkdir()
    victim.parent.mkdir(parents=True)
    (tmp_path / "metadata.csv").write_text("mine")
    victim.write_text("mine")
    (root / "photo.jpg").write_text("mine")
    (root / "link").symlink_to(tmp_path)
    listed = name.format(v=victim.relative_to(tmp_path), absolute=victim)
    (root / "world.json").write_text(json.dumps({"fingerprint": "x", "files": [listed]}))
    with pytest.raises(DataError, match="nothing was deleted"):
        write_world(DataConfig(root=root), WorldConfig(clips=1, trajectories=1))
    assert victim.read_text() == (tmp_path / "metadata.csv").read_text() == (root / "photo.jpg").read_text() == "mine"


def test_an_unexpected_exception_is_one_line_that_names_the_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("nobody thought of this")

    monkeypatch.setattr(cli, "_dispatch", broken)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert cli.main(["doctor"]) == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "KeyError" in said
    (file,) = tmp_path.iterdir()
    assert str(file) in said and "in broken" in file.read_text()
    monkeypatch.setenv("GEOALIGN_DEBUG", "1")
    with pytest.raises(KeyError):
        cli.main(["doctor"])


@pytest.mark.parametrize(
    "setting",
    ["optim.trainable='('", "optim.betas=[.nan,0.9]", "optim.betas=[0.9,1.5]", "eval.noise_seeds=[-1]",
     "model.layers=1e9",     "model.patch=[0,1,1]", "world.height_m=[12,8]", "world.seed=-1", "codec.patch=100000",
     "run.name=\"a\\0b\"",
     "optim.lr=!!timestamp x", "optim.lr=!!int x", "run.name=\x01"],
)  # fmt: skip
def test_settings_without_sense_are_refused_when_read(setting: str) -> None:
    with pytest.raises(ConfigError):
        load_config(Config, "smoke", [setting])


@pytest.mark.parametrize(
    "command",
    ["data trajectories --config smoke --count -5", "evaluate --config smoke --model x --condition-scale -1",
     "data trajectories --config smoke --plot paths.txt", "world render --config smoke --sheet sheet.txt",
     "export --model builtin:tiny_base --format redirector --out x.ckpt",
     "export --format lora --model x --out y --rank 0"],
)  # fmt: skip
def test_options_without_sense_are_refused_in_one_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command.split()) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.endswith(": loading")]
    assert len(lines) == 1 and lines[0].startswith("geoalign: error: ")

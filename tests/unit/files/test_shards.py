"""Which files of a folder are one model, checksums of what geoalign writes, and weights that are not finite."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from geoalign.errors import CheckpointError
from geoalign.files import sealed
from geoalign.files.weights import TensorFile

STATE = {f"blocks.{k}.weight": torch.full((2, 3), float(k + 1)) for k in range(6)}
NAME = "diffusion_pytorch_model"


def shards(folder: Path, count: int, *, scale: float = 1.0, index: bool = True, stem: str = NAME) -> None:
    names, where = sorted(STATE), {}
    for k in range(count):
        file = f"{stem}-{k + 1:05d}-of-{count:05d}.safetensors"
        part = {name: STATE[name] * scale for name in names[k::count]}
        save_file(part, folder / file)
        where |= dict.fromkeys(part, file)
    if index:
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def assert_loads(folder: Path) -> None:
    found = dict(TensorFile(folder).items())
    assert found.keys() == STATE.keys() and all(torch.equal(found[name], STATE[name]) for name in STATE)


@pytest.mark.parametrize("index", [True, False])
def test_shards_are_one_model(index: bool, tmp_path: Path) -> None:
    shards(tmp_path, 3, index=index)
    assert_loads(tmp_path)


def test_the_index_decides_between_two_sets(tmp_path: Path) -> None:
    shards(tmp_path, 5, scale=2.0, index=False)
    shards(tmp_path, 3)
    assert_loads(tmp_path)


@pytest.mark.parametrize("stem", [NAME, "model", "anything"])
@pytest.mark.parametrize("variant", ["fp16", "ema", "non_ema"])
def test_a_variant_beside_is_no_error(variant: str, stem: str, tmp_path: Path) -> None:
    save_file(STATE, tmp_path / f"{stem}.safetensors")
    save_file({name: value * 2 for name, value in STATE.items()}, tmp_path / f"{stem}.{variant}.safetensors")
    shards(tmp_path, 2, scale=3.0, index=False, stem=f"{stem}.{variant}")
    (tmp_path / f"._{stem}.safetensors").write_bytes(b"what a Mac leaves")
    assert_loads(tmp_path)


@pytest.mark.parametrize("index", [True, False])
def test_a_missing_shard_is_named_as_a_file(index: bool, tmp_path: Path) -> None:
    shards(tmp_path, 3, index=index)
    (tmp_path / f"{NAME}-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=rf"{NAME}-00002-of-00003\.safetensors: is missing"):
        TensorFile(tmp_path)


def test_folders_that_are_no_one_model_say_why(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / f"{NAME}.bin")
    with pytest.raises(CheckpointError, match=rf"no \.safetensors file but {NAME}\.bin; convert"):
        TensorFile(tmp_path)
    shards(tmp_path, 2, index=False)
    shards(tmp_path, 3, index=False)
    with pytest.raises(CheckpointError, match="several sets \\(of 2 and of 3\\)"):
        TensorFile(tmp_path)


def test_a_codec_beside_pickled_weights_is_not_taken_for_the_model(tmp_path: Path) -> None:
    (tmp_path / "models_t5_umt5-xxl-enc-bf16.pth").touch()
    save_file(STATE, tmp_path / "codec.safetensors")
    assert set(TensorFile(tmp_path).shapes) == set(STATE)
    torch.save(STATE, tmp_path / f"{NAME}-00001-of-00002.bin")
    with pytest.raises(
        CheckpointError, match=rf"holds no .safetensors file of the model but {NAME}-00001-of-00002.bin"
    ):
        TensorFile(tmp_path)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/x.safetensors", "x.bin", 5])
def test_an_index_cannot_name_other_files(name: object, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="no safetensors file of this folder"):
        TensorFile(tmp_path)


def test_a_shard_of_another_index_is_refused(tmp_path: Path) -> None:
    shards(tmp_path, 2)
    save_file({"stranger": torch.ones(1)}, tmp_path / f"{NAME}-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="differs from the index"):
        TensorFile(tmp_path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_refused(suffix: str, value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    state = {"a": torch.ones(3, dtype=dtype), "b": torch.tensor([1.0, value], dtype=dtype)}
    path = tmp_path / f"x{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"b holds 1 numbers that are NaN or infinite \(of 2\)"):
        dict(TensorFile(path).items())


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_one_flipped_bit_of_a_sealed_file_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    tensors: dict[str, Tensor] = {"a": torch.arange(6.0), "b": torch.ones((), dtype=torch.int64), "c": torch.ones(0)}
    sealed.save_sealed(tensors, path, {"kind": "toy"})
    assert TensorFile(path).sealed and all(torch.equal(v, tensors[n]) for n, v in TensorFile(path).items())
    size = path.stat().st_size
    for place in [*range(8, size - 32, 7), *range(size - 32, size)]:
        flip(path, place)
        with pytest.raises(CheckpointError):
            dict(TensorFile(path).items())
        flip(path, place)
    flip(path, size - 30)
    monkeypatch.setenv("GEOALIGN_SKIP_CHECKSUMS", "1")
    assert len(dict(TensorFile(path).items())) == 3


def test_a_file_without_checksums_is_noticed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealed, "_noticed", set())
    with pytest.warns(UserWarning, match="a: written without checksums"):
        sealed.notice_unsealed("a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sealed.notice_unsealed("b")


def test_the_builtin_policy_is_sealed() -> None:
    path = Path(sealed.__file__).parents[1] / "_assets" / "tiny_base.safetensors"
    with safe_open(path, framework="pt") as file:
        assert sealed.is_sealed(file.metadata())


def test_equal_contents_give_equal_files(tmp_path: Path) -> None:
    """safetensors lists metadata in another order every time; eight tries of three names miss that once in 6^7."""
    tensors, header = {"b": torch.ones(3), "a": torch.arange(5)}, {"kind": "é", "notes": "{}", "codec": "\x01\t/"}
    written = set()
    for _ in range(8):
        sealed.save_sealed(tensors, tmp_path / "a.safetensors", header)
        written.add((tmp_path / "a.safetensors").read_bytes())
    assert len(written) == 1 and written == {sealed.sealed_bytes(tensors, header)}
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert header.items() <= file.metadata().items() and torch.equal(file.get_tensor("a"), tensors["a"])

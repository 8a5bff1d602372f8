"""The one comparison of tensors, and the one reader of weight files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from geoalign.errors import CheckpointError
from geoalign.files.weights import TensorFile, require, shapes_of

WANTED = {"a.weight": (2, 3), "a.bias": (2,), "b": (), "c": (1,), "d": (1,)}


def test_exactly_the_wanted_names_and_shapes_pass() -> None:
    require("x", {**WANTED}, WANTED, "does not fit")
    require("x", {}, {}, "does not fit")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"b": None}, "x does not fit: 1 missing: b."),
        ({"e": (4,)}, "x does not fit: 1 unexpected: e."),
        ({"b": (1,)}, "x does not fit: 1 of another shape: b [1] (expected [])."),
        ({"a.weight": (3, 2)}, "x does not fit: 1 of another shape: a.weight [3, 2] (expected [2, 3])."),
        (dict.fromkeys(WANTED), "x does not fit: 5 missing: a.weight, a.bias, b and 2 more."),
        (
            {"b": None, "e": (4,), "c": (2,)},
            "x does not fit: 1 missing: b; 1 unexpected: e; 1 of another shape: c [2] (expected [1]).",
        ),
        (
            {"a.bias": None, "a.biases": (2,)},
            "x does not fit: 1 missing: a.bias; 1 unexpected: a.biases; a.bias may have been renamed to a.biases.",
        ),
    ],
)
def test_a_mismatch_counts_and_names_what_differs(change: dict[str, tuple[int, ...] | None], said: str) -> None:
    found = {name: shape for name, shape in (WANTED | change).items() if shape is not None}
    with pytest.raises(CheckpointError) as caught:
        require("x", found, WANTED, "does not fit")
    assert str(caught.value) == said
    with pytest.raises(CheckpointError, match=rf"\. {len(found)} tensors were found\.$"):
        require("x", found, WANTED, "does not fit", lambda shapes: f"{len(shapes)} tensors were found.")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_is_a_mapping_with_other_names_if_wished(tmp_path: Path, suffix: str) -> None:
    state = {"net.a": torch.randn(2, 3), "net.b": torch.ones(4, dtype=torch.bfloat16), "rest": torch.zeros(())}
    path = tmp_path / f"model{suffix}"
    save_file(state, path, {"kind": "toy"}) if suffix == ".safetensors" else torch.save(state, path)
    file = TensorFile(path)
    assert file.shapes == shapes_of(state) == {"net.a": (2, 3), "net.b": (4,), "rest": ()}
    assert file.metadata == ({"kind": "toy"} if suffix == ".safetensors" else {})
    read = dict(file.items())
    assert read.keys() == state.keys() and all(torch.equal(read[name], state[name]) for name in state)
    part = file.part("net.").renamed({"a": "x", "b": "y"}.get)
    assert part.shapes == {"x": (2, 3), "y": (4,)} and torch.equal(dict(part.items())["y"], state["net.b"])
    assert part.require({"x": (2, 3), "y": (4,)}, "does not fit") is part
    with pytest.raises(CheckpointError, match="one tensor under two names"):
        file.renamed(lambda _: "same")


def test_shards_that_repeat_a_tensor_are_refused(tmp_path: Path) -> None:
    for number in (1, 2):
        save_file({"a": torch.ones(1)}, tmp_path / f"diffusion_pytorch_model-{number}.safetensors")
    with pytest.raises(CheckpointError, match=r"a is also in another file of .*; mixed shards"):
        TensorFile(tmp_path)


def test_types_that_are_no_floats_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1), "b": torch.ones(1, dtype=torch.float64)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"1 tensors are not float32.*first b \(F64\)"):
        TensorFile(tmp_path / "x.safetensors").require({"a": (1,), "b": (1,)}, "does not fit")

"""The pose-only MapAnything network: numbers of the published code, and exact sizes."""

from __future__ import annotations

import json
import zlib

import numpy as np
import pytest
import torch
from repository import GOLDEN
from torch import Tensor

from geoalign.errors import UsageError
from geoalign.evaluators.mapanything.layout import LAYOUTS, PoseNetworkLayout
from geoalign.evaluators.mapanything.network import PoseNetwork, RawPoses

FOLDER = GOLDEN / "mapanything"
TINY = ("tiny_v1_1", "tiny_v1_1_swiglu", "tiny_v1")
SMALL = PoseNetworkLayout(48, 1, 2, "swiglu", False, 48, 2, 2, "swiglu", True, True)


def golden(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text())


def generator(name: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))


def filled(name: str, shape: torch.Size) -> Tensor:
    """A weight by the golden files' rule: a pure function of its name and shape."""
    z = generator(name).standard_normal(tuple(shape)).astype(np.float32)
    if name.endswith(".bias"):
        return torch.from_numpy(np.float32(0.02) * z)
    if name.endswith(".gamma") or (len(shape) == 1 and name.endswith(".weight")):
        return torch.from_numpy(np.float32(1) + np.float32(0.1) * z)
    return torch.from_numpy(np.float32(0.02) * z)


def golden_network(record: dict) -> PoseNetwork:
    with torch.device("meta"):
        network = PoseNetwork(PoseNetworkLayout(**record["layout"]))
    table = "info_sharing.view_pos_table"
    state = {name: filled(name, tensor.shape) for name, tensor in network.state_dict().items() if name != table}
    # The table is a constant of the published code, 0 1 0 1 ...: row 0 of interleaved sines and cosines.
    width = record["layout"]["trunk_width"]
    state[table] = torch.tensor([[0.0, 1.0] * (width // 2)])
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False)


def golden_images(record: dict) -> Tensor:
    rule = record["input_rule"]
    shape = (rule["scenes"], rule["views"], 3, rule["height"], rule["width"])
    unit = torch.from_numpy(generator("input").random(shape).astype(np.float32))
    return (unit - torch.tensor(rule["mean"]).view(3, 1, 1)) / torch.tensor(rule["std"]).view(3, 1, 1)


@pytest.mark.parametrize("name", TINY)
def test_poses_equal_the_published_code(name: str) -> None:
    record = golden(name)
    for weight, check in record["weight_checks"].items():  # the fill rule itself, before anything is built on it
        assert filled(weight, torch.Size(check["shape"])).flatten()[:8].tolist() == check["first8"]
    network = golden_network(record)
    assert sum(p.numel() for p in network.parameters()) == record["pose_path_parameters"]
    assert len(network.state_dict()) == record["pose_path_keys"]
    images = golden_images(record)
    poses = network.set_size(*images.shape[-2:])(images)
    for value, key in zip(poses, ("cam_trans", "cam_quats", "metric_scaling_factor"), strict=True):
        # float32 and float64 reruns agree within 9e-7; the smallest slip (tanh GELU) moves quaternions by 1e-4.
        torch.testing.assert_close(value, torch.tensor(record["outputs"][key]), rtol=0, atol=1e-5)

    # A scene does not see its batch, and views after the first are an unordered set.
    alone = network(images[1:])
    torch.testing.assert_close(alone.translation, poses.translation[1:], rtol=0, atol=1e-6)
    order = [0, 3, 1, 4, 2]
    shuffled = network(images[:, order])
    torch.testing.assert_close(shuffled.translation, poses.translation[:, order], rtol=0, atol=1e-6)
    torch.testing.assert_close(shuffled.scale, poses.scale, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("layout", "file"), [("v1.1", "full_v1_1_keys"), ("v1", "full_v1_keys")])
def test_full_size_names_shapes_and_exact_totals(layout: str, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    published = golden(file)
    with torch.device("meta"):
        network = PoseNetwork(LAYOUTS[layout])
    total = sum(p.numel() for p in network.parameters())
    with capsys.disabled():
        print(f"\nMapAnything {layout}, pose path: {total} parameters in {len(network.state_dict())} tensors")
    assert total == published["totals"]["parameters_pose_path"]
    assert sum(b.numel() for b in network.buffers()) == published["totals"]["buffer_elements"]
    by_module = {name: sum(p.numel() for p in child.parameters()) for name, child in network.named_children()}
    by_module["scale_token"] = network.scale_token.numel()
    stored = published["totals"]["parameters_by_top_module"]
    assert by_module == {name: stored[name] for name in by_module}
    expected = {
        name.replace("*", str(index)): tuple(entry["shape"])
        for name, entry in published["pose_keys"].items()
        for index in range(entry["count"])
    }
    assert {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} == expected


def test_bfloat16_weights_do_what_autocast_does() -> None:
    record = golden("tiny_v1")
    images = golden_images(record)[:, :3]
    network = golden_network(record).set_size(*images.shape[-2:])
    exact = network(images)
    with torch.autocast("cpu", torch.bfloat16):
        features = network.encoder.model(images.flatten(0, 1), network.position_table)
    stored = golden_network(record).set_size(*images.shape[-2:]).use_matrix_dtype(torch.bfloat16)
    dtypes = {name: p.dtype for name, p in stored.named_parameters()}
    assert dtypes["encoder.model.blocks.0.mlp.fc1.weight"] == dtypes["info_sharing.proj_embed.weight"] == torch.bfloat16
    assert dtypes["encoder.model.blocks.0.norm1.weight"] == dtypes["pose_head.proj.weight"] == torch.float32
    # Same roundings in the same places. CPU kernels may still sum a bf16 product in another order: two bf16 ulps at 4.
    ours = stored.encoder.model(images.flatten(0, 1), stored.position_table)
    torch.testing.assert_close(ours, features.float(), rtol=0, atol=2 * 4 * 2**-8)
    poses = stored(images)
    assert all(value.dtype == torch.float32 for value in poses)
    # bf16 keeps 8 bits: poses of this size (0.03) move by a few 2^-8 of themselves.
    assert (poses.translation - exact.translation).abs().max() < 0.1 * exact.translation.abs().max()


def test_position_table_is_the_trained_one_at_the_trained_size_and_refuses_others() -> None:
    network = PoseNetwork(SMALL)
    torch.nn.init.normal_(network.encoder.model.pos_embed)
    network.set_size(518, 518)
    assert torch.equal(network.position_table, network.encoder.model.pos_embed)
    with pytest.raises(UsageError, match="multiple of the patch size"):
        network.set_size(518, 300)
    with pytest.raises(UsageError, match="set to another size than 28 x 42"):
        network(torch.zeros(1, 2, 3, 28, 42))


def test_scale_multiplies_translations_and_is_bounded_below() -> None:
    torch.manual_seed(0)
    network = PoseNetwork(SMALL).requires_grad_(False).set_size(294, 518)
    images = torch.randn(1, 2, 3, 294, 518, generator=torch.Generator().manual_seed(2))
    before = network(images)
    with torch.no_grad():
        network.scale_head.output_proj.bias += np.log(2.0)
    after = network(images)
    assert isinstance(after, RawPoses)
    torch.testing.assert_close(after.scale, 2 * before.scale)
    torch.testing.assert_close(after.translation, 2 * before.translation)
    with torch.no_grad():
        network.scale_head.output_proj.bias.fill_(-1e4)
    assert network(images).scale.item() == pytest.approx(1e-8)

"""MapAnything as an evaluator: strict loading, frame subsets, batching, failures, the published package."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from repository import GOLDEN
from safetensors.torch import save_file
from torch import Tensor

from geoalign.errors import CheckpointError, RewardError, UsageError
from geoalign.evaluators.base import PoseEvaluator
from geoalign.evaluators.mapanything import evaluator as module
from geoalign.evaluators.mapanything.checkpoint import SKIPPED_MODULES, load_layout, load_pose_network
from geoalign.evaluators.mapanything.evaluator import MapAnythingEvaluator, coherent_share, frame_subset
from geoalign.evaluators.mapanything.layout import LAYOUTS, PoseNetworkLayout
from geoalign.evaluators.mapanything.network import PoseNetwork, RawPoses
from geoalign.evaluators.mapanything.published import PublishedBackend
from geoalign.frozen.precision import exact_float32
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.rewards.geometry import GeometryReward
from geoalign.types import RetakeBatch, SourceClip

FOLDER = GOLDEN / "mapanything"
SMALL = PoseNetworkLayout(48, 2, 2, "swiglu", False, 48, 2, 2, "swiglu", True, True)
SMALL_V1 = PoseNetworkLayout(48, 2, 2, "gelu", True, 32, 2, 2, "gelu", False, False)


def published_file(layout: PoseNetworkLayout, names_from: str) -> dict[str, Tensor]:
    """A small checkpoint in the published key layout: our tensors, and every other published name as one number."""
    torch.manual_seed(0)
    other = json.loads((FOLDER / f"{names_from}_keys.json").read_text())["other_keys"]
    state = {name: tensor.clone() for name, tensor in PoseNetwork(layout).state_dict().items()}
    return {**state, **{name: torch.ones(1) for name in other}}


@pytest.mark.parametrize(("layout", "names"), [(SMALL, "full_v1_1"), (SMALL_V1, "full_v1")])
def test_loads_the_published_key_layout(tmp_path: Path, layout: PoseNetworkLayout, names: str) -> None:
    state = published_file(layout, names)
    save_file(state, tmp_path / "model.safetensors")
    network = load_layout(tmp_path / "model.safetensors", layout, device="cpu", matrix_dtype=torch.float32)
    loaded = network.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.items())
    assert set(state) - set(loaded) == {name for name in state if name.split(".")[0] in SKIPPED_MODULES}
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    half = load_layout(tmp_path / "model.safetensors", layout, device="cpu", matrix_dtype=torch.bfloat16)
    matrix = "info_sharing.self_attention_blocks.0.attn.qkv.weight"
    assert torch.equal(half.state_dict()[matrix], state[matrix].bfloat16())
    assert half.pose_head.proj.weight.dtype == torch.float32


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_skip_list_covers_every_published_name_and_no_more(layout: str) -> None:
    published = json.loads((FOLDER / f"full_{layout.replace('.', '_')}_keys.json").read_text())
    assert {name.split(".")[0] for name in published["other_keys"]} == set(SKIPPED_MODULES)
    assert not {pattern.split(".")[0] for pattern in published["pose_keys"]} & set(SKIPPED_MODULES)


def test_strict_loading_names_what_is_wrong(tmp_path: Path) -> None:
    state = published_file(SMALL, "full_v1_1")
    path = tmp_path / "model.safetensors"

    def message(changed: dict[str, Tensor]) -> str:
        save_file(changed, path)
        with pytest.raises(CheckpointError) as caught:
            load_layout(path, SMALL, device="cpu", matrix_dtype=torch.float32)
        return str(caught.value)

    key = "pose_head.fc_t.bias"
    less = {name: tensor for name, tensor in state.items() if name != key}
    assert f"1 missing: {key}" in message(less)
    assert "1 unexpected: pose_head.extra" in message({**state, "pose_head.extra": torch.ones(1)})
    renamed = message({**less, "pose_head.fc_trans.bias": state[key]})
    assert f"{key} may have been renamed to pose_head.fc_trans.bias" in renamed
    assert f"1 of another shape: {key} [4] (expected [3])" in message({**state, key: torch.zeros(4)})
    assert "encoder width is that of layout 'v1'" in message({**state, "scale_token": torch.zeros(1024)})
    path.write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match="delete it and download it again"):
        load_layout(path, SMALL, device="cpu", matrix_dtype=torch.float32)


def test_missing_weights_give_the_download_command(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"hf download facebook/map-anything-apache model\.safetensors"):
        load_pose_network(tmp_path, "v1.1")
    with pytest.raises(RewardError, match=r"facebook/map-anything-apache-v1 .* --local-dir"):
        load_pose_network(tmp_path / "weights" / "model.safetensors", "v1")
    with pytest.raises(UsageError, match=r"known: v1\.1, v1"):
        load_pose_network(tmp_path, "v2")
    (tmp_path / "model.pth").touch()
    with pytest.raises(CheckpointError, match=r"only \.safetensors"):
        load_pose_network(tmp_path / "model.pth", "v1")


class BrightnessPoses:
    """A stand-in network whose poses are closed forms of the pixels, in a world frame that is not frame 0's."""

    patch = 14

    def __init__(self) -> None:
        self.batches: list[tuple[int, ...]] = []

    def __call__(self, images: Tensor) -> RawPoses:
        self.batches.append(tuple(images.shape[:2]))
        x = images[:, :, 0].mean(dim=(2, 3))
        zero = torch.zeros_like(x)
        quaternion = torch.stack([zero, zero, torch.ones_like(x), zero], dim=-1)  # half a turn about z
        return RawPoses(torch.stack([x, zero + 5, zero], dim=-1), quaternion, torch.full((len(x), 1), 2.0))


def clip(video: Tensor) -> SourceClip:
    batch, frames = video.shape[:2]
    poses = torch.eye(4).repeat(batch, frames, 1, 1)
    return SourceClip(video, CameraTrajectory.build(poses), None, tuple(f"clip{i}" for i in range(batch)))


def moving_video(batch: int = 3, frames: int = 5, height: int = 42, width: int = 42) -> Tensor:
    """A bright disc that drifts right, on a ramp; its brightness grows with the frame."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    frame = torch.arange(frames).view(1, -1, 1, 1) / frames
    phase = torch.arange(batch).view(-1, 1, 1, 1) / batch
    disc = torch.exp(-8 * ((x - 0.3 * frame) ** 2 + (y - phase + 0.5) ** 2))
    return (0.5 * disc + 0.3 * x + 0.2 * frame - 0.3).unsqueeze(2).expand(-1, -1, 3, -1, -1).clamp(-1, 1).contiguous()


def test_frame_subset() -> None:
    assert frame_subset(81, 1) == tuple(range(81))
    assert frame_subset(81, 4) == tuple(range(0, 81, 4))  # one per latent frame of a 4x temporal codec
    assert frame_subset(10, 4) == (0, 4, 8, 9)
    for frames, stride in ((1, 1), (5, 0)):
        with pytest.raises(UsageError):
            frame_subset(frames, stride)


def test_evaluator_rebases_subsets_and_batches() -> None:
    video = moving_video()
    network = BrightnessPoses()
    evaluate = MapAnythingEvaluator(network, frame_stride=2, scenes_per_forward=2)
    assert isinstance(evaluate, PoseEvaluator)
    estimate = evaluate(video, clip(video))
    assert network.batches == [(2, 3), (1, 3)]
    assert estimate.frame_indices.tolist() == [0, 2, 4]
    assert torch.equal(estimate.c2w[:, 0], torch.eye(4).expand(3, 4, 4))
    # Half a turn about z flips x: brighter frames lie at smaller x in the axes of frame 0.
    assert (estimate.c2w[:, 1:, 0, 3] < 0).all() and (estimate.c2w[:, 2, 0, 3] < estimate.c2w[:, 1, 0, 3]).all()
    assert estimate.c2w[:, :, 1:3, 3].abs().max() == 0
    torch.testing.assert_close(estimate.c2w[..., :3, :3], torch.eye(3).expand(3, 3, 3, 3))
    assert estimate.tracked.tolist() == [1, 1, 1] and estimate.residual.tolist() == [0, 0, 0]
    assert estimate.diagnostics["metric_scale"].tolist() == [2, 2, 2]
    assert (estimate.diagnostics["reference_offset_m"] >= 5).all()
    # Larger calls and one clip at a time agree, so the micro-batch is no setting of the algorithm.
    whole = MapAnythingEvaluator(BrightnessPoses(), frame_stride=2, scenes_per_forward=3)(video, clip(video))
    assert torch.equal(whole.c2w, estimate.c2w)


def test_a_broken_video_harms_only_itself() -> None:
    video = moving_video()
    evaluate = MapAnythingEvaluator(BrightnessPoses(), scenes_per_forward=3)
    whole = evaluate(video, clip(video))
    broken = video.clone()
    broken[1, 2, 0, 3, 4] = torch.nan
    estimate = evaluate(broken, clip(video))
    assert torch.isnan(estimate.c2w[1]).all()
    assert torch.equal(estimate.c2w[[0, 2]], whole.c2w[[0, 2]])


def test_a_video_without_a_number_in_it_is_invalid() -> None:
    video = moving_video()
    video[1] = torch.nan
    target = CameraTrajectory.build(torch.eye(4).repeat(*video.shape[:2], 1, 1))
    output = GeometryReward(MapAnythingEvaluator(BrightnessPoses()))(video, RetakeBatch(clip(video), target, ("",) * 3))
    assert output.valid.tolist() == [True, False, True]


def test_coherent_share_tells_video_from_noise_and_black() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (1, 6, 3, 294, 518), generator=generator).float()
    blobs = torch.nn.functional.interpolate(noise[0, :, :, ::7, ::7], size=(294, 518), mode="bicubic")[None]
    black = torch.randint(0, 3, (1, 6, 3, 294, 518), generator=generator).float()  # black with codec noise
    video = ((moving_video(1, 6, 294, 518) + 1) * 127.5).round()
    still = noise[:, :1].expand(-1, 6, -1, -1, -1)
    shares = [coherent_share(x).item() for x in (noise, blobs, black, video, still)]
    assert shares == [0, 0, 0, 1, 1]
    cut = torch.cat([video[:, :3], blobs[:, :3]], dim=1)
    assert coherent_share(cut).item() == pytest.approx(2 / 5)


def test_native_network_runs_through_the_evaluator() -> None:
    torch.manual_seed(0)
    network = PoseNetwork(SMALL).eval().requires_grad_(False)
    video = moving_video(2, 3, 30, 52)
    estimate = MapAnythingEvaluator(network)(video, clip(video))
    assert estimate.c2w.shape == (2, 3, 4, 4) and torch.isfinite(estimate.c2w).all()
    rotation = estimate.c2w[..., :3, :3]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).expand_as(rotation), rtol=0, atol=1e-6)
    # Another frame size sets the network anew.
    small = moving_video(1, 3, 40, 40)
    assert MapAnythingEvaluator(network)(small, clip(small)).c2w.shape == (1, 3, 4, 4)


def test_exact_float32_overrides_and_restores_tf32() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with exact_float32():
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            assert torch.backends.cudnn.conv.fp32_precision == "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_build_evaluator_from_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geoalign.evaluators.mapanything.checkpoint.LAYOUTS", {"v1.1": SMALL})
    save_file(published_file(SMALL, "full_v1_1"), tmp_path / "model.safetensors")
    evaluate = module.build_evaluator(str(tmp_path), device="cpu", frame_stride=2)
    assert isinstance(evaluate.network, PoseNetwork)
    assert evaluate.network.encoder.model.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    with pytest.raises(UsageError, match="bfloat16, float32"):
        module.build_evaluator(str(tmp_path), dtype="int8")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="scenes_per_forward"):
        module.build_evaluator(str(tmp_path), device="cpu", scenes_per_forward=0)


def test_published_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mapanything", None)
    monkeypatch.setitem(sys.modules, "mapanything.models", None)
    with pytest.raises(RewardError, match=r"pip install .*map-anything"):
        module.build_evaluator("facebook/map-anything-apache", backend="published", device="cpu")

    seen: dict[str, object] = {}

    class Model(torch.nn.Module):
        @classmethod
        def from_pretrained(cls, name: str) -> Model:
            seen["name"] = name
            seen["encoder"] = torch.hub.load("facebookresearch/dinov2", "dinov2_vitg14", force_reload=False)
            return cls()

        def infer(self, views: list[dict], **options: object) -> list[dict]:
            seen["options"], seen["norm"] = options, views[0]["data_norm_type"]
            poses = BrightnessPoses()(torch.stack([view["img"] for view in views], dim=1))
            return [
                {"cam_trans": t, "cam_quats": q, "metric_scaling_factor": poses.scale}
                for t, q in zip(poses.translation.unbind(1), poses.quaternion.unbind(1), strict=True)
            ]

    backbones = types.SimpleNamespace(dinov2_vitg14=lambda **options: ("vendored", options))
    monkeypatch.setitem(sys.modules, "mapanything.models", types.SimpleNamespace(MapAnything=Model))
    monkeypatch.setitem(sys.modules, "mapanything.models.external.dinov2.hub.backbones", backbones)
    original = torch.hub.load
    evaluate = module.build_evaluator("facebook/map-anything-apache", backend="published", device="cpu")
    assert torch.hub.load is original
    assert seen["name"] == "facebook/map-anything-apache"
    assert seen["encoder"] == ("vendored", {"pretrained": False})  # no network, no pretrained weights
    video = moving_video()
    estimate = evaluate(video, clip(video))
    native = MapAnythingEvaluator(BrightnessPoses())(video, clip(video))
    assert torch.equal(estimate.c2w, native.c2w)
    assert seen["norm"] == ["dinov2"] and seen["options"]["use_amp"] is True  # type: ignore[index]
    PublishedBackend(Model(), dtype=torch.float32)(torch.zeros(1, 2, 3, 28, 28))
    assert seen["options"]["use_amp"] is False  # type: ignore[index]

"""The transformer against diffusers, and invariants of the joint source/target forward and of the camera phases."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from geoalign.config.model import ModelConfig
from geoalign.errors import UsageError
from geoalign.geometry import so3
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.models.camera import geometric_phases, scaled_poses
from geoalign.models.conditioning import Conditioning, Phases
from geoalign.models.dit import RetakeDiT, init_tiny_
from geoalign.models.layouts import original_names
from geoalign.models.rope import grid_angles
from geoalign_kernels import exact_only

WAN = ModelConfig(
    dim=96, heads=4, layers=2, ffn_dim=160, in_channels=16, out_channels=16, text_dim=24, text_length=512, freq_dim=64
)
IMAGE = WAN.model_copy(update={"in_channels": 36, "image_dim": 1280})
REDIRECTOR = WAN.model_copy(
    update={"in_channels": 32, "source": "frames", "camera": "learned", "pluecker_adapter": True, "space_stride": 2}
)
TINY = ModelConfig(
    dim=96, heads=4, layers=2, ffn_dim=160, in_channels=10, out_channels=10, patch=(1, 1, 1), text_dim=8, freq_dim=32,
    rope_theta=(21.5, 14.2), rope_scale=(1.2, 2.2), source="frames", first_frame_given=True, camera="geometric",
    time_stride=1, space_stride=16, data_variance=0.6,
)  # fmt: skip


def randomised(config: ModelConfig, seed: int = 0) -> RetakeDiT:
    """A model whose every parameter is random, gates and camera phases included."""
    torch.manual_seed(seed)
    model = RetakeDiT(config)
    for name, parameter in model.named_parameters():
        spread = 0.3 if "modulation" in name else 1 / math.sqrt(max(parameter[0].numel(), 2))
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data.normal_(centre, spread)
    return model.requires_grad_(False)


def cameras(batch: int, frames: int, seed: int = 3) -> CameraTrajectory:
    torch.manual_seed(seed)
    steps = torch.linspace(0, 1, frames)[None, :, None]
    c2w = so3.rigid(so3.exp(0.4 * torch.randn(batch, 1, 3) * steps), torch.randn(batch, 1, 3) * steps)
    return CameraTrajectory.build(c2w, (0.8, 1.1, 0.5, 0.5))


def redirector_condition(batch: int = 2) -> Conditioning:
    torch.manual_seed(1)
    return Conditioning(
        source_latents=torch.randn(batch, 16, 3, 6, 4), source_camera=cameras(batch, 9, 3),
        target_camera=cameras(batch, 9, 4), context=torch.randn(batch, 7, 24),
    )  # fmt: skip


def relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())


@pytest.mark.parametrize("config", [WAN, IMAGE], ids=["t2v", "i2v"])
def test_equals_diffusers(config: ModelConfig) -> None:
    """fp32 forward of a random model against WanTransformer3DModel; two orders of summation differ by under 1e-5."""
    from diffusers import WanTransformer3DModel

    ours = randomised(config)
    theirs = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=24, in_channels=config.in_channels,
        out_channels=16, text_dim=24, freq_dim=64, ffn_dim=160, num_layers=2, image_dim=config.image_dim,
        added_kv_proj_dim=96 if config.image_dim else None,
    )  # fmt: skip
    state, names = ours.state_dict(), original_names(config)
    theirs.load_state_dict({theirs_name: state[name] for theirs_name, name in names.items()}, strict=True)
    torch.manual_seed(2)
    x, context = torch.randn(2, config.in_channels, 3, 8, 6), torch.randn(2, 512, 24)
    image = torch.randn(2, 257, 1280) if config.image_dim else None
    for time in (12.0, 500.0, 904.0):
        t = torch.full((2,), time)
        with torch.no_grad():
            expected = theirs(x, t, context, encoder_hidden_states_image=image, return_dict=False)[0]
        assert relative(ours(x, t, Conditioning(context=context, image_tokens=image)), expected) < 1e-5


def test_joint_forward_without_camera_equals_diffusers_with_doubled_positions() -> None:
    """Zero adapter and zero phases: source joined on the frame axis, both halves on the same rotary positions."""
    from diffusers import WanTransformer3DModel

    ours = randomised(REDIRECTOR)
    for name, parameter in ours.named_parameters():
        if "control_adapter" in name or "rope_phase" in name:
            parameter.zero_()
    theirs = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=24, in_channels=32, out_channels=16,
        text_dim=24, freq_dim=64, ffn_dim=160, num_layers=2,
    )  # fmt: skip
    plain = REDIRECTOR.model_copy(update={"camera": "none", "pluecker_adapter": False})
    state = ours.state_dict()
    theirs.load_state_dict({k: state[v] for k, v in original_names(plain).items()}, strict=True)
    single = theirs.rope.forward

    def doubled(hidden: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.cat([part, part], 1) for part in single(hidden[:, :, : hidden.shape[2] // 2]))

    theirs.rope.forward = doubled
    cond, t = redirector_condition(), torch.tensor([900.0, 100.0])
    x = torch.randn(2, 16, 3, 6, 4)
    joined = torch.cat([torch.cat([x, cond.source_latents], 2), torch.zeros(2, 16, 6, 6, 4)], 1)
    with torch.no_grad():
        expected = theirs(joined, t, cond.context, return_dict=False)[0][:, :, :3]
    assert relative(ours(x, t, cond), expected) < 1e-5


def test_zero_phases_are_plain_attention_bit_for_bit() -> None:
    model = randomised(REDIRECTOR)
    for block in model.blocks:
        block.self_attn.rope_phase_qk[1].weight.zero_()
        block.self_attn.rope_phase_vo[1].weight.zero_()
    plain = RetakeDiT(REDIRECTOR.model_copy(update={"camera": "none"}))
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "rope_phase" not in k})
    cond, x, t = redirector_condition(), torch.randn(2, 16, 3, 6, 4), torch.tensor([900.0, 100.0])
    assert torch.equal(model(x, t, cond), plain(x, t, cond))


def test_exchanging_streams_exchanges_outputs() -> None:
    """No stream embedding: swapping (latents, cameras) of target and source gives the other half of the output."""
    model = randomised(REDIRECTOR)
    model.execution.prune_source = False
    halves: list[Tensor] = []
    model.blocks[-1].register_forward_hook(lambda module, args, output: halves.append(output.settled()))
    cond, x, t = redirector_condition(1), torch.randn(1, 16, 3, 6, 4), torch.tensor([700.0])
    swapped = Conditioning(x, cond.target_camera, cond.source_camera, context=cond.context)
    model(x, t, cond)
    model(cond.source_latents, t, swapped)
    target, source = halves[0].chunk(2, 1)
    assert relative(torch.cat([source, target], 1), halves[1]) < 1e-5


def test_pruning_and_cache_change_nothing() -> None:
    for config, cond in ((REDIRECTOR, redirector_condition()), (TINY, tiny_condition())):
        model = randomised(config)
        shape = (2, 16, 3, 6, 4) if config is REDIRECTOR else (2, 10, 3, 3, 4)
        x, t = torch.randn(shape), torch.tensor([900.0, 100.0])
        pruned = model(x, t, cond)
        model.execution.prune_source = False
        # Pruning changes the shapes of matrix products, hence the order of summation, and nothing else.
        assert relative(pruned, model(x, t, cond)) < 1e-5
        cache = model.precompute(cond).repeat_interleave(2)
        again = model(x.repeat_interleave(2, 0), t.repeat_interleave(2), cond.repeat_interleave(2), cache)
        assert relative(again[::2], pruned) < 1e-5


def test_kept_camera_phases_are_those_that_a_forward_makes() -> None:
    """Bit for bit: the same linear map of the same tokens, once per condition instead of once per step."""
    model, cond = randomised(REDIRECTOR), redirector_condition()
    x, t, outputs = torch.randn(2, 16, 3, 6, 4), torch.tensor([900.0, 100.0]), []
    for model.execution.cache_phases in (True, False):
        with torch.no_grad():
            cache = model.precompute(cond)
            assert len(cache.phases) == (2 if model.execution.cache_phases else 0)
            outputs.append(model(x, t, cond, cache))
    assert torch.equal(*outputs)
    model.requires_grad_(True)  # with gradients they carry their graph, kept or not
    model(x, t, cond, replace(cache, phases=())).square().mean().backward()
    expected = model.blocks[0].self_attn.rope_phase_qk[1].weight.grad.clone()
    model.zero_grad()
    with torch.no_grad():
        model.execution.cache_phases = True
        cache = model.precompute(cond)
    model(x, t, cond, cache).square().mean().backward()
    assert torch.equal(model.blocks[0].self_attn.rope_phase_qk[1].weight.grad, expected)


@pytest.mark.parametrize("config", [REDIRECTOR, TINY], ids=["redirector", "tiny"])
def test_recomputation_changes_no_gradient(config: ModelConfig) -> None:
    """The second forward of a block does the same operations in the same order: equal to the last bit.

    Keeping attention's output recomputes all but the attention: its operator then runs once per block.
    """
    model = randomised(config).requires_grad_(True)
    cond = redirector_condition() if config is REDIRECTOR else tiny_condition()
    assert cond.source_latents is not None
    torch.manual_seed(6)
    channels, frames, *plane = cond.source_latents.shape[1:]
    x = torch.randn(2, channels, frames - int(config.first_frame_given), *plane)
    gradients: list[dict[str, Tensor]] = []
    runs: list[tuple[int, int]] = []
    for model.execution.recompute in ("none", "keep_attention", "full"):
        model.zero_grad()
        with CountOps() as counted:
            model(x, torch.tensor([900.0, 100.0]), cond).square().mean().backward()
        runs.append((counted["attention"], counted["qk_norm_rotary"]))
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert runs == [(2, 2), (2, 4), (4, 4)]
    assert len(gradients[0]) > 50
    for other in gradients[1:]:
        assert other.keys() == gradients[0].keys()
        assert all(torch.equal(gradient, other[name]) for name, gradient in gradients[0].items())


class CountOps(TorchDispatchMode):
    """Counts calls of the project's operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: Counter[str] = Counter()

    def __getitem__(self, name: str) -> int:
        return self._calls[name]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "geoalign":
            self._calls[func._schema.name.partition("::")[2]] += 1
        return func(*args, **(kwargs or {}))


def test_frozen_parameters_cost_no_backward() -> None:
    """Training self-attention only: no product forms the weight gradient of a frozen matrix, and the frozen norms and
    gates are not reduced over tokens."""
    model = randomised(REDIRECTOR)
    cond, x, t = redirector_condition(), torch.randn(2, 16, 3, 6, 4), torch.tensor([900.0, 100.0])
    shapes: list[tuple[int, ...]] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if func in (torch.ops.aten.mm.default, torch.ops.aten.sum.dim_IntList):
                shapes.append(tuple(out.shape))
            return out

    for name, parameter in model.named_parameters():
        parameter.requires_grad_("self_attn" in name)
    loss = model(x, t, cond, model.precompute(cond)).square().mean()
    with Products():
        loss.backward()
    weights = [shape for shape in shapes if shape in ((96, 96), (32, 96))]
    # q, k, v, o and two phase maps in both blocks; the frozen cross-attention has 96 x 96 matrices too
    assert len(weights) == 2 * 6
    hidden = [shape for shape in shapes if shape in ((160, 96), (96, 160))]
    assert not hidden


@pytest.mark.parametrize("guided", [False, True])
def test_a_blocks_sum_waits_for_the_next_norm_only_where_no_log_probability_is_taken(guided: bool) -> None:
    """A free step launches one kernel less a block, but for the last; the reference rounds alike, so the bits agree."""
    layers = 3
    model = randomised(REDIRECTOR.model_copy(update={"layers": layers}))
    cond, x, t = redirector_condition(), torch.randn(2, 16, 3, 6, 4), torch.tensor([900.0, 100.0])
    if guided:
        cond = replace(cond, negative=torch.randn(2, 7, 24))
    with torch.no_grad():
        cache = model.precompute(cond)
    found = {}
    for grad, window in ((False, False), (True, False), (False, True)):
        with torch.set_grad_enabled(grad), exact_only() if window else nullcontext(), CountOps() as calls:
            velocity = model(x, t, cond, cache)
        found[grad, window] = velocity, tuple(calls[name] for name in ("gated_residual", "modulated_norm"))
    free, counted = found.pop((False, False))
    assert counted == (1, 2)  # after the last block; before the first one, and in the head
    for exact, counted in found.values():
        assert counted == (layers, layers + 1)
        assert torch.equal(exact, free)


def test_equal_cameras_cancel_between_queries_and_keys_but_not_between_value_and_output() -> None:
    """A phase common to all tokens leaves q.k unchanged; o sits between the rotations of v and output, so they stay."""
    attention = randomised(REDIRECTOR).blocks[0].self_attn
    position = grid_angles(REDIRECTOR, (0, 1, 2), 3, 2, torch.device("cpu"))
    torch.manual_seed(5)
    x, phase = torch.randn(1, 18, 96), torch.randn(1, 1, 4, 8).expand(1, 18, 4, 8)
    none = torch.zeros_like(phase)
    plain = attention(x, position, None, 18)
    assert relative(attention(x, position, Phases(phase, none), 18), plain) < 1e-5
    assert relative(attention(x, position, Phases(phase, phase), 18), plain) > 0.1


def tiny_condition(batch: int = 2) -> Conditioning:
    torch.manual_seed(6)
    plane = torch.tensor([0.0, math.sin(0.35), math.cos(0.35), 9.0]).repeat(batch, 1)
    return Conditioning(torch.randn(batch, 10, 4, 3, 4), cameras(batch, 4, 7), cameras(batch, 4, 8), plane)


def test_geometric_phases_follow_ground_points() -> None:
    """Tokens whose rays meet the same ground point get equal angles, and one patch of ground turns by theta."""
    cond = tiny_condition()
    assert cond.source_camera is not None
    same = Conditioning(cond.source_latents, cond.source_camera, cond.source_camera, cond.ground_plane)
    vo = geometric_phases(TINY, torch.zeros(2, 4, 4), same, 3, (4, 3, 4))[0].vo
    target, source = vo[:, : 3 * 12], vo[:, 3 * 12 + 12 :]
    torch.testing.assert_close(target, source, atol=2e-5, rtol=0)
    # A camera looking straight down: neighbouring columns are one patch apart on the map.
    down = Conditioning(
        cond.source_latents, _still(2, 4),
        _still(2, 4), torch.tensor([[0.0, 0.0, 1.0, 5.0]]).repeat(2, 1),
    )  # fmt: skip
    angle = geometric_phases(TINY, torch.zeros(2, 4, 4), down, 3, (4, 3, 4))[1].qk[0, :, 0]
    step = (angle[1] - angle[0])[-4:]
    expected = torch.tensor([2.2 * 14.2 ** (-j / 4) for j in range(4)])
    torch.testing.assert_close(step, expected, atol=1e-5, rtol=0)


def _still(batch: int, frames: int) -> CameraTrajectory:
    return CameraTrajectory.build(torch.eye(4).repeat(batch, frames, 1, 1), (0.8, 1.1, 0.5, 0.5))


def test_gains_scale_motion_and_receive_gradient() -> None:
    cond = tiny_condition()
    camera, plane = cond.target_camera, cond.ground_plane
    assert camera is not None and plane is not None
    same = scaled_poses(camera.c2w, plane, torch.zeros(1, 4))[:, 0]
    torch.testing.assert_close(same, camera.c2w, atol=1e-6, rtol=0)
    double = scaled_poses(camera.c2w, plane, torch.full((1, 4), math.log(2.0)))[:, 0]
    torch.testing.assert_close(double[..., :3, 3], 2 * camera.c2w[..., :3, 3], atol=1e-5, rtol=0)
    expected = camera.rotation @ camera.rotation
    torch.testing.assert_close(double[..., :3, :3], expected, atol=1e-5, rtol=0)
    model = randomised(TINY)
    for block in model.blocks:
        block.self_attn.camera_gain.zero_().requires_grad_(True)
    x, t = torch.randn(2, 10, 3, 3, 4), torch.tensor([500.0, 800.0])
    model(x, t, cond).square().mean().backward()
    for block in model.blocks:
        gradient = block.self_attn.camera_gain.grad
        assert torch.isfinite(gradient).all() and (gradient != 0).all()


def test_target_pose_enters_only_through_the_phases() -> None:
    """Freezing the rotations makes the model blind to the target camera, so attention alone can correct its scale."""
    model, cond = randomised(TINY), tiny_condition()
    first = model.precompute(cond)
    other = model.precompute(
        Conditioning(cond.source_latents, cond.source_camera, cameras(2, 4, 99), cond.ground_plane)
    )
    assert torch.equal(first.token_offset, other.token_offset)
    assert torch.equal(first.source_tokens, other.source_tokens)
    assert not torch.equal(first.phases[0].qk, other.phases[0].qk)


def test_rays_that_miss_the_ground_keep_gradients_finite() -> None:
    cond = tiny_condition()
    up = so3.rigid(so3.exp(torch.tensor([2.2, 0.0, 0.0])), torch.zeros(3)).repeat(2, 4, 1, 1)
    sky = Conditioning(
        cond.source_latents, cond.source_camera, CameraTrajectory.build(up, (0.8, 1.1, 0.5, 0.5)), cond.ground_plane
    )
    model = init_tiny_(RetakeDiT(TINY))
    model(torch.randn(2, 10, 3, 3, 4), torch.tensor([500.0, 800.0]), sky).square().mean().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_preconditioning_is_optimal_for_gaussian_data() -> None:
    """With network output 0 the velocity is E[n - x0 | x] of x0 ~ N(0, s2): closed form by Gaussian regression."""
    model = randomised(TINY)
    model.head.head.weight.zero_()
    model.head.head.bias.zero_()
    x, t = torch.randn(2, 10, 3, 3, 4), torch.tensor([300.0, 950.0])
    sigma = (t / 1000).view(2, 1, 1, 1, 1)
    variance = sigma**2 + (1 - sigma) ** 2 * 0.6
    expected = (sigma - (1 - sigma) * 0.6) / variance * x  # Cov(n - x0, x) / Var(x)
    torch.testing.assert_close(model(x, t, tiny_condition()), expected, atol=1e-6, rtol=1e-6)


def test_recammaster_sequential_frames_and_pose_injection() -> None:
    config = WAN.model_copy(update={"source": "frames", "camera": "modulated", "rope_layout": "sequential"})
    model, cond = randomised(config), redirector_condition()
    x, t = torch.randn(2, 16, 3, 6, 4), torch.tensor([900.0, 100.0])
    moved = Conditioning(cond.source_latents, cond.source_camera, cameras(2, 9, 50), context=cond.context)
    assert relative(model(x, t, moved), model(x, t, cond)) > 1e-3
    for block in model.blocks:  # published initialisation: no camera, identity projector
        block.cam_encoder.weight.zero_()
        block.cam_encoder.bias.zero_()
        torch.nn.init.eye_(block.projector.weight)
        block.projector.bias.zero_()
    plain = RetakeDiT(config.model_copy(update={"camera": "none"}))
    state = {k: v for k, v in model.state_dict().items() if "cam_encoder" not in k and "projector" not in k}
    plain.load_state_dict(state)
    assert relative(model(x, t, cond), plain(x, t, cond)) < 1e-5


def test_head_dimension_without_one_rotary_split_is_refused() -> None:
    with pytest.raises(ValueError, match="head dimension 16"):
        ModelConfig(dim=64, heads=4)
    with pytest.raises(UsageError, match="source_latents"):
        randomised(TINY)(torch.randn(1, 10, 3, 3, 4), torch.tensor([1.0]), Conditioning())


def test_adapter_reads_ray_maps_in_the_published_channel_order() -> None:
    """Pixel (dy, dx) of channel c enters as c * s^2 + s * dy + dx, c = 4 * Pluecker channel + sub-frame; s = stride."""
    from geoalign.geometry.pluecker import ray_map
    from geoalign.models.camera import PlueckerAdapter, adapter_input

    adapter = PlueckerAdapter(REDIRECTOR).requires_grad_(False)
    for parameter in adapter.parameters():
        parameter.zero_()
    pluecker, sub_frame, dy, dx, ky, kx = 4, 2, 1, 0, 1, 0
    adapter.conv.weight[5, (4 * pluecker + sub_frame) * 4 + 2 * dy + dx, ky, kx] = 1.0
    path = cameras(1, 9)
    tokens = adapter(adapter_input(path, 12, 8, 4))
    rays = ray_map(path, (12, 8), reference_size=None)[0]
    # Latent frame 1 packs video frames 1..4; token (row 2, column 1) covers pixels 8..11 x 4..7.
    expected = rays[1 + sub_frame, pluecker, 8 + 2 * ky + dy, 4 + 2 * kx + dx]
    assert tokens.shape == (1, 3 * 3 * 2, 96)
    torch.testing.assert_close(tokens[0, 6 + 2 * 2 + 1, 5], expected)


def test_the_gelu_runs_in_the_product_only_where_no_log_probability_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    from geoalign.models import layers
    from geoalign.models.execution import Execution

    weight = torch.nn.Parameter(torch.empty(1))
    on_card: Any = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    for grad, window, tensor, fused in (
        (False, False, on_card, True), (True, False, on_card, False), (False, True, on_card, False),
        (False, False, SimpleNamespace(is_cuda=True, dtype=torch.float32), False),
        (False, False, torch.empty(1, dtype=torch.bfloat16), False),
    ):  # fmt: skip
        with torch.set_grad_enabled(grad), exact_only() if window else nullcontext():
            assert layers.gelu_in_product(weight, tensor) == fused
    with torch.no_grad():
        assert not layers.gelu_in_product(torch.empty(1), on_card)  # a weight that torchao or FSDP2 has replaced
        block = layers.Block(ModelConfig(dim=48, heads=2, ffn_dim=96), 0, Execution())
        u = torch.randn(2, 5, 48)
        expected = block._feed_forward(u)
        assert torch.equal(expected, block.ffn(u))
        monkeypatch.setattr(layers, "gelu_in_product", lambda *_: True)
        # The library's tanh is its own.
        torch.testing.assert_close(block._feed_forward(u), expected, rtol=0, atol=2e-3 * float(expected.abs().max()))

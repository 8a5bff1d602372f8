"""Forward and backward of a policy on an imagined device: no tensor is left on the host, nothing waits for the device.

Fake tensors carry shapes, dtypes and devices but no data. They refuse operations that mix devices and operations that
read a value back, so the test fails where a real GPU would fail or stall. The device is called "meta" because autograd
of a torch built without CUDA cannot even imagine one called "cuda".
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from geoalign.config.model import ModelConfig
from geoalign.evaluators.base import PoseEstimate
from geoalign.flow.sampler import initial_noise
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.models import rope
from geoalign.models.conditioning import Conditioning
from geoalign.models.dit import RetakeDiT
from geoalign.models.execution import Recompute
from geoalign.policy.policy import RetakePolicy
from geoalign.rewards.geometry import GeometryReward
from geoalign.rl.objective import clipped_surrogate
from geoalign.training.engines.optim import freeze_all_but
from geoalign.types import RetakeBatch, SourceClip

DEVICE = "meta"
LEARNED = ModelConfig(
    dim=96, heads=4, layers=3, ffn_dim=160, in_channels=32, out_channels=16, text_dim=24, freq_dim=64, image_dim=40,
    source="frames", camera="learned", pluecker_adapter=True, space_stride=2, timestep_dtype="bfloat16",
)  # fmt: skip
GEOMETRIC = ModelConfig(
    dim=96, heads=4, layers=3, ffn_dim=160, in_channels=16, out_channels=16, patch=(1, 1, 1), text_dim=24, freq_dim=32,
    source="frames", first_frame_given=True, camera="geometric", time_stride=1, space_stride=16, data_variance=0.6,
)  # fmt: skip


@pytest.fixture(autouse=True)
def imagined_device() -> Iterator[None]:
    """Fake tensors everywhere; tables that were cached on the device are forgotten afterwards."""
    with FakeTensorMode(allow_non_fake_inputs=True):  # host constants count as what they are: host tensors
        yield
    for table in (rope.grid_angles, rope.axis_frequencies):
        table.cache_clear()


def conditions(config: ModelConfig, guided: bool) -> Conditioning:
    frames = 5 if config.time_stride == 1 else 17
    cameras = [CameraTrajectory(torch.empty(2, frames, 4, 4), torch.empty(2, frames, 4)) for _ in range(2)]
    return Conditioning(
        torch.empty(2, 16, 5, 6, 4), *cameras, torch.empty(2, 4), torch.empty(2, 7, 24),
        torch.empty(2, 9, 40) if config.image_dim else None, torch.empty(2, 7, 24) if guided else None,
    )  # fmt: skip


def test_the_geometry_reward_stays_on_the_device() -> None:
    class Reads:
        """Answers as MapAnything does, on the device of the video."""

        name = "reads"

        def __call__(self, video: Tensor, source: SourceClip) -> PoseEstimate:
            return PoseEstimate(
                torch.empty(3, 5, 4, 4, device=DEVICE), torch.arange(5, device=DEVICE) * 4,
                torch.empty(3, device=DEVICE), torch.empty(3, device=DEVICE),
            )  # fmt: skip

    with torch.device(DEVICE):
        camera = CameraTrajectory(torch.empty(3, 17, 4, 4), torch.empty(3, 17, 4))
        videos = torch.empty(3, 17, 3, 8, 8)
    batch = RetakeBatch(SourceClip(videos, camera, None, ("a", "b", "c")), camera, ("", "", ""))
    output = GeometryReward(Reads())(videos, batch)
    for values in (output.scores, output.parts, output.diagnostics):
        assert all(value.device.type == DEVICE and value.shape == (3,) for value in values.values())


@pytest.mark.parametrize("recompute", ["none", "keep_attention", "full"])
@pytest.mark.parametrize(("config", "guidance"), [(LEARNED, 1.0), (LEARNED, 5.0), (GEOMETRIC, 1.0)])
def test_forwards_and_backward_stay_on_the_device(config: ModelConfig, guidance: float, recompute: Recompute) -> None:
    with torch.device(DEVICE):
        torch.set_default_dtype(torch.bfloat16)  # fake parameters cannot be cast in place
        model = RetakeDiT(config)
        torch.set_default_dtype(torch.float32)
        condition, groups, time = conditions(config, guidance > 1), torch.zeros(6, dtype=torch.int64), torch.empty(6)
    model.execution.recompute, model.execution.core = recompute, "sdpa_flash"
    trained = freeze_all_but(model, r"\.self_attn\.")
    policy = RetakePolicy(model, codec=None, guidance=guidance)  # type: ignore[arg-type]
    precomputed = policy.precompute(condition).repeat_interleave(3)
    x = initial_noise((16, 5 - config.first_frame_given, 6, 4), 0, 0, groups)
    with torch.no_grad():
        fixed = policy.velocity(x, time, precomputed)
    live = policy.velocity(x, time, precomputed)
    assert live.passes == (2 if guidance > 1 else 1)
    for velocity in (fixed, live):
        assert velocity.combined().device.type == DEVICE
        assert velocity.combined().shape == x.shape and velocity.combined().dtype == torch.float32
    log_prob = live.combined().flatten(1).mean(1)
    output = clipped_surrogate(log_prob, log_prob.detach(), time, clip=1e-4, weight=1.0, denominator=6.0)
    output.loss.backward()
    assert all(isinstance(p.grad, Tensor) and p.grad.device.type == DEVICE for p in trained.values())
    assert output.stats.ratio_sum.device.type == DEVICE

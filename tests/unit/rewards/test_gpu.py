"""Rewards on a CUDA device: replays equal eager bit for bit, addresses survive swaps, placements give equal scores.

Needs torch and safetensors alone: pytest tests/unit/rewards/test_gpu.py
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from patience import PATIENCE_S
from repository import ROOT, SUPPORT
from reward_cases import BODIES, MeanReward, tiny_geometry, tiny_hpsv3
from torch import Tensor, nn

from geoalign.frozen.arena import WeightArena
from geoalign.frozen.graphed import CudaGraphBackend, GraphedScorer
from geoalign.frozen.precision import exact_float32, exactly
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.rewards.base import Reward, RewardOutput
from geoalign.rewards.running.guard import GuardedReward
from geoalign.rewards.running.turns import Scored, decode_and_score, score_all
from geoalign.rewards.running.worker import WorkerReward
from geoalign.types import RetakeBatch, SourceClip

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.bfloat16)
Outputs = Mapping[str, Tensor]


def body_on_cuda(name: str, dtype: torch.dtype) -> tuple[nn.Module, list[tuple[Tensor, ...]]]:
    """A captured body with matrices in ``dtype``, and three different inputs of one shape."""
    body, inputs = BODIES[name]()
    body.network.use_matrix_dtype(dtype)
    pixels, *rest = inputs
    shown = [pixels, pixels.flip(0), -pixels]
    return body.cuda(), [tuple(x.cuda() for x in (frames, *rest)) for frames in shown]


def same(a: Outputs, b: Outputs) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BODIES)
def test_replay_equals_eager_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    body, inputs = body_on_cuda(name, dtype)
    run = GraphedScorer(exactly(body), body)
    with torch.no_grad():
        expected = [exactly(body)(*sample) for sample in inputs]
    assert not same(expected[0], expected[2])  # the inputs matter
    for _ in range(2):
        for sample, value in zip(inputs, expected, strict=True):
            assert same(run(*sample), value)
    assert (run.counts.captures, run.counts.replays, run.counts.eager, run.counts.moved) == (1, 6, 0, 0)


@pytest.mark.parametrize("name", BODIES)
def test_the_device_agrees_with_the_cpu(name: str) -> None:
    """float32 on both: sums in another order, some hundred roundings deep."""
    body, inputs = BODIES[name]()
    with torch.no_grad():
        expected = body(*inputs)
        found = exactly(body.cuda())(*(x.cuda() for x in inputs))
    for key, value in expected.items():
        torch.testing.assert_close(found[key].cpu(), value, rtol=1e-3, atol=1e-3)


def test_replays_ignore_the_precision_of_the_moment() -> None:
    """A trainer that turns TF32 on changes neither a capture nor a replay: the kernels were chosen in exact float32."""
    body, inputs = body_on_cuda("mapanything_v1.1", torch.float32)
    before = torch.get_float32_matmul_precision()
    try:
        with exact_float32(), torch.no_grad():
            expected = body(*inputs[0])
        torch.set_float32_matmul_precision("high")
        run = GraphedScorer(exactly(body), body)
        assert same(run(*inputs[0]), expected) and same(run(*inputs[0]), expected)
    finally:
        torch.set_float32_matmul_precision(before)


def test_graphs_survive_weights_that_take_turns() -> None:
    """One device buffer for all bodies, masters on the host: addresses stay, replays stay equal, one capture each."""
    cases = {name: body_on_cuda(name, torch.bfloat16) for name in BODIES}
    with torch.no_grad():
        expected = {name: exactly(body)(*inputs[0]) for name, (body, inputs) in cases.items()}
    arena = WeightArena({name: body.network for name, (body, _) in cases.items()}, "cuda")
    backend = CudaGraphBackend()
    addresses = {name: [p.data_ptr() for p in body.network.parameters()] for name, (body, _) in cases.items()}
    runs = {name: GraphedScorer(exactly(body), body, backend) for name, (body, _) in cases.items()}
    for order in (list(BODIES), list(reversed(BODIES)), list(BODIES)):
        for name in order:
            arena.activate(name)
            assert same(runs[name](*cases[name][1][0]), expected[name]), name
            assert arena.resident == name
    for name, (body, _) in cases.items():
        assert [p.data_ptr() for p in body.network.parameters()] == addresses[name]
        assert (runs[name].counts.captures, runs[name].counts.moved) == (1, 0)
    largest = max(sum(p.nbytes for p in body.network.parameters()) for body, _ in cases.values())
    total = sum(p.nbytes for body, _ in cases.values() for p in body.network.parameters())
    assert largest <= arena.device_bytes < total


def test_weights_that_went_away_are_captured_again() -> None:
    body, inputs = body_on_cuda("hpsv3", torch.bfloat16)
    run = GraphedScorer(exactly(body), body)
    expected = run(*inputs[0])
    body.cpu()
    places = [
        torch.empty_like(p, device="cuda") for p in body.network.parameters()
    ]  # taken: no weight comes back there
    body.cuda()
    assert same(run(*inputs[0]), expected)
    assert (run.counts.captures, run.counts.moved) == (2, 1) and len(places) > 0


ROWS, FRAMES, SIZE = 6, 4, (64, 96)


def batch_on_cuda() -> RetakeBatch:
    c2w = torch.eye(4).repeat(3, FRAMES, 1, 1)
    c2w[..., 0, 3] = torch.arange(FRAMES) * torch.tensor([0.1, 0.2, 0.3])[:, None]
    camera = CameraTrajectory.build(c2w)
    video = torch.zeros(3, FRAMES, 3, *SIZE)
    return RetakeBatch(SourceClip(video, camera, None, ("a", "b", "c")), camera, ("p", "pp", "ppp")).to("cuda")


def videos_on_cuda() -> Tensor:
    generator = torch.Generator("cuda").manual_seed(3)
    coarse = torch.rand(ROWS * FRAMES, 3, 8, 12, device="cuda", generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=SIZE, mode="bicubic").clamp(-1, 1).unflatten(0, (ROWS, FRAMES))


class OnTheHost(MeanReward):
    """Scores on the CPU what lies on the device, and answers there, as corner tracking does."""

    def __call__(self, videos: Tensor, batch: RetakeBatch) -> RewardOutput:
        return super().__call__(videos.cpu(), batch)


def rewards_on_cuda() -> dict[str, Reward]:
    return {
        "geometry": GuardedReward(tiny_geometry("cuda")),
        "hps": GuardedReward(tiny_hpsv3("cuda"), timeout_s=PATIENCE_S),
        "host": GuardedReward(OnTheHost()),
    }


def equal(a: Scored, b: Scored) -> bool:
    return list(a.outputs) == list(b.outputs) and all(
        torch.equal(x.valid, y.valid) and same(x.scores, y.scores) and same(x.parts, y.parts)
        for x, y in zip(a.outputs.values(), b.outputs.values(), strict=True)
    )


@pytest.mark.parametrize("chunk", [2, 3, None])
def test_a_side_stream_gives_the_scores_of_scoring_at_once(chunk: int | None) -> None:
    """The decode writes late on its stream: who did not wait for it would score NaN. Graphs are captured on the way."""
    videos, batch = videos_on_cuda(), batch_on_cuda()
    expected = score_all(rewards_on_cuda(), videos, batch.repeat_interleave(2))
    assert all(output.valid.all() for output in expected.outputs.values())

    def decode(rows: Tensor, _: RetakeBatch) -> Tensor:
        shown = torch.full((len(rows), *videos.shape[1:]), torch.nan, device="cuda")
        index = rows.cuda()  # waits for this stream: behind the sleep, nothing would be late
        busy = torch.randn(512, 512, device="cuda")
        for _ in range(20):  # work and allocations of the caller's stream beside the scorers'
            busy = busy @ busy / 512
        torch.cuda._sleep(20_000_000)
        return shown.copy_(videos[index])

    rewards = rewards_on_cuda()
    for beside in (True, False, True):
        found = decode_and_score(rewards, decode, batch, torch.arange(6) // 2, chunk=chunk, beside=beside)
        assert equal(found, expected), beside
        assert all(output.valid.is_cuda for output in found.outputs.values())
        assert all(seconds > 0 for seconds in found.seconds.values())


def test_a_worker_on_the_device_gives_equal_scores() -> None:
    here, root = SUPPORT, ROOT
    environment = {"PYTHONPATH": f"{here}:{root}:{root / 'kernels'}"}
    worker = WorkerReward(
        "geometry", (), "reward_cases:tiny_geometry", options={"device": "cuda"}, environment=environment
    )
    try:
        worker.start()
        videos, batch = videos_on_cuda(), batch_on_cuda().repeat_interleave(2)
        expected = score_all({"geometry": GuardedReward(tiny_geometry("cuda"))}, videos, batch)
        rewards = {"geometry": GuardedReward(worker), "host": OnTheHost()}
        found = score_all(rewards, videos, batch)
        assert equal(Scored({"geometry": found.outputs["geometry"]}, {}), expected)
        assert found.outputs["host"].valid.all()
    finally:
        worker.close()

"""Graph readiness of every captured body without a GPU: no host reads, no random numbers, one graph, static shapes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from reward_cases import BODIES, HostReads
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from geoalign.evaluators.mapanything.evaluator import PoseBody
from geoalign.evaluators.mapanything.layout import LAYOUTS
from geoalign.evaluators.mapanything.network import PoseNetwork
from geoalign.frozen.mapanything_images import plan_resize
from geoalign.rewards.vlm.body import RewardQwen, hpsv3_head, videoalign_head
from geoalign.rewards.vlm.layout import HPSV3_BODY, VIDEOALIGN_BODY, QwenLayout
from geoalign.rewards.vlm.scorers import StaticBody


@pytest.mark.parametrize("name", BODIES)
def test_body_reads_nothing_back_and_draws_nothing(name: str) -> None:
    body, inputs = BODIES[name]()
    random_state = torch.get_rng_state()
    with HostReads() as spy, torch.no_grad():
        body(*inputs)
    assert spy.operators > 50 and spy.found == []
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("name", BODIES)
def test_body_compiles_as_one_graph_with_equal_results(name: str) -> None:
    body, inputs = BODIES[name]()
    compiled = torch.compile(body, fullgraph=True, backend="aot_eager", dynamic=False)
    with torch.no_grad():
        eager, traced = body(*inputs), compiled(*inputs)
    assert eager.keys() == traced.keys()
    for key, value in eager.items():
        # aot_eager runs the same operators; functionalisation may reorder sums by a rounding or two.
        torch.testing.assert_close(traced[key], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", BODIES)
def test_rows_of_a_batch_do_not_see_each_other(name: str) -> None:
    """At one batch shape a row's result is the same bits whatever the other row shows; its own pixels do matter."""
    body, (pixels, *rest) = BODIES[name]()
    changed = pixels.clone()
    changed[1] = -changed[1]
    with torch.no_grad():
        before, after = body(pixels, *rest), body(changed, *rest)
    for key, value in before.items():
        assert torch.equal(after[key][0], value[0]), key
    assert any(not torch.equal(after[key][1], before[key][1]) for key in before)


def sizes_of(network: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in network.state_dict().items()}


def fill(network: nn.Module, sizes: dict[str, tuple[torch.Size, torch.dtype]]) -> None:
    """Give a network that was built on the meta device tensors of the mode in force."""
    network.load_state_dict(
        {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in sizes.items()}, assign=True
    )


# 480 x 832, 81 frames at the released sizes, without memory: any hidden read of a value raises under fake tensors.
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_full_size_pose_body_passes_fake_tensors(layout: str) -> None:
    plan = plan_resize(480, 832)
    with torch.device("meta"):
        network = PoseNetwork(LAYOUTS[layout]).use_matrix_dtype(torch.bfloat16)
    sizes = sizes_of(network)
    with FakeTensorMode(), torch.no_grad():
        fill(network, sizes)
        network.set_size(*plan.output)
        body = PoseBody(network)
        out = body(torch.zeros(2, 81, 3, *plan.output))
    assert network.position_table.shape[1] == 1 + 21 * 37
    assert out["c2w"].shape == (2, 81, 4, 4) and out["c2w"].dtype == torch.float32
    assert out["tracked"].shape == out["metric_scale"].shape == (2,)


# Prompt lengths of the published templates: VideoAlign up to its motion token, HPSv3 with a caption of some words.
@pytest.mark.parametrize(
    ("layout", "head", "rows", "slices", "length", "reads", "outputs"),
    [
        (VIDEOALIGN_BODY, videoalign_head, 4, 5, 1836, (1568, 1835), 1),
        (HPSV3_BODY, hpsv3_head, 8, 1, 780, (779,), 2),
    ],
    ids=["videoalign", "hpsv3"],
)
def test_full_size_language_body_passes_fake_tensors(
    layout: QwenLayout, head: Callable[[QwenLayout], nn.Module], rows: int, slices: int, length: int,
    reads: tuple[int, ...], outputs: int,
) -> None:  # fmt: skip
    with torch.device("meta"):
        network = RewardQwen(layout, head(layout)).use_matrix_dtype(torch.bfloat16)
    sizes = sizes_of(network)
    with FakeTensorMode(), torch.no_grad():
        fill(network, sizes)
        body = StaticBody(network, (24, 42), length, range(15, 15 + slices * 252))
        ids, pool = torch.zeros(rows, length, dtype=torch.int64), torch.tensor([reads] * rows)
        raw: Tensor = body(torch.zeros(rows, slices, 1008, layout.patch_values), ids, pool)["raw"]
    assert raw.shape == (rows, len(reads), outputs) and raw.dtype == torch.float32

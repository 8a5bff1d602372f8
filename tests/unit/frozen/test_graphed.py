"""GraphedScorer and WeightArena on any machine, with a capture backend that replays against fixed addresses."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from geoalign.errors import UsageError
from geoalign.frozen.arena import WeightArena
from geoalign.frozen.graphed import Body, CudaGraphBackend, GraphedScorer, _Streams


class Affine(nn.Module):
    """A small body with weights, a buffer and two outputs."""

    def __init__(self, seed: int = 0, width: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(width, width, generator=generator), requires_grad=False)
        self.register_buffer("shift", torch.randn(width, generator=generator))
        self.calls = 0

    def forward(self, x: Tensor, gain: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        y = x @ self.weight + self.shift
        return {"y": y, "score": y.sum(-1) * gain}


class FixedAddresses:
    """Capture for the CPU that behaves like a CUDA graph: a replay touches only the addresses it recorded."""

    device_type = "cpu"

    def __init__(self, module: Affine) -> None:
        self.module, self.settled = module, 0

    def capture(self, body: Body, inputs: tuple[Tensor, ...], warmups: int) -> tuple[Callable[[], None], Mapping]:
        for _ in range(warmups):
            body(*inputs)
        # Views keep the recorded memory readable, as a graph would, even after the module has moved elsewhere.
        weight, shift = (
            self.module.weight.data.view_as(self.module.weight),
            self.module.shift.view_as(self.module.shift),
        )
        outputs = {name: torch.full_like(value, torch.nan) for name, value in body(*inputs).items()}
        x, gain = inputs

        def replay() -> None:
            y = x @ weight + shift
            outputs["y"].copy_(y)
            outputs["score"].copy_(y.sum(-1) * gain)

        return replay, outputs

    def settle(self) -> None:
        self.settled += 1


def batch(rows: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, generator=generator), torch.randn(rows, generator=generator)


def scorer(module: Affine, **options: int) -> GraphedScorer:
    return GraphedScorer(module, module, FixedAddresses(module), **options)


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_replay_equals_eager_for_every_shape_and_input() -> None:
    module = Affine()
    run = scorer(module)
    for rows, seed in ((2, 1), (2, 2), (5, 3), (2, 4), (5, 5)):
        inputs = batch(rows, seed)
        assert same(run(*inputs), module(*inputs))
    assert (run.counts.captures, run.counts.replays, run.counts.eager) == (2, 5, 0)


def test_outputs_belong_to_the_caller_and_inputs_are_copied() -> None:
    module = Affine()
    run = scorer(module)
    first_inputs = batch(2, 1)
    first = run(*first_inputs)
    kept = {name: value.clone() for name, value in first.items()}
    run(*batch(2, 2))
    assert same(first, kept)  # a later replay does not overwrite an earlier answer
    first_inputs[0].zero_()
    assert same(run(*batch(2, 1)), kept)
    transposed = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).T  # not contiguous
    assert same(run(transposed, batch(2)[1]), module(transposed, batch(2)[1]))


def test_warm_up_runs_before_capture_and_only_then() -> None:
    module = Affine()
    run = scorer(module, warmups=5)
    run(*batch(2))
    assert module.calls == 5 + 1
    run(*batch(2, 9))
    assert module.calls == 5 + 1


def test_least_recently_used_graph_is_dropped() -> None:
    module = Affine()
    run = scorer(module, max_graphs=2)
    for rows in (1, 2, 1, 3):  # 3 evicts 2, the least recently used
        run(*batch(rows))
    assert (run.counts.captures, run.counts.evictions) == (3, 1)
    run(*batch(1))
    assert run.counts.captures == 3
    run(*batch(2))
    assert (run.counts.captures, run.counts.evictions) == (4, 2)
    assert run.backend.settled == 2  # a running graph is never dropped
    run.clear()
    run(*batch(2))
    assert run.counts.captures == 5 and run.backend.settled == 4


def test_no_two_live_graphs_share_a_capture_stream() -> None:
    """Torch hands out streams of a pool in turn, and with a graph go all workspaces of its stream."""
    pool, device = itertools.cycle("abc"), torch.device("cpu")
    streams = _Streams(lambda _: next(pool))
    assert streams.take(device) == "a"
    next(pool)  # somebody else took b
    assert {streams.take(device), streams.take(device)} == {"b", "c"}
    with pytest.raises(UsageError, match="3 CUDA graphs are alive"):
        streams.take(device)
    streams.give_back(device, "b")
    assert streams.take(device) == "b"


def test_dtype_is_part_of_the_key() -> None:
    module = Affine().double()
    run = scorer(module)
    run(*(x.double() for x in batch(2)))
    assert run.counts.captures == 1
    module.float()
    run(*batch(2))
    assert run.counts.captures == 2


def test_eager_where_the_backend_does_not_capture() -> None:
    module = Affine()
    run = GraphedScorer(module, module, CudaGraphBackend())
    inputs = batch(2)
    assert same(run(*inputs), module(*inputs))
    assert (run.counts.eager, run.counts.captures) == (1, 0)


def test_moved_weights_are_captured_again() -> None:
    """Weights that went away and came back elsewhere: a stale graph would go on reading the old memory."""
    module = Affine()
    run = scorer(module)
    for rows in (2, 3):
        run(*batch(rows))
    module.weight.data = module.weight.data * 2
    inputs = batch(2)
    assert same(run(*inputs), module(*inputs))
    assert (run.counts.moved, run.counts.captures) == (2, 3)
    module.weight.data.mul_(0.5)  # in place: same address, nothing to capture
    assert same(run(*inputs), module(*inputs))
    assert run.counts.captures == 3


def test_settings_below_one_are_refused() -> None:
    for options in ({"max_graphs": 0}, {"warmups": 0}):
        with pytest.raises(UsageError, match="at least 1"):
            GraphedScorer(Affine(), **options)


def test_arena_keeps_addresses_and_values() -> None:
    modules = {"small": Affine(1), "large": Affine(2, width=40)}
    expected = {name: {k: v.clone() for k, v in module.state_dict().items()} for name, module in modules.items()}
    arena = WeightArena(modules, "cpu")
    assert arena.resident is None
    assert arena.device_bytes == 40 * 40 * 4 + 256  # the larger module: weights, then 160 bytes rounded up to 256
    addresses = {name: [p.data_ptr() for p in module.state_dict().values()] for name, module in modules.items()}
    for name in ("small", "large", "small", "small", "large"):
        arena.activate(name)
        assert arena.resident == name
        assert same(modules[name].state_dict(), expected[name])
        assert [p.data_ptr() for p in modules[name].state_dict().values()] == addresses[name]
        assert all(address % 64 == modules["small"].weight.data_ptr() % 64 for address in addresses[name])
    with pytest.raises(UsageError, match="it holds large, small"):
        arena.activate("other")


def test_graphs_survive_scorers_taking_turns() -> None:
    modules = {"a": Affine(1), "b": Affine(2)}
    inputs = batch(2)
    expected = {name: module(*inputs) for name, module in modules.items()}
    arena = WeightArena(modules, "cpu")
    runs = {name: scorer(module) for name, module in modules.items()}
    for name in ("a", "b", "a", "b", "b", "a"):
        arena.activate(name)
        assert same(runs[name](*inputs), expected[name])
    assert [(run.counts.captures, run.counts.moved) for run in runs.values()] == [(1, 0), (1, 0)]


@pytest.mark.gpu
def test_cuda_graphs_equal_eager_bitwise_and_share_a_pool() -> None:
    modules = {"a": Affine(1).cuda(), "b": Affine(2).cuda()}
    backend = CudaGraphBackend()
    arena = WeightArena(modules, "cuda")
    runs = {n: GraphedScorer(m, m, backend) for n, m in modules.items()}
    for name, rows, seed in (("a", 2, 1), ("b", 2, 2), ("a", 4, 3), ("a", 2, 4), ("b", 2, 5)):
        inputs = tuple(x.cuda() for x in batch(rows, seed))
        arena.activate(name)
        got = runs[name](*inputs)
        assert same(got, modules[name](*inputs))
    assert runs["a"].counts.captures == 2 and runs["b"].counts.captures == 1
    assert runs["a"].counts.moved == runs["b"].counts.moved == 0


@pytest.mark.gpu
def test_a_graph_replays_after_another_one_was_dropped() -> None:
    """Products large enough for a cuBLAS workspace; the memory that the dropped graph leaves is overwritten."""
    module = Affine(width=1024).cuda()
    kept, dropped = GraphedScorer(module, module), GraphedScorer(module, module, max_graphs=1)
    inputs = torch.randn(2048, 1024, device="cuda"), torch.randn(2048, device="cuda")
    expected = kept(*inputs)
    for rows in (512, 1024):
        dropped(torch.randn(rows, 1024, device="cuda"), torch.randn(rows, device="cuda"))
    dropped.clear()
    torch.cuda.empty_cache()
    noise = [torch.full((1 << 24,), torch.nan, device="cuda") for _ in range(8)]
    assert same(kept(*inputs), expected) and len(noise) == 8

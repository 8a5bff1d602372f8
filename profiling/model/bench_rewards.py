"""The reward models at their true shapes with random weights: latency, memory, and replay equal to eager bit for bit.

    python profiling/model/bench_rewards.py [--quick] [--only NAME] [--out FILE.jsonl]  on a CUDA device
    python profiling/model/bench_rewards.py --plan [--only NAME]                        sizes and predictions, anywhere
    python profiling/model/bench_rewards.py --self-check [--out FILE.jsonl]             tiny sizes, anywhere

Rows go where `bench_ops.py` puts its own, in the same schema, between the same ceilings. What is timed is the captured
body of a scorer (prepared pixels in, poses or raw scores out), eagerly and as a replayed graph, which includes copying
the inputs in and the outputs out. Weights do not change the time. `predicted_ms` is FLOPs over the device profile's
rate for reward models and is printed before anything is timed; a model that would not end by `--until` is not run. Exit
code: 0, or 1 if a model failed or a replay differs from eager.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from geoalign.evaluators.mapanything.evaluator import PoseBody
from geoalign.evaluators.mapanything.layout import LAYOUTS, PoseNetworkLayout
from geoalign.evaluators.mapanything.network import PoseNetwork
from geoalign.frozen.arena import WeightArena
from geoalign.frozen.graphed import CudaGraphBackend, GraphedScorer
from geoalign.frozen.mapanything_images import plan_resize
from geoalign.frozen.precision import exactly
from geoalign.frozen.qwen_patches import fit_size
from geoalign.perf.devices import DEVICES, DeviceProfile
from geoalign.perf.reward_cost import pose_path_flops, qwen_flops
from geoalign.rewards.vlm.body import RewardQwen, hpsv3_head, videoalign_head
from geoalign.rewards.vlm.layout import HPSV3_BODY, VIDEOALIGN_BODY, QwenLayout
from geoalign.rewards.vlm.scorers import StaticBody

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))  # scripts of one checkout, not a package

from bench_ops import Bench, bench_of, chosen, first_line, lost_device, options_parser
from bench_prices import SLOWEST
from bench_timing import calls_for, count_launches, measure

FRAME = (480, 832)
# Tokens of the published prompts: VideoAlign's up to the motion token, HPSv3's with a caption of some words.
VIDEOALIGN_LENGTH, VIDEOALIGN_READS = 1836, (1568, 1835)
HPSV3_LENGTH, HPSV3_READS = 780, (779,)
FIRST_VISUAL = 15
BUFFERS = 3
"""Sets of inputs, used in turn."""
BESIDE = 3 * BUFFERS + 7
"""Calls of a case beside the timed ones: outputs and one again; capture; those of the graph, twice; two are counted."""
MAKE_S, TURNS_S = 3.0, 25.0
"""Assumed: weights of a case on the device; two models that take turns, 6 GB of which lie in pinned memory."""
TINY_QWEN = QwenLayout(32, 2, 2, 64, 64, 2, 4, 2, 128, rows=512)
TINY_POSE = PoseNetworkLayout(24, 1, 2, "swiglu", False, 24, 2, 2, "swiglu", True, True)
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class RewardCase:
    """One captured body at one shape.

    Attributes:
        name: of the model.
        shape: of the frames behind it, ``[rows, frames, 3, H, W]``.
        flops: of one call; None where no closed form is at hand (tiny sizes).
        network: the model without weights; built under a device context it lies there.
        body: what is captured, around the model.
        inputs: random inputs on a device.
    """

    name: str
    shape: tuple[int, ...]
    flops: float | None
    network: Callable[[], nn.Module]
    body: Callable[[nn.Module], nn.Module]
    inputs: Callable[[torch.device], tuple[Tensor, ...]]

    def parameters(self) -> int:
        """Exact number of the model's parameters."""
        with torch.device("meta"):
            return sum(p.numel() for p in self.network().parameters())


def pose_case(
    name: str, layout: PoseNetworkLayout, shape: tuple[int, ...], dtype: torch.dtype, flops: float | None
) -> RewardCase:
    """MapAnything's pose path on ``shape`` frames."""
    plan = plan_resize(*shape[-2:])

    def body(network: nn.Module) -> nn.Module:
        assert isinstance(network, PoseNetwork)
        # The marker of the reference view is a constant of the model, not a weight.
        network.info_sharing.view_pos_table.copy_(torch.arange(layout.trunk_width).remainder(2).view(1, -1))
        return PoseBody(network.set_size(*plan.output))

    return RewardCase(
        name, shape, flops, lambda: PoseNetwork(layout).use_matrix_dtype(dtype), body,
        lambda device: (torch.randn(*shape[:3], *plan.output, device=device),),
    )  # fmt: skip


def qwen_case(
    name: str, layout: QwenLayout, head: Callable[[QwenLayout], nn.Module], area: tuple[int, int],
    shape: tuple[int, ...], length: int, reads: tuple[int, ...], dtype: torch.dtype, flops: float | None,
) -> RewardCase:  # fmt: skip
    """A vision-language scorer on ``shape`` frames: videos, or single images where a row has one frame."""
    rows, frames = shape[:2]
    fitted = fit_size(*shape[-2:], factor=layout.factor, min_pixels=area[0], max_pixels=area[1])
    grid, slices = (fitted[0] // layout.patch, fitted[1] // layout.patch), max(1, frames // 2)
    visual = slices * grid[0] * grid[1] // layout.merge**2

    def inputs(device: torch.device) -> tuple[Tensor, ...]:
        patches = torch.randn(rows, slices, grid[0] * grid[1], layout.patch_values, device=device)
        ids = torch.randint(0, layout.rows, (rows, length), device=device)
        return patches, ids, torch.tensor([reads] * rows, device=device)

    def body(network: nn.Module) -> nn.Module:
        assert isinstance(network, RewardQwen)
        return StaticBody(network, grid, length, range(FIRST_VISUAL, FIRST_VISUAL + visual))

    return RewardCase(
        name, shape, flops, lambda: RewardQwen(layout, head(layout)).use_matrix_dtype(dtype), body, inputs
    )


def tiny_cases() -> Iterator[RewardCase]:
    """The harness on any machine."""
    yield pose_case("mapanything_v1.1", TINY_POSE, (1, 2, 3, 20, 60), torch.float32, None)
    area = (28 * 28, 56 * 84)
    yield qwen_case(
        "videoalign", TINY_QWEN, videoalign_head, area, (2, 4, 3, 60, 90), 60, (45, 55), torch.float32, None
    )
    yield qwen_case("hpsv3", TINY_QWEN, hpsv3_head, area, (2, 1, 3, 60, 90), 60, (55,), torch.float32, None)


def cases(quick: bool) -> Iterator[RewardCase]:
    """Released sizes, 480 x 832: a few videos or frames per language pass; all 81 frames and one per latent frame.

    In the order of what a second tells; `quick` leaves the longest out.
    """
    dtype = torch.bfloat16
    for rows in (4,) if quick else (1, 4):
        flops = rows * qwen_flops("2b", 5, 1008, VIDEOALIGN_LENGTH)
        yield qwen_case(
            "videoalign", VIDEOALIGN_BODY, videoalign_head, (100352, 200704), (rows, 10, 3, *FRAME), VIDEOALIGN_LENGTH,
            VIDEOALIGN_READS, dtype, flops,
        )  # fmt: skip
    for rows in (4,) if quick else (1, 8):
        flops = rows * qwen_flops("7b", 1, 1008, HPSV3_LENGTH)
        yield qwen_case(
            "hpsv3", HPSV3_BODY, hpsv3_head, (200704, 200704), (rows, 1, 3, *FRAME), HPSV3_LENGTH, HPSV3_READS, dtype,
            flops,
        )  # fmt: skip
    for release in ("v1.1",) if quick else ("v1.1", "v1"):
        for frames in (21,) if quick else (81, 21):
            shape = (1, frames, 3, *FRAME)
            flops = pose_path_flops(release, frames)
            yield pose_case(f"mapanything_{release}", LAYOUTS[release], shape, dtype, flops)


def with_random_weights(case: RewardCase, device: torch.device) -> nn.Module:
    """The case's body on ``device``, frozen; weights are random and keep activations near size one."""
    torch.manual_seed(0)
    with torch.device("meta"):
        network = case.network()
    network = network.to_empty(device=device).eval().requires_grad_(False)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return case.body(network).to(device)


def predicted_ms(bench: Bench, case: RewardCase) -> float | None:
    """What the cost model says, on the profile of this device."""
    return 1e3 * case.flops / bench.profile.reward if bench.profile and case.flops else None


def price_s(case: RewardCase, profile: DeviceProfile | None) -> float:
    """Seconds that the rows of a case take, on an unknown card those of the slowest known one."""
    ms = 1e3 * (case.flops or 0.0) / (profile or SLOWEST).reward
    return MAKE_S + 1e-3 * ms * (2 * sum(calls_for(ms)) + BESIDE)


def bench_case(bench: Bench, case: RewardCase) -> None:
    """The eager and the graph row of one body; running out of memory is a row as well."""
    fields: Row = {"direction": "fwd", "shape": list(case.shape), "flops": case.flops}
    fields |= {"predicted_ms": predicted_ms(bench, case), "parameters": case.parameters()}
    print(f"{case.name}: {fields['parameters']:,} parameters, predicted {fields['predicted_ms']} ms", flush=True)
    try:
        body = with_random_weights(case, bench.device)
        weights = (*body.parameters(), *body.buffers())
        fields["weight_bytes"] = sum(tensor.nbytes for tensor in weights)
        inputs = [case.inputs(bench.device) for _ in range(BUFFERS)]
        eager = exactly(body)
        with torch.no_grad():
            outputs = [eager(*sample) for sample in inputs]
            again = eager(*inputs[0])
            fields["finite"] = all(bool(value.isfinite().all()) for out in outputs for value in out.values())
            fresh_peak()
            time_row(bench, case, "eager", lambda i: eager(*inputs[i]), same(outputs[:1], [again]), fields)
        graphed = GraphedScorer(eager, body, CudaGraphBackend())
        fresh_peak()
        began = time.perf_counter()
        first = [graphed(*sample) for sample in inputs]
        fields["capture_s"] = time.perf_counter() - began
        equal = same(outputs, first)
        time_row(bench, case, "graph", lambda i: graphed(*inputs[i]), equal, fields)
        later = same(outputs, [graphed(*sample) for sample in inputs])
        bench.file.amend(bitwise_equal=equal and later, graph=graphed.counts.captures > 0)
    except torch.OutOfMemoryError as error:
        bench.not_run(case.name, "ours", "fwd", case.shape, f"out of memory: {str(error).splitlines()[0]}")
    except Exception as error:  # costs this model only
        bench.add("reward", case.name, "ours", direction="fwd", shape=list(case.shape), status="failed",
                  note=first_line(error))  # fmt: skip
        bench.lost = lost_device(bench.device)


def time_row(bench: Bench, case: RewardCase, impl: str, call: Callable[[int], Any], equal: bool, fields: Row) -> None:
    """Times one way of running a body; the peak counts weights, inputs, and a graph's memory where it was captured."""
    cuda = bench.device.type == "cuda"
    timing = measure(call, bench.device, bench.repeats, BUFFERS)
    launches = count_launches(call, bench.device)
    peak = torch.cuda.max_memory_allocated(bench.device) if cuda else None
    reserved = torch.cuda.max_memory_reserved(bench.device) if cuda else None
    bench.add(
        "reward", case.name, impl, **fields, **timing, launches=launches, peak_mem_bytes=peak,
        reserved_mem_bytes=reserved, bitwise_equal=equal,
    )  # fmt: skip


def same(expected: list[dict[str, Tensor]], found: list[dict[str, Tensor]]) -> bool:
    """Bit for bit."""
    pairs = zip(expected, found, strict=True)
    return all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in pairs)


def bench_turns(bench: Bench, chosen: list[RewardCase]) -> None:
    """Scorers that share one device buffer: seconds per swap, and replays that still equal eager after it."""
    bodies = {case.name: with_random_weights(case, bench.device) for case in chosen}
    inputs = {case.name: case.inputs(bench.device) for case in chosen}
    with torch.no_grad():
        outputs = {name: exactly(body)(*inputs[name]) for name, body in bodies.items()}
    arena = WeightArena({name: body.network for name, body in bodies.items()}, bench.device)
    backend = CudaGraphBackend()
    runs = {name: GraphedScorer(exactly(body), body, backend) for name, body in bodies.items()}

    def turn(name: str) -> Any:
        arena.activate(name)
        return runs[name](*inputs[name])

    equal = all(same([outputs[name]], [turn(name)]) for _ in range(3) for name in runs)
    moved = sum(run.counts.moved for run in runs.values())

    def swap(_: int) -> None:
        for name in runs:
            arena.activate(name)

    size = sum(p.nbytes for body in bodies.values() for p in body.network.parameters())
    timing = measure(swap, bench.device, bench.repeats)
    bench.add(
        "reward", "weights_take_turns", "arena", direction="fwd", shape=[len(runs)], bytes_min=float(size), **timing,
        weight_bytes=arena.device_bytes, bitwise_equal=equal and moved == 0,
    )  # fmt: skip


def plan(only: str) -> None:
    """Exact sizes, FLOPs and predicted times of all cases; nothing is measured."""
    print(f"{'model':18s} {'frames':22s} {'parameters':>14s} {'TFLOP':>8s}  predicted ms on " + ", ".join(DEVICES))
    for case in cases(quick=False):
        if chosen(case.name, only):
            assert case.flops is not None
            times = "  ".join(f"{1e3 * case.flops / device.reward:9.1f}" for device in DEVICES.values())
            shape = " x ".join(str(n) for n in case.shape)
            print(f"{case.name:18s} {shape:22s} {case.parameters():>14,d} {case.flops / 1e12:8.2f}  {times}")


def release_memory() -> None:
    """Give back what the last case held, graphs included."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def fresh_peak() -> None:
    """Start the peaks of memory anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def main() -> int:
    """Entry point; 2 without a device."""
    parser = options_parser(__doc__, "models", "one shape of each model")
    parser.add_argument("--plan", action="store_true", help="print sizes and predictions, measure nothing")
    options = parser.parse_args()
    if options.plan:
        plan(options.only)
        return 0
    bench = bench_of(options, "--plan or --self-check")
    if bench is None:
        return 2
    chosen_cases = [c for c in (tiny_cases() if bench.small else cases(bench.quick)) if chosen(c.name, options.only)]
    bench.ceilings("first")
    for case in chosen_cases:
        release_memory()
        reason = bench.lost or bench.late(price_s(case, bench.profile))
        if reason:
            bench.not_run(case.name, "ours", "fwd", case.shape, reason)
        else:
            bench_case(bench, case)
    release_memory()
    turns = {case.name: case for case in chosen_cases if case.name in ("mapanything_v1.1", "videoalign")}
    if len(turns) == 2:
        reason = bench.lost or bench.late(TURNS_S)
        if reason:
            bench.not_run("weights_take_turns", "arena", "fwd", (2,), reason)
        else:
            bench_turns(bench, list(turns.values()))
    release_memory()
    if not bench.lost:
        bench.ceilings("last")
    if bench.file.path:
        print(f"wrote {bench.file.path}")
    unequal = [row for row in bench.rows if row.get("bitwise_equal") is False]
    for row in unequal:
        print(f"FAILED {row['name']} {row['impl']} {row['shape']}: not equal bit for bit", file=sys.stderr)
    failed = [row for row in bench.rows if row.get("status") == "failed"]
    for row in failed:
        print(f"FAILED {row['name']} {row['shape']}: {row['note']}", file=sys.stderr)
    return 1 if unequal or failed else 0


if __name__ == "__main__":
    sys.exit(main())

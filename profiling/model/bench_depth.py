"""One RL iteration of the 1.3B model on fewer blocks, extrapolated to all of them and checked against a whole pass.

    python profiling/model/bench_depth.py [--quick] [--out FILE.jsonl]       on a CUDA device; --quick: depths 1, 2, 4
    python profiling/model/bench_depth.py --one [--until TIME] [...]         one iteration of 2 blocks, all exact levers
    python profiling/model/bench_depth.py --plan                             predicted seconds, any machine
    python profiling/model/bench_depth.py --self-check [--out FILE.jsonl]    any machine, a tiny model

All tokens of 81 x 480 x 832, random weights of the true shapes, one group of 4, T = 25, window of 4 from step 2, the
real video decoder with random weights, no scorers (`bench_rewards.py` times those). The time of every phase is a line
in the number of blocks: two depths fix it, a third checks it (within 3 %), and one forward and one with its backward of
all blocks check its end. Settings: `off` runs plain torch kernels and no lever; `exact` all exact levers, fused kernels
and compiled blocks; `int8` the same with int8 attention after the window, where a run would use it beside this card's
core. Gradients of `off` and `exact` are compared. `--one` takes the largest iteration that is predicted to end by
`--until`: all of it, that of two members, that of two members and seven steps; its warm-up has rows, too. Exit code: 0,
or 1 if an extrapolated time misses or gradients differ (`--self-check`: gradients only).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geoalign.config.load import load_config
from geoalign.config.schema import Config
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.models.dit import RetakeDiT
from geoalign.models.wan_vae import WanCodec
from geoalign.perf.budget import Plan, Walk, count_passes
from geoalign.perf.cost import Speedups, TransformerCost, wan_decode_flops
from geoalign.perf.devices import DEVICES, DeviceProfile
from geoalign.perf.phases import phase_work
from geoalign.policy.policy import RetakePolicy
from geoalign.rewards.base import RewardOutput
from geoalign.training.modes import MODES
from geoalign.training.telemetry import plan_of
from geoalign.training.trainer import Trainer
from geoalign.types import Encodings, RetakeBatch, SourceClip
from geoalign_kernels import report, use_backend

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))  # scripts of one checkout, not a package

from bench_ops import Bench, bench_of, options_parser
from bench_prices import COMPILE_S, SLOWEST

TOLERANCE = 0.03
"""How far an extrapolated time may be from the measured one."""
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "off": {
        "run": {"compile": False},
        "levers": {
            "share_prefix": False, "merge_first_step": False, "prune_source": False, "cache_phases": False,
            "recompute": "full", "streaming": "off",
        },
    },
    "exact": {"run": {"compile": True}},
    "int8": {"run": {"compile": True}, "ode": {"attention": "int8"}},
}  # fmt: skip
SHORT = {"flow": {"steps": 7}, "groups": {"size": 2}}
"""Of a warm-up: every shape of an iteration, few of its steps."""
SIZES: tuple[dict[str, Any], ...] = ({}, {"groups": {"size": 2}}, SHORT)
"""What `--one` chooses from, the most telling first."""
GRAPHS, MAKE_S = 4, 10.0
"""Assumed: graphs of blocks that `torch.compile` makes (with and without gradients, first and last block); the rest."""
PHASES = ("rollout/prefix", "rollout/window", "rollout/tail", "rollout/decode", "update/forward", "update/backward",
          "update/optimizer")  # fmt: skip
TINY_MODEL = {"dim": 48, "heads": 2, "ffn_dim": 96, "text_dim": 16, "text_length": 8, "freq_dim": 16, "image_dim": 12}


@dataclass(frozen=True, slots=True)
class Scene:
    """What the iterations work on.

    Attributes:
        config: of the full model.
        codec: with random weights.
        device: to run on.
        depths: numbers of blocks, rising; the last one checks the line through the others.
        compared: depth of the settings that are compared.
    """

    config: Config
    codec: WanCodec
    device: torch.device
    depths: tuple[int, ...]
    compared: int

    @staticmethod
    def of(small: bool, quick: bool, device: torch.device) -> Scene:
        """The true sizes, or tiny ones for a CPU."""
        from diffusers import AutoencoderKLWan

        config = _changed(paper(), run={"device": device.type, "compile": False})
        depths = (1, 2, 4) if quick else (2, 4, 8)
        if small:
            config = _changed(
                config,
                model=TINY_MODEL | {"layers": 4},
                flow={"steps": 7},
                data={"num_frames": 5, "height": 32, "width": 32},
            )
            depths = (1, 2, 3)
        with torch.device(device):
            vae = AutoencoderKLWan(base_dim=8 if small else 96)
        codec = WanCodec(vae.to(torch.float32 if small else torch.bfloat16))
        return Scene(config, codec, device, depths, depths[1])

    def model(self, layers: int) -> RetakeDiT:
        """A network of that many blocks, its weights drawn from a fixed seed."""
        torch.manual_seed(0)
        with torch.device(self.device):
            network = RetakeDiT(self.config.model.model_copy(update={"layers": layers}))
        with torch.no_grad():
            for parameter in network.parameters():  # no zero-initialised part may hide an error
                parameter.add_(0.02 * torch.randn_like(parameter))
        return network

    def trainer(self, layers: int, setting: str, **changes: dict[str, Any]) -> Trainer:
        """A trainer of `layers` blocks under a setting; `changes` shorten a warm-up."""
        config = _changed(self.config, **SETTINGS[setting])
        config = _changed(config, **{"model": {"layers": layers}} | changes)
        if self.device.type == "cpu":  # compilation has its own tests
            config = _changed(config, run={"compile": False})
        return Trainer(config, RetakePolicy(self.model(layers), self.codec), self, {"mean": MeanPixel()})

    def batch(self, iteration: int, group_ids: list[int]) -> RetakeBatch:
        """Random conditions, everything encoded."""
        frames, height, width = self.config.data.video
        model, count, device = self.config.model, len(group_ids), self.device
        generator = torch.Generator(device).manual_seed(iteration)

        def normal(*shape: int) -> Tensor:
            return torch.randn(count, *shape, device=device, generator=generator)

        poses = torch.eye(4, device=device).repeat(count, frames, 1, 1)
        poses[:, :, 0, 3] = torch.linspace(0.0, 1.0, frames, device=device)
        camera = CameraTrajectory.build(poses)
        source = SourceClip(normal(frames, 3, height, width).clamp(-1, 1), camera, None, ("clip",) * count)
        encodings = Encodings(
            latents=normal(*self.codec.latent_shape(frames, height, width)),
            context=normal(model.text_length, model.text_dim),
            image_tokens=normal(257, model.image_dim or 1),
        )
        return RetakeBatch(source, camera, ("",) * count, encodings)


class MeanPixel:
    """A score that costs nothing."""

    name, keys = "mean", ("mean",)

    def __call__(self, videos: Tensor, batch: RetakeBatch) -> RewardOutput:
        """Mean of all pixels, one per video."""
        score = videos.double().mean((1, 2, 3, 4))
        return RewardOutput({"mean": score}, torch.ones(len(videos), dtype=torch.bool, device=videos.device))


def paper() -> Config:
    """The paper's run with one group of four and nothing to score."""
    return _changed(
        load_config(Config, "paper_64xa800"),
        groups={"conditions": 1, "size": 4, "rows_per_forward": 1},
        window={"kind": "fixed", "start": 2, "size": 4, "max_start": None},
        rewards={},
        advantage={"weights": {}},
        data={"use_cache": False},
    )


def _changed(config: Config, **sections: Any) -> Config:
    updates = {
        name: getattr(config, name).model_copy(update=update) if name != "rewards" else update
        for name, update in sections.items()
    }
    return Config.model_validate(config.model_copy(update=updates).model_dump())


@contextmanager
def kernels_of(setting: str) -> Iterator[None]:
    """Plain torch under `off`, all ops but attention; else the fastest that is there."""
    if setting != "off":
        yield
        return
    plain = [row["op"] for row in report() if not row["op"].startswith(("attention", "flow", "frame"))]
    with use_backend("reference", *plain):
        yield


def predicted_ms(config: Config, layers: int, setting: str, profile: DeviceProfile) -> dict[str, float]:
    """Milliseconds of each phase by the cost model; phases that it does not know are left out."""
    work = replace(TransformerCost.of(config.model, *config.data.video), layers=layers)
    config = _changed(config, **SETTINGS[setting])
    plan, window = plan_of(config), config.window
    speedups = Speedups() if setting == "off" else Speedups(kernels="fused", cached=True, pruned=True)
    walk = Walk(window.start, window.size, config.flow.steps - window.start - window.size)
    plan = replace(plan, speedups=speedups, attention="int8" if setting == "int8" else "exact")
    found = phase_work(work, plan, walk, 1, config.groups.size, 1, profile)
    return {name: 1e3 * phase.seconds for name, phase in found.items() if phase.seconds is not None}


def price_s(config: Config, layers: int, changes: dict[str, Any], profile: DeviceProfile | None) -> float:
    """Seconds of one compiled iteration and its warm-up, decoding and compilers included."""
    profile, seconds = profile or SLOWEST, COMPILE_S * GRAPHS + MAKE_S
    frames, height, width = config.data.video
    decode = wan_decode_flops((frames + 3) // 4, height // 8, width // 8) / profile.convolution
    for parts in (SHORT, changes):
        part = _changed(config, **parts)
        seconds += 1e-3 * sum(predicted_ms(part, layers, "exact", profile).values()) + part.groups.size * decode
    return seconds


def add_phases(
    bench: Bench, metrics: dict[str, float], setting: str, expected: dict[str, float], **common: Any
) -> dict[str, float]:
    """A row for each phase of an iteration; their milliseconds."""
    times = {name: 1e3 * metrics.get(f"time/{name}_s", 0.0) for name in PHASES}
    for name, ms in times.items():
        bench.add("phase", name, setting, t_ms_median=ms, predicted_ms=expected.get(name), direction="", n_rep=1,
                  **common)  # fmt: skip
    return times


def iteration(
    bench: Bench, scene: Scene, layers: int, setting: str, changes: dict[str, Any] | None = None
) -> tuple[dict[str, float], Tensor]:
    """Time one iteration after a short one of equal shapes; milliseconds by phase, and the first moment of AdamW.

    With `changes`, which make it shorter, the warm-up has rows of its own: they stay if the process is ended.
    """
    config = _changed(scene.config, **changes or {})
    common: dict[str, Any] = {"variant": f"{layers} blocks", "shape": [layers]}
    with kernels_of(setting):
        warm_up = scene.trainer(layers, setting, **SHORT)
        core = warm_up.policy.model.execution.core or ""
        if setting == "int8" and warm_up.policy.fast is None:
            reason = f"int8 attention does not pay beside the core {core}: this run would be the exact one"
            bench.not_run("iteration", setting, "", [layers], reason, common["variant"])
            return {}, torch.zeros(0)
        metrics = warm_up.step()
        if changes is not None:
            again = common | {"variant": f"{layers} blocks, warm-up", "n_warm": 0, "note": "compilers included"}
            add_phases(bench, metrics, setting, {}, **again)
        trainer = scene.trainer(layers, setting, **changes or {})
        began = time.perf_counter()
        metrics = trainer.step()
        total = 1e3 * (time.perf_counter() - began)
    assert metrics["perf/forward_equivalents"] == metrics["perf/predicted_forward_equivalents"]
    profile = bench.profile.with_core(core) if bench.profile else None
    expected = predicted_ms(config, layers, setting, profile) if profile else {}
    common["n_warm"] = 1
    times = add_phases(bench, metrics, setting, expected, **common)
    notes = [f"{metrics['perf/forward_equivalents']:.0f} forward equivalents, attention core {core}"]
    notes += [f"{config.groups.size} members, {config.flow.steps} steps"] if changes else []
    notes += [f"modes of the blocks: {', '.join(trainer.notes[MODES])}"] if MODES in trainer.notes else []
    peak = int(1e9 * metrics["perf/peak_memory_gb"])
    bench.add("iteration", "iteration", setting, t_ms_median=total, peak_mem_bytes=peak, note="; ".join(notes),
              predicted_ms=sum(expected.values()) or None, direction="", n_rep=1, **common)  # fmt: skip
    moments = trainer.state().snapshot.optimizer
    return times | {"iteration": total}, torch.cat([entry["exp_avg"].flatten() for entry in moments.values()])


def whole_pass(bench: Bench, scene: Scene) -> dict[str, float]:
    """Milliseconds of one forward, and of one learner forward with backward, of all blocks by plain kernels."""
    layers = scene.config.model.layers
    with kernels_of("off"):
        trainer = scene.trainer(layers, "off")
        policy, batch = trainer.policy, scene.batch(0, [0])
        precomputed = policy.precompute(policy.condition(batch))
        x = torch.randn(1, *policy.latent_shape(batch), device=scene.device)
        at = torch.full((1,), 500.0, device=scene.device)

        def forward() -> None:
            with torch.no_grad():
                policy.velocity(x, at, precomputed)

        def both() -> None:
            policy.velocity(x, at, precomputed).value.sum().backward()

        found = {}
        for name, call in (("forward", forward), ("forward+backward", both)):
            call()
            found[name] = min(_timed(call, scene.device) for _ in range(2))
            bench.add("phase", name, "off", variant=f"{layers} blocks", direction="", shape=[layers], n_warm=1, n_rep=2,
                      t_ms_median=found[name])  # fmt: skip
    return found


def _timed(call: Any, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - began)


def on_line(first: tuple[int, float], second: tuple[int, float], layers: int) -> float:
    """The value at `layers` of the line through two (blocks, value) points."""
    slope = (second[1] - first[1]) / (second[0] - first[0])
    return first[1] + slope * (layers - first[0])


def extrapolate(bench: Bench, scene: Scene, sweep: dict[int, dict[str, float]], truth: dict[str, float]) -> list[str]:
    """Rows for the last depth and for one whole pass, each beside what the line gives; what misses by over 3 %."""
    (first, second, last), misses = scene.depths, []

    def line(name: str, layers: int) -> float:
        return on_line((first, sweep[first][name]), (second, sweep[second][name]), layers)

    def compare(name: str, layers: int, given: float, measured: float) -> None:
        away = given / measured - 1
        note = f"the line through {first} and {second} blocks is {100 * away:+.1f} % off"
        bench.add("phase", name, "line", variant=f"{layers} blocks", direction="", shape=[layers], t_ms_median=given,
                  note=note)  # fmt: skip
        if abs(away) > TOLERANCE:
            misses.append(f"{name} at {layers} blocks: {note}")

    count = count_passes(Walk(2, 4, scene.config.flow.steps - 6), 1, scene.config.groups.size, 1, Plan())
    compare("iteration", last, line("iteration", last), sweep[last]["iteration"])
    layers = scene.config.model.layers
    learner = line("update/forward", layers) + line("update/backward", layers)
    compare("forward", layers, line("rollout/tail", layers) / count.tail, truth["forward"])
    compare("forward+backward", layers, learner / count.backward, truth["forward+backward"])
    bench.add("iteration", "iteration", "line", variant=f"{layers} blocks", direction="", shape=[layers],
              t_ms_median=line("iteration", layers), note="extrapolated")  # fmt: skip
    return misses


def plan() -> None:
    """Predicted seconds of every setting and depth; nothing is measured."""
    config = paper()
    print(f"{'setting':8s} {'blocks':>6s}  predicted seconds of an iteration without decoder, on " + ", ".join(DEVICES))
    for setting, depths in (("off", (2, 4, 8, 30)), ("exact", (4, 30)), ("int8", (4, 30))):
        for layers in depths:
            seconds = [1e-3 * sum(predicted_ms(config, layers, setting, d).values()) for d in DEVICES.values()]
            print(f"{setting:8s} {layers:6d}  " + "  ".join(f"{value:9.1f}" for value in seconds))


def one(bench: Bench, scene: Scene) -> list[str]:
    """The rows of one iteration with the exact levers, the largest that fits; nothing is extrapolated."""
    bench.ceilings("first")
    late = ""
    for changes in SIZES:
        late = bench.late(0.0 if bench.small else price_s(scene.config, scene.compared, changes, bench.profile))
        if not late:
            iteration(bench, scene, scene.compared, "exact", changes)
            break
    else:
        bench.not_run("iteration", "exact", "", [scene.compared], late, f"{scene.compared} blocks")
    bench.ceilings("last")
    return []


def run(bench: Bench, scene: Scene) -> list[str]:
    """All rows; what was not as it must be (tiny sizes: times are not judged)."""
    bench.ceilings("first")
    sweep, moments = {}, {}
    for layers in scene.depths:
        sweep[layers], moments[layers] = iteration(bench, scene, layers, "off")
    misses = extrapolate(bench, scene, sweep, whole_pass(bench, scene))
    _, exact = iteration(bench, scene, scene.compared, "exact")
    iteration(bench, scene, scene.compared, "int8")
    plain = moments[scene.compared]
    cosine = float(torch.nn.functional.cosine_similarity(plain.double(), exact.double(), dim=0))
    relative = float((plain - exact).double().norm() / plain.double().norm())
    bench.add("phase", "gradient", "exact", variant=f"{scene.compared} blocks", direction="", shape=[plain.numel()],
              rel_l2=relative, note=f"cosine {cosine:.6f} with off")  # fmt: skip
    bench.ceilings("last")
    # bfloat16 gradients of other kernels and batch orders agree to some 2^-8 of their size.
    limit = 1e-4 if bench.small else 5e-2
    wrong = [] if bench.small else misses
    return wrong + ([f"gradients of off and exact differ by {relative:.2g}"] if not relative <= limit else [])


def main() -> int:
    """Entry point; 2 without a device, 1 if a check fails."""
    parser = options_parser(__doc__, None, "depths 1, 2 and 4")
    parser.add_argument("--one", action="store_true", help="only one iteration of the second depth, all exact levers")
    parser.add_argument("--plan", action="store_true", help="print predictions, measure nothing")
    options = parser.parse_args()
    if options.plan:
        plan()
        return 0
    bench = bench_of(options, "--plan or --self-check")
    if bench is None:
        return 2
    if options.until and not options.one:
        parser.error("--until needs --one: the other iterations belong together")
    scene = Scene.of(bench.small, bench.quick or options.one, bench.device)
    wrong = one(bench, scene) if options.one else run(bench, scene)
    if bench.file.path:
        print(f"wrote {bench.file.path}")
    for text in wrong:
        print(f"FAILED {text}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""Time group rollouts of a diffusers Wan network: the stock loop, GroupRollout, GroupRollout on accelerated blocks.

python profiling/model/bench_dropin.py --json FILE            a tiny network on a CPU, the 1.3B shapes on a GPU
python profiling/model/bench_dropin.py --json FILE --quick    fewer steps and members; on a GPU under three minutes

The stock loop runs every member by itself, as flow_grpo does, with the noises of the rollout handed to it. Outputs are
compared and the replay is checked before anything is timed; runs take turns, so that a slow minute hits all alike.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from geoalign.files.atomic import atomic_write_json
from geoalign.flow.sampler import initial_noise
from geoalign.flow.table import StepTable
from geoalign.integrations import GroupRollout, GroupSamples
from geoalign.jobs.environment import describe_environment
from geoalign_kernels import NoiseKey, accelerate, philox_normal

VARIANTS = ("stock", "group", "group+accelerate")
IDS = torch.zeros(1, dtype=torch.int64)
# Relative L2 distance of the final latents that rounding explains, through T network evaluations.
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Plan:
    """What is run: the network, the video, the trajectory."""

    device: str
    dtype: str
    network: dict[str, Any]
    latent: tuple[int, int, int, int]
    text_tokens: int
    steps: int
    window: int
    group: int
    starts: tuple[int, ...]
    repeats: int

    def forwards(self, start: int, variant: str) -> int:
        """Network evaluations of one group."""
        plain = self.group * self.steps
        return plain if variant == "stock" else start + 1 + self.group * (self.steps - start - 1)


# Deep enough that drawing noise and taking steps on the host, which no deeper network pays more for, is a few percent.
CPU = Plan(
    "cpu", "float32",
    {"num_attention_heads": 2, "attention_head_dim": 48, "ffn_dim": 560, "num_layers": 8, "text_dim": 64,
     "freq_dim": 64},
    (16, 3, 16, 24), 64, steps=25, window=4, group=12, starts=(2, 10, 18), repeats=5,
)  # fmt: skip
GPU = Plan(
    "cuda", "bfloat16",
    {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30, "text_dim": 4096,
     "freq_dim": 256},
    (16, 21, 60, 104), 512, steps=25, window=4, group=12, starts=(2, 10, 18), repeats=1,
)  # fmt: skip
QUICK = {
    "cpu": {
        "network": CPU.network | {"num_layers": 2},
        "latent": (16, 3, 8, 12),
        "steps": 8,
        "window": 2,
        "group": 3,
        "starts": (1, 5),
        "repeats": 2,
    },
    "cuda": {"latent": (16, 9, 60, 104), "steps": 10, "window": 2, "group": 4, "starts": (1, 4, 7), "repeats": 1},
}


def network_of(plan: Plan) -> nn.Module:
    """Random weights in diffusers' own class; times do not depend on their values."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    with torch.device(plan.device):
        channels = {"in_channels": plan.latent[0], "out_channels": plan.latent[0]}
        model = WanTransformer3DModel(cross_attn_norm=True, **channels, **plan.network)
    kept = model._keep_in_fp32_modules
    for name, parameter in model.named_parameters():
        if not any(part in name.split(".") for part in kept):
            parameter.data = parameter.data.to(getattr(torch, plan.dtype))
    return model.eval().requires_grad_(False)


def grid_of(plan: Plan) -> tuple[Tensor, Tensor]:
    """Levels and timesteps of WanPipeline's own scheduler."""
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    scheduler.set_timesteps(plan.steps)
    return scheduler.sigmas, scheduler.timesteps


class Bench:
    """One network and one prompt; every method runs the whole group."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.model = plan, network_of(plan)
        self.sigmas, self.timesteps = (part.to(plan.device) for part in grid_of(plan))
        generator = torch.Generator().manual_seed(1)
        prompt = torch.randn(1, plan.text_tokens, plan.network["text_dim"], generator=generator)
        self.prompt = prompt.to(plan.device, getattr(torch, plan.dtype))
        self.start = initial_noise(plan.latent, 0, 0, IDS.to(plan.device))

    def network(self, x: Tensor, timestep: Tensor, *, prompt: Tensor) -> Tensor:
        """The velocity, as WanPipeline asks for it."""
        given = {"hidden_states": x.to(prompt.dtype), "timestep": timestep, "encoder_hidden_states": prompt}
        return self.model(**given, return_dict=False)[0]

    def noises(self, start: int) -> Tensor:
        """[G, w, ...]: what the rollout draws by counter, for the stock loop."""
        members = torch.arange(self.plan.group)
        steps = range(start, start + self.plan.window)
        drawn = [philox_normal(self.plan.latent, NoiseKey(0, 0, IDS.expand_as(members), members, k)) for k in steps]
        return torch.stack(drawn, 1).to(self.plan.device)

    @torch.no_grad()
    def stock(self, start: int, noises: Tensor) -> tuple[Tensor, Tensor]:
        """Final latents [G, ...] and log-probabilities [G, w]: every member by itself, float32 steps of Flow-SDE."""
        finals, log_probs = [], []
        for member in range(self.plan.group):
            x, densities = self.start.clone(), []
            for k in range(self.plan.steps):
                v = self.network(x, self.timesteps[k : k + 1], prompt=self.prompt).float()
                if start <= k < start + self.plan.window:
                    x, density = self._stochastic(x, v, k, noises[member : member + 1, k - start])
                    densities.append(density)
                else:
                    x = x + (self.sigmas[k + 1] - self.sigmas[k]) * v
            finals.append(x)
            log_probs.append(torch.stack(densities, 1))
        return torch.cat(finals), torch.cat(log_probs)

    def _stochastic(self, x: Tensor, v: Tensor, k: int, noise: Tensor) -> tuple[Tensor, Tensor]:
        sigma, delta = self.sigmas[k], self.sigmas[k] - self.sigmas[k + 1]
        level = 0.7 * (sigma / (1 - sigma)).sqrt()
        mean = x - delta * (v + level**2 / (2 * sigma) * (x + (1 - sigma) * v))
        std = level * delta.sqrt()
        after = mean + std * noise
        density = -((after - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
        return after, density.flatten(1).mean(1)

    def group(self, start: int) -> GroupRollout:
        """The same trajectory with a shared prefix, one row a forward."""
        steps = range(start, start + self.plan.window)
        table = StepTable.from_sigmas(self.sigmas, self.timesteps, stochastic=steps)
        return GroupRollout(self.network, table, self.plan.group, rows_per_forward=1)

    def sample(self, rollout: GroupRollout) -> GroupSamples:
        """One group."""
        return rollout.sample({"prompt": self.prompt}, latents=self.start, group_ids=IDS.to(self.plan.device))


@contextmanager
def switched(model: nn.Module, variant: str):  # type: ignore[no-untyped-def]
    """The fused blocks for the variant that asks for them."""
    handle = accelerate(model) if variant.endswith("accelerate") else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def compare(bench: Bench, start: int, noises: Tensor) -> dict[str, dict[str, float]]:
    """Differences of each variant to the stock loop; ends the script where rounding does not explain them.

    Also a warm-up of every variant.
    """
    final, log_prob = bench.stock(start, noises)
    found = {}
    for variant in VARIANTS[1:]:
        rollout = bench.group(start)
        with switched(bench.model, variant):
            samples = bench.sample(rollout)
            replay = rollout.log_prob_diff(samples)
        distance = float((samples.latents - final).norm() / final.norm())
        found[variant] = {
            "final_rel_l2": distance,
            "log_prob_max_diff": float((samples.log_prob - log_prob).abs().max()),
            "replay_max_diff": replay,
        }
        forwards, counted = samples.rollout.forwards.total, bench.plan.forwards(start, variant)
        if distance > CLOSE[getattr(torch, bench.plan.dtype)] or replay != 0.0 or forwards != counted:
            raise SystemExit(f"start {start}, {variant}: {found[variant]}, {forwards} forwards, {counted} expected")
    return found


def timed(bench: Bench, run: Callable[[], Any]) -> float:
    """Seconds of one run."""
    if bench.plan.device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if bench.plan.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(bench: Bench) -> list[dict[str, Any]]:
    """Rows of the result file: every variant at every window start."""
    plan = bench.plan
    noises = {start: bench.noises(start) for start in plan.starts}
    differences = {start: compare(bench, start, noises[start]) for start in plan.starts}
    seconds: dict[tuple[int, str], list[float]] = {(s, v): [] for s in plan.starts for v in VARIANTS}
    for _ in range(plan.repeats):
        for start, variant in seconds:
            rollout = bench.group(start)
            run = (
                (lambda s=start: bench.stock(s, noises[s]))
                if variant == "stock"
                else (lambda r=rollout: bench.sample(r))
            )
            with switched(bench.model, variant):
                seconds[start, variant].append(timed(bench, run))
    rows = []
    for (start, variant), values in seconds.items():
        counted = plan.forwards(start, "stock") / plan.forwards(start, variant)
        speedup = float(np.median(seconds[start, "stock"]) / np.median(values))
        rows.append(
            {
                "start": start,
                "variant": variant,
                "forwards": plan.forwards(start, variant),
                "seconds_median": float(np.median(values)),
                "seconds_p20": float(np.percentile(values, 20)),
                "seconds_p80": float(np.percentile(values, 80)),
                "repeats": plan.repeats,
                "speedup": speedup,
                "counted_speedup": counted,
                "share_of_counted": speedup / counted,
                **differences[start].get(variant, {}),
            }
        )
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, required=True, help="result file")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="fewer steps and members")
    parser.add_argument("--repeats", type=int, help="timed runs of every variant (default 5 on a CPU, 1 on a GPU)")
    arguments = parser.parse_args()
    plan = CPU if arguments.device == "cpu" else GPU
    if arguments.quick:
        plan = replace(plan, **QUICK[arguments.device])
    if arguments.repeats:
        plan = replace(plan, repeats=arguments.repeats)
    for start in plan.starts:
        ours, stock = plan.forwards(start, "group"), plan.forwards(start, "stock")
        print(f"start {start}: {ours} of {stock} forwards, predicted speed-up of group at most {stock / ours:.2f}")
    rows = measure(Bench(plan))
    result = {"plan": asdict(plan), "rows": rows, "environment": describe_environment()}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_json(arguments.json, result)
    for row in rows:
        print(
            f"start {row['start']:>2} {row['variant']:>16}: {row['seconds_median']:.2f} s, {row['forwards']} forwards, "
            f"{row['speedup']:.2f} x stock, {row['share_of_counted']:.2f} of the counted ratio"
        )


if __name__ == "__main__":
    main()

"""Run by torchrun from ``test_distributed.py``: one iteration of every engine and layout on real processes.

Every rank first runs the whole iteration alone; then the ranks run it together with each engine. Scores are linear in
the pixels, so that what differs is the rounding of other batch shapes. Prints one line per check; any failure raises.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from training_cases import Brightness, smoke, trainer_of

from geoalign.config.schema import Config
from geoalign.training.distributed import ranks_of_environment
from geoalign.training.ranks import LocalRanks, Ranks
from geoalign.training.snapshot import Snapshot
from geoalign.training.trainer import Trainer

WINDOW = {"kind": "fixed", "start": 1, "size": 2, "max_start": None}
# Float32 over six steps of four blocks and their backward: a few hundred roundings of 2^-24, that AdamW's first steps
# (the sign of every gradient) do not amplify in the norm; the largest seen is 6e-7.
TOLERANCE = 2e-5
CASES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "deepspeed 1": {"parallel": {"engine": "deepspeed", "zero_stage": 1}},
    "deepspeed 2": {"parallel": {"engine": "deepspeed", "zero_stage": 2}},
    "fsdp": {"parallel": {"engine": "fsdp"}},
    "ulysses": {"parallel": {"sequence": 2}},
    "ddp bf16": {"run": {"dtype": "bfloat16"}},
    "fsdp bf16": {"run": {"dtype": "bfloat16"}, "parallel": {"engine": "fsdp"}},
}


def config_of(changes: dict[str, Any]) -> Config:
    optim = {"lr": 1e-3, "groups": (), "eps": 1e-8, "ema": 0.5, "warmup": 0, "schedule": "constant"}
    return smoke(**{"window": WINDOW, "advantage": {"weights": {}}, "optim": optim} | changes)


def run(changes: dict[str, Any], ranks: Ranks) -> tuple[Trainer, list[dict[str, float]], Snapshot]:
    trainer = trainer_of(config_of(changes), ranks, rewards={"b": Brightness()})
    metrics = [trainer.step() for _ in range(2)]
    return trainer, metrics, trainer.state().snapshot


def distance(a: Snapshot, b: Snapshot) -> float:
    """Largest relative distance of what a checkpoint holds: weights, their average, both moments."""
    tables = [(a.values, b.values), (a.average, b.average)]
    tables += [
        ({n: e[key] for n, e in a.optimizer.items()}, {n: e[key] for n, e in b.optimizer.items()})
        for key in ("exp_avg", "exp_avg_sq")
    ]
    worst = 0.0
    for left, right in tables:
        assert left.keys() == right.keys() and left
        x, y = (torch.cat([table[name].flatten().double() for name in left]) for table in (left, right))
        worst = max(worst, float((x - y).norm() / y.norm()))
    return worst


def check(name: str, changes: dict[str, Any], ranks: Ranks) -> None:
    """One engine against one process, and its snapshot restored into a second trainer."""
    alone = {key: value for key, value in changes.items() if key != "parallel"}
    _, expected_metrics, expected = run(alone, LocalRanks())
    trainer, metrics, found = run(changes, ranks)
    tolerance = TOLERANCE if "bf16" not in name else 2e-2  # 2^-8 a rounding
    assert distance(found, expected) < tolerance, f"{name}: {distance(found, expected):.2g}"
    for mine, theirs in zip(metrics, expected_metrics, strict=True):
        assert mine["parity/log_prob_diff_max"] == 0.0 and mine["policy/ratio_max"] == 1.0, name
        for key in ("policy/grad_norm", "policy/loss", "reward/bright"):
            assert abs(mine[key] - theirs[key]) <= tolerance * max(abs(theirs[key]), 1.0), f"{name} {key}"
    assert all(float(entry["step"]) == 2 for entry in found.optimizer.values())

    again = trainer_of(config_of(changes), ranks, rewards={"b": Brightness()})
    again.load(trainer.state())
    assert distance(again.state().snapshot, found) == 0.0, f"{name}: restored state differs"
    assert again.step()["policy/grad_norm"] == trainer.step()["policy/grad_norm"], f"{name}: restored run differs"
    assert distance(again.state().snapshot, trainer.state().snapshot) == 0.0
    if ranks.rank == 0:
        print(f"ok {name}: {distance(found, expected):.1e}", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    with ranks_of_environment(1, 120.0, cuda=False) as ranks:
        for name, changes in CASES.items():
            if len(sys.argv) > 1 and name not in sys.argv[1:]:
                continue
            ranks.sequence = changes.get("parallel", {}).get("sequence", 1)
            check(name, changes, ranks)
            dist.barrier()


if __name__ == "__main__":
    main()

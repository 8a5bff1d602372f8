"""Run by torchrun from ``test_distributed.py``: one iteration of every engine and layout on real processes.

Every rank first runs the whole iteration alone; then the ranks run it together with each engine. Scores are linear in
the pixels, so that what differs is the rounding of other batch shapes. Prints one line per check; any failure raises.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from training_cases import Brightness, paper_like_trainer, smoke, trainer_of

from geoalign.training.engines.snapshot import Snapshot
from geoalign.training.processes.ranks import LocalRanks, Ranks
from geoalign.training.processes.torchrun import ranks_of_environment
from geoalign.training.trainer import Trainer

WINDOW = {"kind": "fixed", "start": 1, "size": 2, "max_start": None}
# Float32 over six steps of four blocks and their backward: a few hundred roundings of 2^-24, that AdamW's first steps
# (the sign of every gradient) do not amplify in the norm; the largest seen is 6e-7.
TOLERANCE = 2e-5
KL_FLOOR = 1e-10  # before the first update the divergence is the square of a rounding
FSDP, BF16 = {"parallel": {"engine": "fsdp"}}, {"run": {"dtype": "bfloat16"}}
KL = {"objective": {"kl_weight": 0.1}}
CASES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "deepspeed 1": {"parallel": {"engine": "deepspeed", "zero_stage": 1}},
    "deepspeed 2": {"parallel": {"engine": "deepspeed", "zero_stage": 2}},
    "fsdp": FSDP,
    "ulysses": {"parallel": {"sequence": 2}},
    "ddp bf16": BF16,
    # With a KL term, recomputation and the paper's kind of model, from files in low precision.
    "fsdp kl": FSDP | KL | {"levers": {"recompute": "full"}},
    "paper ddp bf16": BF16 | {"levers": {"recompute": "keep_attention"}},
    "paper fsdp": FSDP | KL | {"levers": {"recompute": "keep_attention"}},
    "paper fsdp bf16": FSDP | BF16 | {"levers": {"recompute": "keep_attention"}},
    "paper fsdp compiled": FSDP
    | {
        "run": {"compile": True},
        "groups": {"size": 2, "rows_per_forward": 1},
        "levers": {"recompute": "keep_attention"},
    },
    "paper deepspeed ulysses": {"parallel": {"engine": "deepspeed", "sequence": 2}},
}


def build(name: str, changes: dict[str, Any], ranks: Ranks) -> Trainer:
    optim = {"lr": 1e-3, "groups": (), "eps": 1e-8, "ema": 0.5, "warmup": 0, "schedule": "constant"}
    changes = {"window": WINDOW, "advantage": {"weights": {}}, "optim": optim} | changes
    if name.startswith("paper"):
        return paper_like_trainer(ranks, weights=torch.bfloat16 if "bf16" in name else torch.float32, **changes)
    return trainer_of(smoke(**changes), ranks, rewards={"b": Brightness()})


def run(name: str, changes: dict[str, Any], ranks: Ranks) -> tuple[Trainer, list[dict[str, float]], Snapshot]:
    trainer = build(name, changes, ranks)
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
    _, expected_metrics, expected = run(name, alone, LocalRanks())
    trainer, metrics, found = run(name, changes, ranks)
    tolerance = TOLERANCE if "bf16" not in name else 2e-2  # 2^-8 a rounding
    assert distance(found, expected) < tolerance, f"{name}: {distance(found, expected):.2g}"
    for mine, theirs in zip(metrics, expected_metrics, strict=True):
        assert mine["parity/log_prob_diff_max"] == 0.0 and mine["policy/ratio_max"] == 1.0, name
        for key in ("policy/grad_norm", "policy/reference_kl"):
            difference = abs(mine.get(key, 0.0) - theirs.get(key, 0.0))
            assert difference <= 10 * tolerance * abs(theirs.get(key, 0.0)) + KL_FLOOR, f"{name} {key}"
        # A mean of pixels of both signs: what is left is a hundredth of them, and has a hundred times their rounding.
        if "bf16" not in name:
            difference = abs(mine["reward/bright"] - theirs["reward/bright"])
            assert difference <= 100 * tolerance * abs(theirs["reward/bright"]), name
    assert {value.dtype for value in found.values.values()} == {torch.float32}
    assert all(float(entry["step"]) == 2 for entry in found.optimizer.values())

    again = build(name, changes, ranks)
    again.load(trainer.state())
    assert distance(again.state().snapshot, found) == 0.0, f"{name}: restored state differs"
    assert again.step()["policy/grad_norm"] == trainer.step()["policy/grad_norm"], f"{name}: restored run differs"
    assert distance(again.state().snapshot, trainer.state().snapshot) == 0.0
    if ranks.rank == 0:
        print(f"ok {name}: {distance(found, expected):.1e}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*", help="names; default: all")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    with (
        tempfile.TemporaryDirectory() as cache,  # no rank reads what another one is compiling
        ranks_of_environment(1, 120.0, cuda=options.device == "cuda") as ranks,
    ):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        for name, changes in CASES.items():
            if options.cases and name not in options.cases:
                continue
            changes = changes | {"run": {"device": options.device, "dtype": "float32"} | changes.get("run", {})}
            ranks.sequence = changes.get("parallel", {}).get("sequence", 1)
            check(name, changes, ranks)
            dist.barrier()


if __name__ == "__main__":
    main()

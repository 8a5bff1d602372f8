"""Held-out evaluation inside a training run: before, on the way, after; clips and numbers for the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geoalign.config.schema import Config
from geoalign.files.atomic import atomic_path, nan_to_none
from geoalign.jobs.evaluate import METRICS, Evaluation, HeldOut, evaluate
from geoalign.jobs.evaluation_table import mean_of_defined
from geoalign.report.held_out import conditions, present_names
from geoalign.training.processes.ranks import LocalRanks, Ranks
from geoalign.training.trainer import Trainer


def conditions_of(config: Config) -> dict[str, Any]:
    """The settings, by dotted key, that decide on which held-out conditions a run is measured."""
    return conditions(config.model_dump(mode="json"))


@dataclass(frozen=True, slots=True)
class RunEvaluator:
    """Held-out evaluation of a run; does nothing without held-out pairs.

    Ranks that hold the whole model share the videos; those that hold parts of it make every video together.
    """

    config: Config
    trainer: Trainer
    folder: Path
    held_out: HeldOut | None
    ranks: Ranks

    @staticmethod
    def of(config: Config, trainer: Trainer, folder: Path) -> RunEvaluator:
        """The evaluation that ``config`` asks of this rank; renders its videos."""
        together = config.parallel.engine == "fsdp" or config.parallel.sequence > 1
        held_out = None if config.world is None else HeldOut.build(config)
        return RunEvaluator(config, trainer, folder, held_out, LocalRanks() if together else trainer.ranks)

    def _evaluate(self, held_out: HeldOut) -> Evaluation:
        return evaluate(self.trainer.policy, self.config, held_out, ranks=self.ranks)

    def on_the_way(self) -> dict[str, float]:
        """Means of the averaged policy, as metrics."""
        self.trainer.engine.swap_average()
        numbers = {}
        if self.held_out is not None:
            result = self._evaluate(self.held_out)
            numbers = {f"eval/{kind}_{m}": result.mean(kind, m) for kind in result.numbers for m in METRICS}
        self.trainer.engine.swap_average()
        return numbers

    def keep(self, stage: str) -> dict[str, dict[str, list[float | None]]]:
        """Evaluate, keep videos and cameras for the report, return the numbers per kind, metric and noise seed.

        They go into checkpoints, which are JSON: what is not defined is None.
        """
        if self.held_out is None:
            return {}
        result = self._evaluate(self.held_out)
        if self.trainer.ranks.rank == 0:
            _write_clips(self.folder / "eval" / f"{stage}.npz", self.held_out, result)
        return {kind: nan_to_none(rows) for kind, rows in result.numbers.items()}


def _write_clips(path: Path, held_out: HeldOut, result: Evaluation) -> None:
    pairs = held_out.sets.values()
    arrays = {
        "source": _bytes(torch.cat([p.batch.source.video for p in pairs])),
        "generated": _bytes(torch.cat(list(result.videos.values()))),
        "truth": _bytes(torch.cat([p.truth for p in pairs])),
        "source_c2w": torch.cat([p.batch.source.camera.c2w for p in pairs]).numpy(),
        "target_c2w": torch.cat([p.batch.target_camera.c2w for p in pairs]).numpy(),
        "estimated_c2w": torch.cat(list(result.estimated.values())).numpy(),
        "intrinsics": torch.cat([p.batch.target_camera.intrinsics for p in pairs]).numpy(),
        "names": np.array([name for p in pairs for name in p.names]),
    }
    planes = [p.batch.source.ground_plane for p in pairs]
    if all(plane is not None for plane in planes):
        arrays["ground_plane"] = torch.cat([plane for plane in planes if plane is not None]).numpy()
    with atomic_path(path) as temporary, temporary.open("wb") as file:  # of a name it would make another
        np.savez_compressed(file, **arrays)


def _bytes(video: torch.Tensor) -> np.ndarray[Any, Any]:
    return ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()


def held_out_summary(notes: Mapping[str, Any], after: Mapping[str, Mapping[str, list[float | None]]]) -> dict[str, Any]:
    """``held_out.{presets,random,mean}.{before,after}.{metric}`` means, and the same per noise seed beside it."""
    stages = {"before": notes.get("before", {}), "after": after}
    per_seed: dict[str, dict[str, Any]] = {}
    for stage, kinds in stages.items():
        rows = {kind: present_names(values) for kind, values in kinds.items()}
        if rows:
            metrics = next(iter(rows.values()))
            rows["mean"] = {
                m: [mean_of_defined(seed) for seed in zip(*(k[m] for k in rows.values()), strict=True)] for m in metrics
            }
        for kind, values in rows.items():
            per_seed.setdefault(kind, {})[stage] = values
    means = {
        kind: {stage: {m: mean_of_defined(v) for m, v in rows.items()} for stage, rows in stage_rows.items()}
        for kind, stage_rows in per_seed.items()
    }
    return {"held_out": means, "held_out_per_noise_seed": per_seed}

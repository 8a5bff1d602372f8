"""A whole training run: set-up, evaluation before, the loop with checkpoints and clean stops, evaluation after."""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geoalign.config.load import to_yaml
from geoalign.config.schema import Config
from geoalign.data.source import RetakeDataset
from geoalign.errors import CheckpointError, UsageError
from geoalign.export.formats import save_safetensors
from geoalign.io_utils import atomic_path, atomic_write_json, atomic_write_text
from geoalign.models.codec import PatchCodec
from geoalign.rewards.registry import build_rewards
from geoalign.training.bundle import open_base, save_policy
from geoalign.training.checkpoint import CheckpointWriter, TrainState, config_hash, list_checkpoints, load_checkpoint
from geoalign.training.device import device_of, dtype_of
from geoalign.training.distributed import ranks_of_environment
from geoalign.training.encoders import encoder_identity
from geoalign.training.environment import bar, describe_environment
from geoalign.training.evaluate import METRICS, Evaluation, HeldOut, evaluate
from geoalign.training.metrics import MetricsWriter
from geoalign.training.ranks import Ranks
from geoalign.training.snapshot import whole_on_cpu
from geoalign.training.trainer import Trainer
from geoalign.world.dataset import is_complete, write_world

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class StopRequest:
    """Set by the first SIGINT or SIGTERM: finish the iteration, write a checkpoint, end cleanly."""

    signal_name: str = ""

    @contextmanager
    def installed(self) -> Iterator[StopRequest]:
        """Handle the signals inside the block; a second one interrupts at once."""

        def handler(number: int, _: Any) -> None:
            if self.signal_name:
                raise KeyboardInterrupt
            self.signal_name = signal.Signals(number).name
            print(f"\n{self.signal_name}: finishing the iteration, then writing a checkpoint", file=sys.stderr)

        before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, old in before.items():
                signal.signal(number, old)


def prepare_run(config: Config) -> None:
    """Set threads and render the embedded world if its files are missing."""
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    if config.world is not None and not is_complete(config.data, config.world):
        with bar(config.world.clips, "rendering the world", "clip") as progress:
            write_world(config.data, config.world, progress.update)


def run_training(config: Config, *, resume: str | None = None, allow_config_change: bool = False) -> Path:
    """Train as configured; returns the run folder.

    Args:
        config: resolved configuration.
        resume: "auto" (continue if there is a checkpoint), "latest" (there must be one) or a checkpoint path.
        allow_config_change: continue although the configuration differs from the checkpoint's.

    Raises:
        UserError: any set-up that cannot work; nothing is left half-written.
    """
    device, parallel = device_of(config.run), config.parallel
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    with ranks_of_environment(parallel.sequence, config.train.rank_timeout_s, cuda=cuda) as ranks:
        return _run_training(config, ranks, resume, allow_config_change)


def _run_training(config: Config, ranks: Ranks, resume: str | None, allow_config_change: bool) -> Path:
    """The run on one rank; rank 0 alone writes."""
    folder, main = config.run.folder, ranks.rank == 0
    fingerprint = config_hash(config.model_dump(mode="json"))
    checkpoint = _find_checkpoint(folder, resume)
    _refuse_overwrite(folder, checkpoint, resume)
    state = (
        None
        if checkpoint is None
        else load_checkpoint(checkpoint, config=fingerprint, allow_config_change=allow_config_change)
    )
    device = device_of(config.run)
    policy = open_base(config, device, dtype_of(config.run, device))
    if main:
        prepare_run(config)
    ranks.barrier()  # rank 0 has rendered the world, and every rank has looked for checkpoints
    if not main:
        prepare_run(config)
    rewards = build_rewards(config.rewards, config.failures)
    encoder = encoder_identity(config) if config.data.use_cache else None
    dataset = RetakeDataset(config.data, seed=config.run.seed, encoder=encoder)
    if state is not None:
        refuse_other_data(state, dataset.fingerprint(), allow_config_change)
    trainer = Trainer(config, policy, dataset, rewards, ranks)
    environment = describe_environment()
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(folder / "config.yaml", to_yaml(config))
        atomic_write_json(folder / "env.json", environment)
    evaluation = _Evaluator.of(config, trainer, folder)
    clock = _Clock()
    if state is not None:
        trainer.load(state)
    else:
        trainer.notes["before"] = evaluation.keep("before")
    trainer.notes["data"] = dataset.fingerprint()
    if not _loop(config, trainer, folder, fingerprint, evaluation, clock):
        return folder
    _save_result(config, trainer, folder)
    trainer.engine.swap_average()
    after = evaluation.keep("after")
    trainer.engine.swap_average()
    if main:
        summary = _summary(trainer.notes, after) | {
            "seed": config.run.seed,
            "iterations": trainer.iteration,
            "wall_s": clock.wall(trainer.notes),
            "cpu_s": clock.cpu(trainer.notes),
            "base": str(config.train.base),
            "config_hash": fingerprint,
            **environment,
        }
        atomic_write_json(folder / "summary.json", summary)
    return folder


def _save_result(config: Config, trainer: Trainer, folder: Path) -> None:
    """The trained policy as one file; of published weights only the trained part, which their loaders read.

    A collective: ranks that hold parts of the model give them to rank 0, which writes.
    """
    main, policy = trainer.ranks.rank == 0, trainer.policy
    trained = trainer.engine.snapshot(main).average
    if not isinstance(policy.codec, PatchCodec):
        if main:
            save_safetensors(
                {name: value.contiguous() for name, value in trained.items()}, folder / "delta.safetensors"
            )
        return
    state = whole_on_cpu(policy.model.state_dict(), main)
    if main:
        notes = {"run": config.run.name, "seed": config.run.seed}
        save_policy(folder / "policy.safetensors", policy, config.codec, notes, {**state, **trained})


def refuse_other_data(state: TrainState, fingerprint: str, allowed: bool) -> None:
    """Raise CheckpointError if the checkpoint was trained on other clips or camera paths and that is not allowed."""
    known = state.notes.get("data", fingerprint)
    if known != fingerprint and not allowed:
        raise CheckpointError(
            f"the data changed since iteration {state.iteration} (fingerprint {known[:12]}, now {fingerprint[:12]}): "
            "restore data.root and data.cache, or pass --allow-config-change"
        )


class _Clock:
    """Wall and CPU seconds of this process, added to those of earlier parts of a resumed run."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def wall(self, notes: Mapping[str, Any]) -> float:
        """Wall seconds of the whole run."""
        return float(notes.get("wall_s", 0.0)) + time.perf_counter() - self._wall

    def cpu(self, notes: Mapping[str, Any]) -> float:
        """CPU seconds of the whole run."""
        return float(notes.get("cpu_s", 0.0)) + time.process_time() - self._cpu


def _loop(
    config: Config, trainer: Trainer, folder: Path, fingerprint: str, evaluation: _Evaluator, clock: _Clock
) -> bool:
    """Iterate to the end (True) or to a stop request (False); always leaves a checkpoint of the last iteration."""
    total, main = config.train.iterations, trainer.ranks.rank == 0
    base_notes = dict(trainer.notes)
    with (
        StopRequest().installed() as stop,
        CheckpointWriter(folder / "checkpoints", fingerprint, config.train) as checkpoints,
        MetricsWriter(folder, config.run, trainer.iteration) if main else nullcontext() as writer,
        bar(total, "training", "it", trainer.iteration) as progress,
    ):
        while trainer.iteration < total:
            numbers = trainer.step()
            if config.eval.every and trainer.iteration % config.eval.every == 0:
                numbers |= evaluation.on_the_way()
            if writer is not None:
                writer.write(trainer.iteration - 1, numbers)
            progress.set_postfix_str(_headline(numbers), refresh=False)
            progress.update()
            stopping = trainer.ranks.maximum(float(bool(stop.signal_name))) > 0  # all ranks stop together
            if trainer.iteration % config.train.checkpoint_every == 0 or trainer.iteration == total or stopping:
                trainer.notes |= {"wall_s": clock.wall(base_notes), "cpu_s": clock.cpu(base_notes)}
                state = trainer.state(keep=main)  # a collective
                if main:
                    checkpoints.save(state)
            if stopping and trainer.iteration < total:
                print(
                    f"stopped after iteration {trainer.iteration} of {total}; continue with --resume auto",
                    file=sys.stderr,
                )
                return False
    trainer.notes = base_notes
    return True


def _headline(numbers: Mapping[str, float]) -> str:
    parts = []
    for key, text in (
        ("reward/trans_m", "{:.2f} m"),
        ("reward/rot_deg", "{:.2f} deg"),
        ("policy/ratio_max", "ratio<{:.4f}"),
    ):
        if key in numbers:
            parts.append(text.format(numbers[key]))
    return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class _Evaluator:
    """Held-out evaluation of a run; does nothing without held-out pairs.

    One rank suffices where every rank holds the whole model; ranks that hold parts of it evaluate together.
    """

    config: Config
    trainer: Trainer
    folder: Path
    held_out: HeldOut | None

    @staticmethod
    def of(config: Config, trainer: Trainer, folder: Path) -> _Evaluator:
        together = config.parallel.engine == "fsdp" or config.parallel.sequence > 1
        taking_part = config.world is not None and (together or trainer.ranks.rank == 0)
        held_out = HeldOut.build(config.world, config.eval) if taking_part and config.world is not None else None
        return _Evaluator(config, trainer, folder, held_out)

    def on_the_way(self) -> dict[str, float]:
        """Means of the averaged policy, as metrics."""
        self.trainer.engine.swap_average()
        numbers = {}
        if self.held_out is not None:
            result = evaluate(self.trainer.policy, self.config.flow, self.held_out, self.config.eval)
            numbers = {f"eval/{kind}_{m}": result.mean(kind, m) for kind in result.numbers for m in METRICS}
        self.trainer.engine.swap_average()
        return numbers

    def keep(self, stage: str) -> dict[str, dict[str, list[float]]]:
        """Evaluate, keep videos and cameras for the report, return the numbers per kind, metric and noise seed."""
        if self.held_out is None:
            return {}
        result = evaluate(self.trainer.policy, self.config.flow, self.held_out, self.config.eval)
        if self.trainer.ranks.rank == 0:
            _write_clips(self.folder / "eval" / f"{stage}.npz", self.held_out, result)
        return {kind: dict(rows) for kind, rows in result.numbers.items()}


def _write_clips(path: Path, held_out: HeldOut, result: Evaluation) -> None:
    pairs = held_out.sets.values()
    arrays = {
        "source": _bytes(torch.cat([p.batch.source.video for p in pairs])),
        "generated": _bytes(torch.cat(list(result.videos.values()))),
        "truth": _bytes(torch.cat([p.truth for p in pairs])),
        "target_c2w": torch.cat([p.batch.target_camera.c2w for p in pairs]).numpy(),
        "estimated_c2w": torch.cat(list(result.estimated.values())).numpy(),
        "names": np.array([name for p in pairs for name in p.names]),
    }
    with atomic_path(path) as temporary:
        np.savez_compressed(temporary, **arrays)


def _bytes(video: torch.Tensor) -> np.ndarray[Any, Any]:
    return ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()


def _summary(notes: Mapping[str, Any], after: Mapping[str, Mapping[str, list[float]]]) -> dict[str, Any]:
    """``held_out.{presets,random,mean}.{before,after}.{metric}`` means, and the same per noise seed beside it."""
    stages = {"before": notes.get("before", {}), "after": after}
    per_seed: dict[str, dict[str, Any]] = {}
    for stage, kinds in stages.items():
        rows = {kind: dict(values) for kind, values in kinds.items()}
        if rows:
            metrics = next(iter(rows.values()))
            rows["mean"] = {
                m: [sum(v) / len(v) for v in zip(*(k[m] for k in rows.values()), strict=True)] for m in metrics
            }
        for kind, values in rows.items():
            per_seed.setdefault(kind, {})[stage] = values
    means = {
        kind: {stage: {m: sum(v) / len(v) for m, v in rows.items()} for stage, rows in stage_rows.items()}
        for kind, stage_rows in per_seed.items()
    }
    return {"held_out": means, "held_out_per_noise_seed": per_seed}


def _find_checkpoint(folder: Path, resume: str | None) -> Path | None:
    if resume is None:
        return None
    if resume not in ("auto", "latest"):
        path = Path(resume)
        if not path.is_dir():
            raise UsageError(
                f"--resume {resume}: no such checkpoint folder (use auto, latest or .../checkpoints/step_NNNNNN)"
            )
        return path
    found = list_checkpoints(folder / "checkpoints")
    if not found and resume == "latest":
        raise CheckpointError(f"{folder / 'checkpoints'}: no checkpoint to resume; start without --resume")
    return found[-1] if found else None


def _refuse_overwrite(folder: Path, checkpoint: Path | None, resume: str | None) -> None:
    if checkpoint is None and resume is None and list_checkpoints(folder / "checkpoints"):
        raise UsageError(
            f"{folder} already holds checkpoints: continue with --resume auto, or choose another run.name or run.dir"
        )

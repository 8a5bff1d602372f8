"""A whole training run: set-up, evaluation before, the loop with checkpoints and clean stops, evaluation after."""

from __future__ import annotations

import logging
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from geoalign import __version__
from geoalign.config.load import to_yaml
from geoalign.config.schema import Config
from geoalign.data.source import RetakeDataset
from geoalign.errors import CheckpointError, ConfigError, UsageError
from geoalign.io_utils import atomic_path, atomic_write_json, atomic_write_text
from geoalign.rewards.registry import build_rewards
from geoalign.rl.policy import RetakePolicy
from geoalign.training.bundle import load_policy, save_policy
from geoalign.training.checkpoint import (
    TrainState,
    config_hash,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from geoalign.training.distributed import engine_of_environment
from geoalign.training.encoders import encoder_identity
from geoalign.training.engine import Engine
from geoalign.training.evaluate import METRICS, Evaluation, HeldOut, evaluate
from geoalign.training.metrics import MetricsWriter
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
    if config.run.device == "cuda":
        raise UsageError(
            "run.device=cuda: the training loop runs on the CPU so far (models, scorers and kernels know GPUs, it "
            "does not place them yet); use run.device=cpu. `geoalign doctor` shows what this machine has"
        )
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
    with engine_of_environment(config.train.rank_timeout_s) as engine:
        return _run_training(config, engine, resume, allow_config_change)


def _run_training(config: Config, engine: Engine, resume: str | None, allow_config_change: bool) -> Path:
    """The run on one rank; rank 0 alone evaluates and writes."""
    folder, main = config.run.folder, engine.rank == 0
    resolved = config.model_dump(mode="json")
    fingerprint = config_hash(resolved)
    checkpoint = _find_checkpoint(folder, resume)
    _refuse_overwrite(folder, checkpoint, resume)
    if config.train.base is None:
        raise ConfigError(
            "train.base is not set: give a policy file (geoalign pretrain makes one) or builtin:tiny_base"
        )
    policy, _ = load_policy(config.train.base)
    state = (
        None
        if checkpoint is None
        else load_checkpoint(checkpoint, config=fingerprint, allow_config_change=allow_config_change)
    )
    if main:
        prepare_run(config)
    engine.barrier()  # rank 0 has rendered the world, and every rank has looked for checkpoints
    if not main:
        prepare_run(config)
    rewards = build_rewards(config.rewards, config.failures)
    encoder = encoder_identity(config) if config.data.use_cache else None
    dataset = RetakeDataset(config.data, seed=config.run.seed, encoder=encoder)
    if state is not None:
        refuse_other_data(state, dataset.fingerprint(), allow_config_change)
    trainer = Trainer(config, policy, dataset, rewards, engine)
    environment = describe_environment()
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(folder / "config.yaml", to_yaml(config))
        atomic_write_json(folder / "env.json", environment)
    clock = _Clock()
    held_out = None if config.world is None or not main else HeldOut.build(config.world, config.eval)
    if state is not None:
        trainer.load(state)
    elif held_out is not None:
        trainer.notes["before"] = _evaluate_and_keep(config, policy, held_out, folder, "before")
    trainer.notes["data"] = dataset.fingerprint()
    finished = _loop(config, trainer, folder, fingerprint, held_out, clock)
    if not finished or not main:
        return folder
    trainer.learner.average.swap()
    save_policy(folder / "policy.safetensors", policy, config.codec, {"run": config.run.name, "seed": config.run.seed})
    after = {} if held_out is None else _evaluate_and_keep(config, policy, held_out, folder, "after")
    trainer.learner.average.swap()
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
    config: Config, trainer: Trainer, folder: Path, fingerprint: str, held_out: HeldOut | None, clock: _Clock
) -> bool:
    """Iterate to the end (True) or to a stop request (False); always leaves a checkpoint of the last iteration."""
    total = config.train.iterations
    base_notes = dict(trainer.notes)

    def save() -> None:
        if trainer.engine.rank:
            return
        trainer.notes |= {"wall_s": clock.wall(base_notes), "cpu_s": clock.cpu(base_notes)}
        save_checkpoint(folder / "checkpoints", trainer.state(), config=fingerprint, keep=config.train.keep_checkpoints)

    with (
        StopRequest().installed() as stop,
        MetricsWriter(folder, trainer.iteration) if trainer.engine.rank == 0 else nullcontext() as writer,
        bar(total, "training", "it", trainer.iteration) as progress,
    ):
        while trainer.iteration < total:
            numbers = trainer.step()
            if config.eval.every and held_out is not None and trainer.iteration % config.eval.every == 0:
                numbers |= _evaluate_on_the_way(config, trainer, held_out)
            if writer is not None:
                writer.write(trainer.iteration - 1, numbers)
            progress.set_postfix_str(_headline(numbers), refresh=False)
            progress.update()
            stopping = trainer.engine.maximum(float(bool(stop.signal_name))) > 0  # all ranks stop together
            if trainer.iteration % config.train.checkpoint_every == 0 or trainer.iteration == total or stopping:
                save()
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


def _evaluate_on_the_way(config: Config, trainer: Trainer, held_out: HeldOut) -> dict[str, float]:
    trainer.learner.average.swap()
    result = evaluate(trainer.policy, config.flow, held_out, config.eval)
    trainer.learner.average.swap()
    return {f"eval/{kind}_{metric}": result.mean(kind, metric) for kind in result.numbers for metric in METRICS}


def _evaluate_and_keep(
    config: Config, policy: RetakePolicy, held_out: HeldOut, folder: Path, stage: str
) -> dict[str, dict[str, list[float]]]:
    """Evaluate, keep videos and cameras for the report, return the numbers per kind, metric and noise seed."""
    result = evaluate(policy, config.flow, held_out, config.eval)
    _write_clips(folder / "eval" / f"{stage}.npz", held_out, result)
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


def describe_environment() -> dict[str, Any]:
    """Versions, hardware and commit that a result is worthless without."""
    return {
        "versions": {
            "geoalign": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name(),
        "cores": os.cpu_count(),
        "commit": source_commit(),
        "command": " ".join(sys.argv),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def source_commit() -> str:
    """Commit of the source tree the package runs from (with ``-dirty``), or "installed" for a wheel."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return "installed"
    call: Callable[..., str] = lambda *args: subprocess.run(  # noqa: E731 - two calls of one command
        ["git", "-C", str(root), *args], capture_output=True, text=True, check=False
    ).stdout.strip()
    dirty = call("status", "--porcelain", "--untracked-files=no")
    return call("rev-parse", "--short=12", "HEAD") + ("-dirty" if dirty else "")


def bar(total: int, what: str, unit: str, initial: int = 0) -> tqdm:  # type: ignore[type-arg]
    """A progress bar with ETA on a terminal; silent elsewhere."""
    return tqdm(total=total, initial=initial, desc=what, unit=unit, disable=not sys.stderr.isatty(), dynamic_ncols=True)

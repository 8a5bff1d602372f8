"""A whole training run: set-up, evaluation before, the loop with checkpoints and clean stops, evaluation after."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from geoalign.config.load import to_yaml
from geoalign.config.schema import Config
from geoalign.data.source import RetakeDataset
from geoalign.errors import CheckpointError, Refusal, Stopped
from geoalign.files.atomic import atomic_write_json, atomic_write_text, nan_to_none, remove_leftovers
from geoalign.files.checkpoints import CHANGED, CHECKPOINTS
from geoalign.files.locks import writer_lock
from geoalign.jobs.checks import require_inputs
from geoalign.jobs.environment import describe_environment, describe_processes
from geoalign.jobs.prepare import encoder_identity, render_missing_data
from geoalign.jobs.progress import say
from geoalign.jobs.stop import StopRequest
from geoalign.jobs.train_held_out import RunEvaluator, conditions_of, held_out_summary
from geoalign.jobs.train_resume import (
    on_its_data,
    refuse_disagreement,
    refuse_other_conditions,
    set_newer_aside,
    state_to_resume,
)
from geoalign.jobs.train_watch import watched
from geoalign.models.codec import PatchCodec
from geoalign.policy.files import DELTA_FILE, POLICY_FILE, RUN_CONFIG, save_policy
from geoalign.policy.open import open_base
from geoalign.policy.safetensors_file import save_safetensors
from geoalign.rewards.registry import build_rewards, close_rewards
from geoalign.rl.advantage import check_named
from geoalign.training.checkpoint import CheckpointWriter, RunSettings, TrainState
from geoalign.training.engines.snapshot import whole_on_cpu
from geoalign.training.processes.device import device_of, dtype_of, repeat_exactly
from geoalign.training.processes.ranks import Ranks
from geoalign.training.processes.torchrun import ranks_of_environment
from geoalign.training.trainer import Trainer

logger = logging.getLogger(__name__)


def run_training(
    config: Config, *, resume: str | None = None, allow_config_change: bool = False, profile: int | None = None
) -> Path:
    """Train as configured; returns the run folder.

    Args:
        config: resolved configuration.
        resume: "auto" (continue if there is a checkpoint), "latest" (there must be one) or a checkpoint path.
        allow_config_change: continue although the configuration differs from the checkpoint's.
        profile: iteration of which rank 0 writes a trace.

    Raises:
        Stopped: a signal stopped it; a checkpoint of the last iteration is written.
        UserError: any set-up that cannot work; nothing is left half-written.
    """
    if os.environ.get("RANK", "0") == "0":  # the others wait for it, or end with it
        require_inputs(config, "train")
    device, folder = device_of(config.run), config.run.folder
    settings = RunSettings.of(config.model_dump(mode="json"))
    cuda = device.type == "cuda"
    if config.run.deterministic:
        repeat_exactly()
    if cuda:
        torch.cuda.set_device(device)
    with (
        ranks_of_environment(config.parallel.sequence, config.train.rank_timeout_s, cuda=cuda) as ranks,
        writer_lock(folder, "run") if ranks.rank == 0 else nullcontext(),
    ):
        done = _run(config, ranks, settings, resume, allow_config_change, profile)
    if done < config.train.iterations:
        raise Stopped(f"stopped after iteration {done} of {config.train.iterations}; continue with --resume auto")
    return folder


def _run(
    config: Config,
    ranks: Ranks,
    settings: RunSettings,
    resume: str | None,
    allow_config_change: bool,
    profile: int | None,
) -> int:
    """The run as one rank does it; the iterations that are done, fewer than wanted after a stop."""
    main, folder = ranks.rank == 0, config.run.folder  # main alone writes
    state = state_to_resume(folder, resume, settings, allow_config_change)
    with _trainer(config, ranks, state, settings, allow_config_change) as trainer:
        environment = describe_environment()
        changed = {key: trainer.notes[key] for key in trainer.notes.keys() & {CHANGED}}
        if main:
            if state is not None:
                set_newer_aside(folder, state, config.train.iterations, resume)
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)
            atomic_write_text(folder / RUN_CONFIG, to_yaml(config))
            atomic_write_json(folder / "env.json", environment | {"processes": describe_processes()} | changed)
        evaluation, clock = RunEvaluator.of(config, trainer, folder), _Clock(ranks)
        if state is None:
            if config.world is not None:
                say("evaluating the base on held-out scenes")
            trainer.notes |= {"before": evaluation.keep("before"), "conditions": conditions_of(config)}
        _iterate(config, trainer, evaluation, clock, settings, profile)
        if trainer.iteration < config.train.iterations:
            return trainer.iteration
        _save_result(config, trainer, folder)
        trainer.engine.swap_average()
        after = evaluation.keep("after")
        trainer.engine.swap_average()
        cpu_s = clock.cpu(trainer.notes)
        if main:
            summary = held_out_summary(trainer.notes, after) | {
                "seed": config.run.seed,
                "iterations": trainer.iteration,
                "wall_s": clock.wall(trainer.notes),
                "cpu_s": cpu_s,
                "base": str(config.train.base),
                "config_hash": settings.hash,
                **environment,
                **changed,
            }
            atomic_write_json(folder / "summary.json", nan_to_none(summary))
        return trainer.iteration


@contextmanager
def _trainer(
    config: Config, ranks: Ranks, state: TrainState | None, settings: RunSettings, allow_config_change: bool
) -> Iterator[Trainer]:
    """Policy, data and rewards of the run in a trainer that stands where ``state`` does; closes the rewards."""
    device = device_of(config.run)
    say(f"reading the weights of {config.train.base}")
    policy = open_base(config, device, dtype_of(config.run, device))
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    render_missing_data(config, ranks.rank)
    ranks.barrier()  # every rank has looked for checkpoints before rank 0 writes one
    rewards = build_rewards(config.rewards, config.failures, take_turns=config.scoring.take_turns)
    try:
        check_named(config.advantage, (key for reward in rewards.values() for key in reward.keys))
        encoder = encoder_identity(config) if config.data.use_cache else None
        dataset = RetakeDataset(config.data, seed=config.run.seed, encoder=encoder)
        if state is not None:
            state = on_its_data(state, dataset.fingerprint(), allow_config_change)
            refuse_other_conditions(state, conditions_of(config))
        refuse_disagreement(ranks, 0 if state is None else state.iteration, settings.hash, dataset.fingerprint())
        trainer = Trainer(config, policy, dataset, rewards, ranks)
        if state is not None:
            trainer.load(state)
        trainer.notes["data"] = dataset.fingerprint()
        yield trainer
    finally:
        close_rewards(rewards)


def _save_result(config: Config, trainer: Trainer, folder: Path) -> None:
    """The trained policy as one file; of published weights only the trained part, which their loaders read.

    A collective: ranks that hold parts of the model give them to rank 0, which writes.
    """
    main, policy = trainer.ranks.rank == 0, trainer.policy
    trained = trainer.engine.snapshot(main).average
    if not isinstance(policy.codec, PatchCodec):
        if main:
            save_safetensors({name: value.contiguous() for name, value in trained.items()}, folder / DELTA_FILE)
        return
    state = whole_on_cpu(policy.model.state_dict(), main)
    if main:
        notes = {"run": config.run.name, "seed": config.run.seed}
        save_policy(folder / POLICY_FILE, policy, config.codec, notes, {**state, **trained})


class _Clock:
    """Wall seconds of this process and CPU seconds of all ranks, added to those of earlier parts of a resumed run."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def wall(self, notes: Mapping[str, Any]) -> float:
        """Wall seconds of the whole run."""
        return float(notes.get("wall_s", 0.0)) + time.perf_counter() - self._wall

    def cpu(self, notes: Mapping[str, Any]) -> float:
        """CPU seconds of the whole run; a collective."""
        mine = torch.tensor(time.process_time() - self._cpu, dtype=torch.float64)
        return float(notes.get("cpu_s", 0.0)) + float(self._ranks.all_reduce(mine, "sum"))


def _iterate(
    config: Config,
    trainer: Trainer,
    evaluation: RunEvaluator,
    clock: _Clock,
    settings: RunSettings,
    profile: int | None,
) -> None:
    """Iterate to the end or to a stop request; always leaves a checkpoint of the last iteration.

    So it does where an iteration is refused, unless the state is not the one before it or may be broken.
    """
    total, main = config.train.iterations, trainer.ranks.rank == 0
    base_notes = dict(trainer.notes)
    with (
        StopRequest().installed() as stop,
        CheckpointWriter(config.run.folder / CHECKPOINTS, settings, config.train) as checkpoints,
        watched(config, trainer, profile) as watch,
    ):
        while trainer.iteration < total:
            try:
                with watch.iteration(trainer):
                    numbers = trainer.step()
            except Refusal as error:
                watch.refused(error)
                trainer.notes |= {"wall_s": clock.wall(base_notes), "cpu_s": clock.cpu(base_notes)}
                _keep_what_was_done(trainer, checkpoints, error)
                raise
            if config.eval.every and trainer.iteration % config.eval.every == 0:
                numbers |= evaluation.on_the_way()
            watch.saw(trainer, numbers)
            stopping = trainer.ranks.maximum(float(bool(stop.signal_name))) > 0  # all ranks stop together
            if trainer.iteration % config.train.checkpoint_every == 0 or trainer.iteration == total or stopping:
                trainer.notes |= {"wall_s": clock.wall(base_notes), "cpu_s": clock.cpu(base_notes)}
                state = trainer.state(keep=main)  # a collective
                if main:
                    checkpoints.save(state)
            if stopping:
                break
    trainer.ranks.barrier()  # one that ended early would make torchrun end the one that still writes
    trainer.notes = base_notes


def _keep_what_was_done(trainer: Trainer, checkpoints: CheckpointWriter, error: Refusal) -> None:
    """Write a checkpoint of the state before an iteration that was refused; a collective."""
    if not error.clean or trainer.iteration == 0:
        return
    main = trainer.ranks.rank == 0
    state = trainer.state(keep=main)  # a collective
    try:
        if main:
            checkpoints.save(state)
            checkpoints.wait()
    except CheckpointError as problem:  # the refusal is what is said
        logger.warning("%s", problem)
    trainer.ranks.barrier()  # one that ended early would make torchrun end the one that still writes

"""Which checkpoint a run continues from, and what it refuses."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from geoalign.errors import CheckpointError, ConfigError, RunError, UsageError, argument
from geoalign.files.atomic import disk_errors
from geoalign.files.checkpoints import CHECKPOINTS, iteration_of, list_checkpoints
from geoalign.policy.files import DELTA_FILE, POLICY_FILE
from geoalign.training.checkpoint import (
    RunSettings,
    TrainState,
    differences,
    load_checkpoint,
)
from geoalign.training.processes.ranks import Ranks

logger = logging.getLogger(__name__)
_RESULTS = ("summary.json", POLICY_FILE, DELTA_FILE, "report.html", "eval/after.npz")


def state_to_resume(
    folder: Path, resume: str | None, config: RunSettings, allow_config_change: bool
) -> TrainState | None:
    """The state that ``--resume`` means in the run ``folder``; None to start anew. Changes nothing on the disk.

    Raises:
        UsageError: ``resume`` is a path that is not there, or a new run would mix its checkpoints with earlier ones.
        CheckpointError: "latest", and there is none; or none that can be read.
        ConfigError: it has another configuration.
    """

    def load(path: Path) -> TrainState:
        return load_checkpoint(path, config=config, allow_config_change=allow_config_change)

    if resume == "auto":
        return _newest_whole(list_checkpoints(folder / CHECKPOINTS), load)
    checkpoint = find_checkpoint(folder, resume)
    if checkpoint is not None:
        return load(checkpoint)
    if resume is None and list_checkpoints(folder / CHECKPOINTS):
        raise UsageError(
            f"{folder} already holds checkpoints: continue with {argument('resume', 'auto')}, or choose another "
            "run.name or run.dir"
        )
    return None


def _newest_whole(found: list[Path], load: Callable[[Path], TrainState]) -> TrainState | None:
    """The newest of ``found`` that can be read, said in the log if it is not the last; None if there are none.

    Raises CheckpointError if none can be read: a run that was there must not silently begin anew.
    """
    for number, path in enumerate(reversed(found), start=1):
        try:
            state = load(path)
        except CheckpointError as error:
            if number == len(found):
                raise
            logger.warning("%s; stepping back to %s", error, found[-number - 1])
        else:
            return state
    return None


def find_checkpoint(folder: Path, resume: str | None) -> Path | None:
    """The checkpoint that "latest" or a path means in the run ``folder``; None to start anew.

    Raises:
        UsageError: ``resume`` is a path that is not there.
        CheckpointError: "latest", and there is none.
    """
    if resume is None:
        return None
    if resume != "latest":
        path = Path(resume)
        if not path.is_dir():
            raise UsageError(
                f"{argument('resume', resume)}: no such checkpoint folder (use auto, latest or "
                ".../checkpoints/step_NNNNNN)"
            )
        return path
    found = list_checkpoints(folder / CHECKPOINTS)
    if not found:
        raise CheckpointError(f"{folder / 'checkpoints'}: no checkpoint to resume; start without {argument('resume')}")
    return found[-1]


def set_newer_aside(folder: Path, state: TrainState, total: int, resume: str | None) -> None:
    """Rename what the run goes back behind, so that neither ``--resume`` nor a report takes it for this run's.

    Checkpoints of later iterations (damaged ones too), one of the same iteration that is not the one ``resume`` names,
    and the results of a finished run if iterations are left to do, get the suffix ``.aside-N``. They are named in the
    log and never deleted.
    """
    found = list_checkpoints(folder / CHECKPOINTS)
    newer = [path for path in found if (iteration_of(path) or 0) > state.iteration]
    if resume not in ("auto", "latest"):
        chosen = Path(str(resume)).resolve()
        newer += [path for path in found if iteration_of(path) == state.iteration and path.resolve() != chosen]
    if state.iteration < total:
        newer += [folder / name for name in _RESULTS if (folder / name).exists()]
    for path in sorted(newer, reverse=True):
        number = 1
        while (aside := path.with_name(f"{path.name}.aside-{number}")).exists():
            number += 1
        with disk_errors(path):
            path.rename(aside)
        logger.warning("%s: newer than iteration %d, set aside as %s", path, state.iteration, aside.name)


def on_its_data(state: TrainState, fingerprint: str, allowed: bool) -> TrainState:
    """``state``, with a note where it was trained on other clips or camera paths.

    Raises:
        CheckpointError: it was, and that is not ``allowed``.
    """
    known = state.notes.get("data", fingerprint)
    if known == fingerprint:
        return state
    if not allowed:
        raise CheckpointError(
            f"the data changed since iteration {state.iteration} (fingerprint {known[:12]}, now {fingerprint[:12]}): "
            "restore data.root and data.cache, or pass --allow-config-change"
        )
    return state.changed(f"clips or camera paths {known[:12]} -> {fingerprint[:12]}")


def refuse_other_conditions(state: TrainState, conditions: Mapping[str, Any]) -> None:
    """Raise ConfigError if "before" was measured on other held-out conditions than "after" would be.

    Never allowed: the table of the run would compare them. Checkpoints of older versions do not tell all of theirs.
    """
    known = {**conditions, **state.notes.get("conditions", {})}
    if state.notes.get("before") and known != conditions:
        raise ConfigError(
            f"the held-out conditions changed since the run began ({differences(known, conditions)}): restore them, and"
            " measure on others with `geoalign evaluate`"
        )


def refuse_disagreement(ranks: Ranks, iteration: int, config: str, data: str) -> None:
    """Raise RunError on every rank unless all start from one iteration, configuration and data.

    Machines with folders of their own see other checkpoints or other clips, and nothing later would tell.
    """
    found = ranks.union([f"iteration {iteration} (configuration {config[:12]}, data {data[:12]})"])
    if len(found) > 1:
        raise RunError(
            f"the ranks do not agree where to start: {'; '.join(found)}; run.dir and data.root must be the same folder "
            "on every machine, and so must the configuration"
        )

"""Which checkpoint a run continues from, and what it refuses."""

from __future__ import annotations

from pathlib import Path

from geoalign.errors import CheckpointError, RunError, UsageError
from geoalign.training.checkpoint import TrainState, list_checkpoints, load_checkpoint
from geoalign.training.processes.ranks import Ranks


def state_to_resume(folder: Path, resume: str | None, config: str, allow_config_change: bool) -> TrainState | None:
    """The state that ``--resume`` means in the run ``folder``; None to start anew. ``config`` is its hash.

    Raises:
        UsageError: ``resume`` is a path that is not there, or a new run would mix its checkpoints with earlier ones.
        CheckpointError: "latest", and there is none; or one that cannot be read or has another configuration.
    """
    checkpoint = find_checkpoint(folder, resume)
    if checkpoint is not None:
        return load_checkpoint(checkpoint, config=config, allow_config_change=allow_config_change)
    if resume is None and list_checkpoints(folder / "checkpoints"):
        raise UsageError(
            f"{folder} already holds checkpoints: continue with --resume auto, or choose another run.name or run.dir"
        )
    return None


def find_checkpoint(folder: Path, resume: str | None) -> Path | None:
    """The checkpoint that ``--resume`` means in the run ``folder``; None to start anew.

    Raises:
        UsageError: ``resume`` is a path that is not there.
        CheckpointError: "latest", and there is none.
    """
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


def refuse_other_data(state: TrainState, fingerprint: str, allowed: bool) -> None:
    """Raise CheckpointError if the checkpoint was trained on other clips or camera paths and that is not allowed."""
    known = state.notes.get("data", fingerprint)
    if known != fingerprint and not allowed:
        raise CheckpointError(
            f"the data changed since iteration {state.iteration} (fingerprint {known[:12]}, now {fingerprint[:12]}): "
            "restore data.root and data.cache, or pass --allow-config-change"
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

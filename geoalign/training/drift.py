"""Which steps after the window a run reuses: by the drift of a file, or by the one that its own tails show.

The drift lies in the notes of the trainer, so checkpoints remember it, with what it was found under.
"""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from geoalign.config.schema import Config
from geoalign.config.training import TailReuse
from geoalign.errors import ConfigError, RunError, UsageError
from geoalign.files.digest import content_hash
from geoalign.files.forms import Form, filled
from geoalign.files.parsing import read_json_object
from geoalign.flow.reuse import DriftMeter, DriftProfile, reused_steps, tail_of
from geoalign.flow.sampler import FlowSampler
from geoalign.flow.table import StepWindow, build_step_table
from geoalign.training.notes import kept
from geoalign.training.processes.ranks import Ranks

logger = logging.getLogger(__name__)
DRIFT = "tail_drift"
"""Key of the notes: the profile by which reused steps are chosen."""


class _ProfileForm(Form):
    sigmas: list[Annotated[float, Field(ge=0, le=1)]]
    drift: list[float]
    reuse: TailReuse = "off"
    base: str | None = None


@dataclass(frozen=True, slots=True)
class ProfileFile:
    """A drift profile of a file; ``content`` is a hash of the file, which its name does not tell."""

    profile: DriftProfile
    content: str


def choose_command(asked: str, path: Path) -> str:
    """The command that writes the profile of a configuration that is ``asked`` for by these words."""
    return f"geoalign fidelity choose {asked} --out {path}"


def read_profile(path: Path, reuse: TailReuse, base: Path | None, asked: str = "--config NAME") -> DriftProfile:
    """The profile in a file of `geoalign fidelity choose`.

    Args:
        path: of the file.
        reuse: of the run.
        base: the policy that the run starts from. One of another policy is used, and the log says so: a policy may have
            moved.
        asked: words that ask for the run's configuration, for advice.

    Raises:
        ConfigError: it cannot be read, or it was measured with another kind of reuse.
    """
    fix = f"make it with `{choose_command(asked, path)}`"
    found = filled(_ProfileForm, read_json_object(path, ConfigError), path, fix, ConfigError)
    if found.reuse not in ("off", reuse):
        raise ConfigError(f"{path}: the drift of ode.reuse={found.reuse}, and the run says {reuse}; {fix}")
    if found.base not in (None, str(base)):
        logger.warning("%s: measured on the policy %s, and the run starts from %s", path, found.base, base)
    try:
        return DriftProfile(found.sigmas, found.drift)
    except UsageError as error:
        raise ConfigError(f"{path}: {error}; {fix}") from error


def profile_file(config: Config) -> ProfileFile | None:
    """The profile that a configuration names; None where it names none or reuses nothing.

    Read once, so that a file that changes meanwhile changes no run.

    Raises:
        ConfigError: as :func:`read_profile`; or it begins behind the end of the earliest window, and so says nothing of
            the first steps there.
    """
    path, window = config.ode.reuse_profile, config.window
    if config.ode.reuse == "off" or path is None:
        return None
    profile = read_profile(path, config.ode.reuse, config.train.base, config.asked)
    earliest = build_step_table(config.flow, StepWindow(window.start, window.start + window.size))
    if not profile.reaches(earliest):
        level = float(earliest.sigmas[tail_of(earliest).start])
        raise ConfigError(
            f"{path}: begins at the noise level {profile.sigmas[0]:.3g}, below {level:.3g}, where the earliest window "
            f"ends; make it with `{choose_command(config.asked, path)}`"
        )
    return ProfileFile(profile, content_hash(path))


def same_on_all(file: ProfileFile | None, ranks: Ranks) -> ProfileFile | None:
    """``file``, which all ranks have read alike; raises RunError if they did not. A collective where there is one."""
    if file is not None and len(found := ranks.union([file.content])) > 1:
        raise RunError(
            f"the ranks read {len(found)} different drift profiles: ode.reuse_profile must be the same file on every "
            "machine"
        )
    return file


def with_reuse(
    sampler: FlowSampler,
    config: Config,
    notes: MutableMapping[str, Any],
    file: ProfileFile | None,
    frames: int | None = None,
) -> FlowSampler:
    """The sampler with the steps that it reuses, chosen by the profile of the notes or of ``file``.

    Without a profile that begins where this window ends, or before, it evaluates all steps and measures one:
    :func:`agree_on_drift` takes it from there. A profile of the notes that is of another kind of reuse, another file or
    videos of another length is dropped. A tail of one step has nothing to reuse and shows no drift.

    Args:
        file: of :func:`profile_file`.
        frames: of the videos; None: those of the data.
    """
    table = sampler.table
    tail = len(tail_of(table))
    if config.ode.reuse == "off" or tail < 2:
        return sampler
    if not kept(notes, DRIFT, source_of_drift(config, file, frames), "the drift of ode.reuse") and file is not None:
        notes[DRIFT] = _as_note(file.profile)
    profile = DriftProfile(**notes[DRIFT]) if DRIFT in notes else None
    if profile is None or not profile.reaches(table):
        return replace(sampler, drift=DriftMeter(table))
    return replace(sampler, reused=reused_steps(table, profile, config.ode.evaluated(tail)))


def source_of_drift(config: Config, file: ProfileFile | None, frames: int | None = None) -> dict[str, Any]:
    """What a profile was measured with and on how many frames; a file serves videos of every length."""
    if file is not None:
        return {"ode.reuse": config.ode.reuse, "from": f"the file {file.content}"}
    return {"ode.reuse": config.ode.reuse, "from": "measured", "frames": frames or config.data.num_frames}


def _as_note(profile: DriftProfile) -> dict[str, list[float]]:
    return {"sigmas": list(profile.sigmas), "drift": list(profile.drift)}


def agree_on_drift(sampler: FlowSampler, ranks: Ranks, notes: MutableMapping[str, Any]) -> None:
    """Note the drift that the rollouts of all ranks showed, if this sampler measured it; a collective if it did.

    Where no sample was finite nothing is noted, and the next rollouts measure.
    """
    meter = sampler.drift
    if meter is None:
        return
    meter.sums = ranks.all_reduce(meter.sums, "sum")
    if (profile := meter.profile()) is None:
        logger.warning("ode.reuse: no drift could be measured, because no sample is finite; the next rollouts measure")
        return
    notes[DRIFT] = _as_note(profile)
    logger.info("ode.reuse: drift measured over %d steps of a tail", len(profile.sigmas) - 1)

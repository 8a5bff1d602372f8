"""What a run needs of the machine itself: free disk, the device."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from geoalign.config.published import gigabytes_of
from geoalign.config.schema import Config
from geoalign.errors import UserError
from geoalign.files.check import Check
from geoalign.files.checkpoints import CHECKPOINTS, list_checkpoints
from geoalign.models.layouts import count, model_shapes
from geoalign.perf.memory import predict_memory
from geoalign.policy.files import DELTA_FILE, POLICY_FILE
from geoalign.training.processes.device import device_of, dtype_of

_CHECKPOINTS_IN_HAND = 1
"""A checkpoint is whole before an older one is deleted."""


def disk(config: Config, found: Sequence[Check]) -> Iterator[Check]:
    """Room for the checkpoints that a run keeps, counted from the trained parameters, and for what ``found`` says is
    still to be fetched to the same disk."""
    trained = _trained(config)
    per_state = 4 if config.optim.states == "float32" else 1
    # Masters and their average, and the two moments of AdamW; the result is one more copy of the masters.
    each = trained * (4 + 4 + 2 * per_state)
    needed = (config.train.keep_checkpoints + _CHECKPOINTS_IN_HAND) * each + 4 * trained
    there = _written(config.run.folder)  # as much of it as the run has written is replaced, not added to
    folder = _nearest(config.run.folder)
    free = shutil.disk_usage(folder).free
    device = folder.stat().st_dev
    here = [check for check in found if check.place is not None and _nearest(check.place).stat().st_dev == device]
    missing = 1e9 * gigabytes_of(check.fix for check in here)
    what = f"{folder}: {free / 1e9:,.1f} GB free, {needed / 1e9:,.1f} GB for checkpoints and result"
    what += f", of which {there / 1e9:,.1f} GB are there" if there else ""
    what += f", {missing / 1e9:,.1f} GB still to be fetched" if missing else ""
    if free < max(needed - there, 0) + missing:
        yield Check("disk", "wrong", what, "free space, or put weights, data or run.dir on another disk")
    else:
        yield Check("disk", "present", what)


def _written(folder: Path) -> int:
    """Bytes of the checkpoints and results that a run has left in its ``folder``."""
    places = [*list_checkpoints(folder / CHECKPOINTS), folder / POLICY_FILE, folder / DELTA_FILE]
    found = 0
    for file in (file for place in places for file in ([place] if place.is_file() else place.glob("*"))):
        with contextlib.suppress(OSError):  # a run under way deletes old ones
            found += file.stat().st_size
    return found


def _trained(config: Config) -> int:
    """How many numbers are trained."""
    pattern = re.compile(config.optim.trainable)
    shapes = model_shapes(config.model).items()
    return count({name: shape for name, shape in shapes if pattern.search(name)})["parameters"]


def _nearest(folder: Path) -> Path:
    """The first folder above that exists: its file system is the one that will be written."""
    return next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())


def devices(config: Config) -> Iterator[Check]:
    """The device that is asked for, and whether the predicted memory of one process fits it."""
    try:
        device = device_of(config.run)
    except UserError as error:
        yield Check("device", "absent", str(error), "run it on a machine with GPUs, or set run.device=cpu", error)
        return
    if device.type == "cpu":
        yield Check("device", "present", "CPU")
        return
    found, size = torch.cuda.get_device_properties(device), 4 if dtype_of(config.run, device) == torch.float32 else 2
    parameters = count(model_shapes(config.model))["parameters"]
    processes = config.groups.conditions * config.parallel.sequence  # one group each: the least that a process needs
    plan = predict_memory(config, parameters, _trained(config), processes, matrix_bytes=size)
    what = (
        f"{torch.cuda.device_count()} x {found.name} of {found.total_memory / 1e9:.0f} GB; predicted need of a process "
        f"with one group {plan.device_total / 1e9:.0f} GB, without decoder and libraries"
    )
    fits = plan.device_total < found.total_memory
    fix = "" if fits else "see docs/troubleshooting.md#out-of-memory"
    yield Check("device", "present" if fits else "wrong", what, fix)

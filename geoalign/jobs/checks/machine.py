"""What a run needs of the machine itself: packages, free disk, the device."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from geoalign.config.schema import Config
from geoalign.errors import UserError
from geoalign.jobs.checks.check import Check
from geoalign.models.layouts import count, model_shapes
from geoalign.perf.memory import predict_memory
from geoalign.training.processes.device import device_of, dtype_of

_CHECKPOINTS_IN_HAND = 1
"""A checkpoint is whole before an older one is deleted."""

_PACKAGES: tuple[tuple[str, str, Callable[[Config], bool]], ...] = (
    ("deepspeed", "pip install 'geoalign[gpu]'", lambda c: c.parallel.engine == "deepspeed"),
    ("torchao", "pip install 'geoalign[gpu]'", lambda c: c.optim.states == "int8" or c.ode.linears == "int8"),
    ("nvidia.dali", "pip install 'geoalign[dali-cu13]'", lambda c: c.data.clips.reader == "dali"),
    ("wandb", "pip install 'geoalign[wandb]'", lambda c: c.run.wandb is not None),
    ("flash_attn", "pip install --no-build-isolation 'geoalign[flash]'", lambda c: c.run.attention == "flash2"),
    ("depth_anything_3", "see docs/rewards.md", lambda c: _runs_inline(c, "depth_anything_3")),
)
"""Optional packages, and the settings that ask for them."""
_BASE = ("torch", "numpy", "scipy", "safetensors", "av", "diffusers", "transformers", "PIL", "tensorboard", "cv2")


def packages(config: Config) -> Iterator[Check]:
    """Every package that these settings import; those that are there are one line together."""
    wanted = [(name, "pip install geoalign") for name in _BASE]
    wanted += [(name, get) for name, get, asked in _PACKAGES if asked(config)]
    missing = [(name, get) for name, get in wanted if not _importable(name)]
    yield from (Check(f"package {name}", "absent", "is not installed", get) for name, get in missing)
    if not missing:
        yield Check("packages", "present", ", ".join(name for name, _ in wanted))


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of a package around it
        return False


def _runs_inline(config: Config, evaluator: str) -> bool:
    return any(r.placement == "inline" and r.options.get("evaluator") == evaluator for r in config.rewards.values())


def disk(config: Config) -> Iterator[Check]:
    """Room for the checkpoints that a run keeps, counted from the trained parameters."""
    trained = _trained(config)
    per_state = 4 if config.optim.states == "float32" else 1
    # Masters and their average, and the two moments of AdamW; the result is one more copy of the masters.
    each = trained * (4 + 4 + 2 * per_state)
    needed = (config.train.keep_checkpoints + _CHECKPOINTS_IN_HAND) * each + 4 * trained
    folder = _nearest(config.run.folder)
    free = shutil.disk_usage(folder).free
    what = f"{folder}: {free / 1e9:,.1f} GB free, {needed / 1e9:,.1f} GB for checkpoints and result"
    if free < needed:
        yield Check("disk", "wrong", what, "free space, or point run.dir to another disk")
    else:
        yield Check("disk", "present", what)


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

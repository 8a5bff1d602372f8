"""How many ranks a run has: those of torchrun, or one per core of this machine that it may use."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

from geoalign.config.layout import deal_groups, deals
from geoalign.config.schema import Config

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def under_launcher() -> bool:
    """Whether the ranks are there already, started by torchrun or by ``run.ranks``."""
    return "WORLD_SIZE" in os.environ


def ranks_of(config: Config) -> int:
    """Processes of the run: as many as were started, else as many as ``run.ranks`` asks for here.

    ``auto`` takes the largest number of at most one per core and per condition that the groups can be dealt to, and one
    process where ``run.device`` may be a GPU, of which a process takes one.

    Raises:
        ConfigError: the groups cannot be dealt to ``run.ranks`` processes.
    """
    groups, sequence, wanted = config.groups, config.parallel.sequence, config.run.ranks
    if under_launcher():
        return int(os.environ["WORLD_SIZE"])
    if wanted != "auto":
        if wanted > 1:
            deal_groups(groups.conditions, groups.size, wanted, sequence)
        return wanted
    if config.run.device != "cpu":
        return 1
    most = min(usable_cores(), groups.conditions * sequence)
    dealt = (ranks for ranks in range(most, 1, -1) if deals(groups.conditions, groups.size, ranks, sequence))
    return next(dealt, 1)


def usable_cores() -> int:
    """Cores that this process may keep busy: those it may run on, or fewer where a control group limits their time."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min([allowed, *_quotas()])))


def _quotas() -> Iterator[float]:
    """Cores' worth of time that each control group of this process grants, from its own to the outermost."""
    try:
        lines = MEMBERSHIP.read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = CGROUPS / "cpu" if controllers else CGROUPS  # version 1 mounts every controller apart
        inside = Path(place.lstrip("/"))
        for folder in (inside, *inside.parents):  # a container sees its own group as the root
            yield from _quota(root / folder)


def _quota(folder: Path) -> Iterator[float]:
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        if quota not in ("max", "-1"):
            yield int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # no such limit, or one that cannot be read
        return

"""How the rollouts of an iteration are dealt to processes; checked on a laptop before any process group exists."""

from __future__ import annotations

from dataclasses import dataclass

from geoalign.errors import ConfigError


@dataclass(frozen=True, slots=True)
class GroupPlacement:
    """What one rank holds in an iteration: ``groups`` groups with ``members`` rollouts of each."""

    groups: int
    members: int


def place_groups(conditions: int, group_size: int, world_size: int) -> GroupPlacement:
    """Deal ``conditions`` groups of ``group_size`` rollouts to ``world_size`` ranks, equally much to every rank.

    Groups stay whole while there are at least as many as ranks; beyond that each group is split over several ranks.

    Raises:
        ConfigError: the numbers do not divide; the message names numbers that do.
    """
    if conditions % world_size == 0:
        return GroupPlacement(conditions // world_size, group_size)
    if world_size % conditions == 0 and group_size % (world_size // conditions) == 0:
        return GroupPlacement(1, group_size // (world_size // conditions))
    below = next(number for number in range(world_size, 0, -1) if _fits(conditions, group_size, number))
    above = -(-conditions // world_size) * world_size
    raise ConfigError(
        f"groups.conditions {conditions} with groups.size {group_size} cannot be dealt equally to {world_size} "
        f"processes; set groups.conditions={above}, or use {below} processes."
    )


def _fits(conditions: int, group_size: int, world_size: int) -> bool:
    if conditions % world_size == 0:
        return True
    return world_size % conditions == 0 and group_size % (world_size // conditions) == 0

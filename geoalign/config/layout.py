"""How the rollouts of an iteration are dealt to processes; checked on a laptop before any process group exists."""

from __future__ import annotations

from dataclasses import dataclass

from geoalign.errors import ConfigError


@dataclass(frozen=True, slots=True)
class GroupShare:
    """What one rank holds in an iteration: ``groups`` groups with ``members`` rollouts of each."""

    groups: int
    members: int


def deal_groups(conditions: int, group_size: int, world_size: int, sequence: int = 1) -> GroupShare:
    """Deal ``conditions`` groups of ``group_size`` rollouts to ``world_size`` ranks, equally much to every rank.

    Groups stay whole while there are at least as many as ranks; beyond that each group is split over several ranks.
    ``sequence`` ranks share the tokens of every rollout and hold the same ones.

    Raises:
        ConfigError: the numbers do not divide; the message names numbers that do.
    """
    if world_size % sequence:
        raise ConfigError(f"parallel.sequence {sequence} must divide the {world_size} processes")
    ranks = world_size // sequence
    share = _deal(conditions, group_size, ranks)
    if share is None:
        below = next(number for number in range(ranks, 0, -1) if _deal(conditions, group_size, number))
        above = -(-conditions // ranks) * ranks
        raise ConfigError(
            f"groups.conditions {conditions} with groups.size {group_size} cannot be dealt equally to {world_size} "
            f"processes; set groups.conditions={above}, or use {below * sequence} processes."
        )
    if share.groups * share.members < sequence:
        raise ConfigError(
            f"parallel.sequence {sequence} ranks share {share.groups * share.members} rollouts, but each of them must "
            "decode and score at least one; use fewer processes"
        )
    return share


def deals(conditions: int, group_size: int, world_size: int, sequence: int = 1) -> bool:
    """Whether :func:`deal_groups` can."""
    try:
        deal_groups(conditions, group_size, world_size, sequence)
    except ConfigError:
        return False
    return True


def _deal(conditions: int, group_size: int, ranks: int) -> GroupShare | None:
    if conditions % ranks == 0:
        return GroupShare(conditions // ranks, group_size)
    if ranks % conditions == 0 and group_size % (ranks // conditions) == 0:
        return GroupShare(1, group_size // (ranks // conditions))
    return None

"""The attention of a run as its checkpoints remember it: the exact core, and whether 8-bit attention is used."""

from __future__ import annotations

import logging
from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from typing import Any

import torch

from geoalign.config.schema import Config
from geoalign.policy.policy import RetakePolicy
from geoalign.training.notes import kept
from geoalign.training.setup import twin_of
from geoalign_kernels.ops.attention.cores import why_not

logger = logging.getLogger(__name__)
CORE = "attention_core"
"""Key of the notes: the exact attention core."""
QUANTISED = "ode_quantised"
"""Key of the notes: whether ``ode.attention`` is used, where it is not exact."""


def noted(config: Config, core: str | None, quantised: bool) -> dict[str, Any]:
    """The notes of a run that begins with this choice."""
    notes = {CORE: core, QUANTISED: quantised}
    _holds(notes, config)
    return notes


def keep_choice(
    policy: RetakePolicy,
    config: Config,
    device: torch.device,
    notes: dict[str, Any],
    earlier: Mapping[str, Any],
) -> RetakePolicy:
    """Go on with what an earlier start measured, where it holds here, else with the choice of this start.

    Args:
        policy: of this start; the execution of its networks is changed in place.
        config, device: of this start.
        notes: of this start; in place they become those of ``earlier``.
        earlier: notes of the checkpoint.

    Returns:
        ``policy``, its approximate network made anew where the checkpoint says otherwise.
    """
    core, quantised = notes[CORE], notes[QUANTISED]
    notes.clear()
    notes |= noted(config, core, quantised) | dict(earlier)
    if config.run.attention != "measured":
        notes |= noted(config, core, quantised)
        return policy
    reason = "" if notes[CORE] == core else why_not(notes[CORE], device, policy.model.execution.dtype or policy.dtype)
    if reason:
        logger.warning("attention core %s of the checkpoint cannot run here (%s): %s", notes[CORE], reason, core)
        notes[CORE] = core
    if not _holds(notes, config):
        notes[QUANTISED] = quantised
    elif notes[QUANTISED] != quantised:
        used = "used" if notes[QUANTISED] else "not used"
        logger.info("ode.attention=%s is %s, as the checkpoint remembers", config.ode.attention, used)
        policy = replace(policy, fast=twin_of(config, policy.model, notes[QUANTISED]))
    for network in filter(None, (policy.model, policy.fast)):
        network.execution.core = notes[CORE]
    return policy


def _holds(notes: MutableMapping[str, Any], config: Config) -> bool:
    """Whether what the notes say of 8-bit attention was found for the mode and beside the core of now."""
    now = {"ode.attention": config.ode.attention, "core": notes[CORE]}
    return kept(notes, QUANTISED, now, "whether 8-bit attention is used")

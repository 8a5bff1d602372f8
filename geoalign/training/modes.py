"""The attention mode of every block after the window: measured, agreed on by the ranks, remembered by checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch

from geoalign.config.schema import Config
from geoalign.models.dit import RetakeDiT
from geoalign.models.fast import attention_modes, forget_attention_modes, set_attention_modes
from geoalign.training.notes import kept
from geoalign.training.processes.ranks import Ranks

MODES = "ode_modes"
"""Key of the notes: the mode of every block."""


def restore_modes(twin: RetakeDiT | None, notes: MutableMapping[str, Any]) -> None:
    """Run ``twin`` in the modes of a checkpoint; those that it does not have are forgotten."""
    modes = notes.pop(MODES, None)
    if modes and twin is not None and set_attention_modes(twin, modes):
        notes[MODES] = modes


def refresh_modes(twin: RetakeDiT | None, config: Config, frames: int, notes: MutableMapping[str, Any]) -> None:
    """Before rollouts of videos of ``frames``: modes that were measured under something else are measured anew."""
    if twin is None or twin.execution.probe is None:
        return
    ode = config.ode
    now = {"ode.attention": ode.attention, "ode.int8_threshold": ode.int8_threshold, "frames": frames}
    known = MODES in notes
    if not kept(notes, MODES, now, "the choice of 8-bit layers") and known:
        forget_attention_modes(twin)


def agree_on_modes(twin: RetakeDiT | None, ranks: Ranks, notes: MutableMapping[str, Any], *, longest: bool) -> None:
    """After rollouts that measured: where ranks found other modes for a layer, the most exact one is kept.

    Not before early, middle and late steps were measured, or all that a run has: a later tail may begin in more noise.

    Args:
        longest: no tail of the run is longer than that of these rollouts.
    """
    if twin is None or twin.execution.probe is None or MODES in notes:
        return
    if not (longest or twin.execution.probe.saw_all_stages):
        return
    order = (*twin.execution.probe.modes, "exact")
    modes = attention_modes(twin) or ["exact"] * len(twin.blocks)
    agreed = ranks.all_reduce(torch.tensor([order.index(mode) for mode in modes]), "max")
    notes[MODES] = [order[index] for index in agreed.tolist()]
    set_attention_modes(twin, notes[MODES])


def is_exact(twin: RetakeDiT | None, config: Config, notes: Mapping[str, Any]) -> bool:
    """Whether deterministic steps run what stochastic ones do: without a twin, or where no layer bears 8 bits."""
    if twin is None:
        return True
    if twin.execution.probe is None or config.ode.linears != "exact":
        return False
    return {*notes.get(MODES, ("not measured",))} == {"exact"}

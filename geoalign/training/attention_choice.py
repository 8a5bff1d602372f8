"""Which attention core a run uses, and whether an 8-bit one is worth it: decided once, before the first iteration.

Rule R2 asks that window and learner share one core, not which: the choice is equal on all ranks, remembered by
checkpoints, and never revised during a run.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from geoalign.config.schema import Config
from geoalign.errors import ConfigError
from geoalign.flow.table import build_step_table
from geoalign.perf.budget import count_passes
from geoalign.perf.devices import INT8_WORTH, profile_of
from geoalign.rl.window import WindowSchedule
from geoalign.training.processes.ranks import Ranks
from geoalign.training.telemetry import plan_of, walk_of
from geoalign_kernels import attention, resolve_attention
from geoalign_kernels.ops.attention import cores

logger = logging.getLogger(__name__)
REPEATS = 3
Timer = Callable[[str, bool], float]


@dataclass(frozen=True, slots=True)
class Choice:
    """What was found.

    Attributes:
        core: exact attention core.
        quantised: whether ``ode.attention`` is used as configured, where it is not exact.
        why: a line for the log.
    """

    core: str
    quantised: bool
    why: str


def choose(
    config: Config, device: torch.device, dtype: torch.dtype, ranks: Ranks, *, timer: Timer | None = None
) -> Choice:
    """The choice of a run; a collective where it is measured.

    Args:
        config: ``run.attention`` names a core, or is ``auto`` or ``measured``.
        device, dtype: of the network.
        ranks: their times are added, so that all come to one result.
        timer: seconds of a core's (or mode's) forward, or forward and backward; the default measures.

    Raises:
        ConfigError: the named core cannot run here, or its backward does not repeat under ``run.deterministic``.
    """
    run = config.run
    if run.attention == "measured":
        return _measured(config, device, dtype, ranks, timer or partial(_seconds, config, device))
    if run.attention == "auto":
        core = resolve_attention(device, dtype, deterministic=run.deterministic)
    else:
        core = run.attention
        reason = cores.why_not(core, device, dtype) or (cores.why_not_repeatable(core) if run.deterministic else "")
        if reason:
            raise ConfigError(f"run.attention={core}: {reason}; use run.attention=auto")
    return Choice(core, *_predicted(config, device, core))


def _predicted(config: Config, device: torch.device, core: str) -> tuple[bool, str]:
    """By the cost model, on cards that it knows; elsewhere the configuration is followed."""
    profile = profile_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    mode = config.ode.attention
    # A mode that the card does not have is refused where the network for it is made.
    if mode == "exact" or profile is None or profile.rate_of(mode) is None:
        return True, f"attention core {core}"
    profile = profile.with_core(core)
    used = profile.pays(mode)
    told = f"attention core {core}; ode.attention={mode} is {'used' if used else 'not used'}: {profile.gain(mode)}"
    return used, told if used else (
        f"{told} (predicted), {INT8_WORTH} wanted (run.attention=measured settles it by a measurement)"
    )


def _measured(config: Config, device: torch.device, dtype: torch.dtype, ranks: Ranks, timer: Timer) -> Choice:
    candidates = [
        core for core in cores.CORES
        if not (config.run.deterministic and cores.why_not_repeatable(core))
    ]  # fmt: skip
    mode = config.ode.attention
    seconds = torch.full((len(candidates) + 1, 2), math.inf, dtype=torch.float64)
    for place, core in enumerate([*candidates, mode]):
        # The plain reference holds the scores: it is no candidate where another core runs.
        if core == "exact" or (core in candidates and (core == "reference" or cores.why_not(core, device, dtype))):
            continue
        try:
            both = core in candidates
            seconds[place] = torch.tensor([timer(core, False), timer(core, True) if both else 0.0])
        except Exception as error:  # a core that does not run is none
            logger.warning("attention %s was not measured: %s", core, error)
    seconds = ranks.all_reduce(seconds, "sum")  # inf where it fails on any rank
    forwards = _forwards_per_backward(config)
    total = forwards * seconds[:-1, 0] + seconds[:-1, 1]
    if not torch.isfinite(total).any():
        core = resolve_attention(device, dtype, deterministic=config.run.deterministic)
        return Choice(core, True, f"attention core {core}: none could be measured")
    best = int(total.argmin())
    gain = float(seconds[best, 0] / seconds[-1, 0]) if mode != "exact" else 0.0
    times = ", ".join(
        f"{core} {1e3 * float(forward) / ranks.size:.3g} + {1e3 * float(both - forward) / ranks.size:.3g} ms"
        for core, (forward, both) in zip(candidates, seconds[:-1], strict=True) if math.isfinite(both)
    )  # fmt: skip
    why = f"attention core {candidates[best]}, measured (forward + backward): {times}"
    if mode == "exact":
        return Choice(candidates[best], True, why)
    used = gain >= INT8_WORTH
    why += f"; ode.attention={mode} is {'used' if used else 'not used'}: {gain:.2f} times as fast, {INT8_WORTH} wanted"
    return Choice(candidates[best], used, why)


def _forwards_per_backward(config: Config) -> float:
    """Forwards of an iteration beside those that a backward follows at once."""
    window = WindowSchedule(config.window, config.flow.steps, config.run.seed)(0)
    walk = walk_of(config, build_step_table(config.flow, window))
    count = count_passes(walk, 1, config.groups.size, config.optim.updates_per_rollout, plan_of(config))
    return max(count.forwards - count.backward, 0) / count.backward


def _seconds(config: Config, device: torch.device, core: str, both: bool) -> float:
    """Median seconds of one attention over all tokens of a video, its backward included if asked for."""
    model = config.model
    tokens = sum(model.tokens(*config.data.video))
    shape = (1, tokens, model.heads, model.head_dim)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=both) for _ in range(3))
    options: dict[str, Any] = {"core": core} if core in cores.CORES else {"mode": core}
    found = []
    for _ in range(REPEATS + 1):
        _wait(device)
        began = time.perf_counter()
        with torch.set_grad_enabled(both):
            out = attention(q, k, v, **options).out
        if both:
            out.backward(out.detach())
        _wait(device)
        found.append(time.perf_counter() - began)
    return sorted(found[1:])[REPEATS // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""Makes a loaded policy ready to train: device, precision, execution, engine."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch

from geoalign.config.schema import Config
from geoalign.errors import ConfigError
from geoalign.models.dit import RetakeDiT
from geoalign.models.execution import Execution, allow_graphs
from geoalign.models.fast import fast_twin
from geoalign.policy.policy import RetakePolicy
from geoalign.training.attention_choice import choose
from geoalign.training.engines.base import Engine, build_engine
from geoalign.training.engines.optim import freeze_all_but
from geoalign.training.processes.device import device_of, dtype_of, repeat_exactly
from geoalign.training.processes.ranks import Ranks
from geoalign.training.reference import ReferencePolicy
from geoalign_kernels.ops.attention.fp8_support import why_not_fp8
from geoalign_kernels.ops.attention.probe import Mode

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Parts:
    """A policy on its device, the engine that trains it, the reference of a KL term (None without one).

    ``quantised``: whether 8-bit attention is used where ``ode`` asks for it.
    """

    policy: RetakePolicy
    engine: Engine
    device: torch.device
    reference: ReferencePolicy | None
    quantised: bool


def ready(config: Config, policy: RetakePolicy, ranks: Ranks) -> Parts:
    """Place and configure ``policy``, whose model is changed in place.

    Masters of trained parameters are taken in the precision of the loaded weights, before matrices are cast.

    Raises:
        ConfigError: nothing is trained, or an engine or lever cannot run here.
        UsageError: the device is not there.
    """
    device, model = device_of(config.run), policy.model
    dtype = dtype_of(config.run, device)
    if policy.dtype == torch.float64:  # exactness checks run whole models in float64
        dtype = torch.float64
    model.to(device)
    trained = freeze_all_but(model, config.optim.trainable)
    if config.run.deterministic:
        repeat_exactly()
    choice = choose(config, device, dtype, ranks)
    configure(model.execution, config, dtype, ranks, choice.core)
    logger.info("%s; matrices in %s on %s", choice.why, dtype, device)
    engine = build_engine(config, model, trained, ranks, dtype)
    if config.parallel.engine != "fsdp":  # which casts where it gathers
        model.to(dtype)
    twin = twin_of(config, model, choice.quantised)
    policy = replace(
        policy, codec=policy.codec.to(device), guidance=config.flow.guidance, fast=twin, reuse=config.ode.reuse
    )
    reference = ReferencePolicy(engine.trained) if config.objective.kl_weight > 0 else None
    return Parts(policy, engine, device, reference, choice.quantised)


def configure(execution: Execution, config: Config, dtype: torch.dtype, ranks: Ranks, core: str) -> None:
    """Apply the switches of a configuration; every choice is made once, so that window and learner share it."""
    execution.prune_source = config.levers.prune_source
    execution.recompute = config.levers.recompute
    execution.cache_phases = config.levers.cache_phases
    execution.core = core
    execution.sequence = ranks.sequence_group()
    execution.dtype = dtype
    execution.compiled = config.run.compile
    if config.run.compile:
        allow_graphs()


def twin_of(config: Config, model: RetakeDiT, quantised: bool = True) -> RetakeDiT | None:
    """The network of steps after the window, where ``ode`` asks for another; ``quantised``: with 8-bit attention."""
    kind = config.ode.attention if quantised else "exact"
    if kind == "exact" and config.ode.linears == "exact":
        return None
    device = next(model.parameters()).device
    if kind == "int8_fp8" and device.type == "cuda" and (reason := why_not_fp8(device)):
        raise ConfigError(f"ode.attention=int8_fp8 cannot run here: {reason}; use ode.attention=int8")
    modes: dict[str, tuple[Mode, ...]] = {"exact": (), "int8": ("int8",), "int8_fp8": ("int8_fp8", "int8")}
    return fast_twin(
        model,
        attention=modes[kind],
        threshold=config.ode.int8_threshold,
        linears=config.ode.linears == "int8",
    )

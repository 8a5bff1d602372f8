"""DeepSpeed's ZeRO stages 1 and 2: DeepSpeed owns the optimizer and shards its state over the ranks.

The network is not wrapped: rollouts, replays and streamed gradients are those of every engine. Their sum is handed to
DeepSpeed as the gradient of a linear loss ``sum <master, gradient>``, one backward per update, so that its own hooks
reduce, partition, clip and step.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from geoalign.config.training import OptimConfig
from geoalign.errors import ConfigError
from geoalign.install import install
from geoalign.training.engines.optim import build_adamw
from geoalign.training.engines.snapshot import Snapshot, copy_strictly, whole_on_cpu
from geoalign.training.engines.whole import WholeParameters
from geoalign.training.processes.ranks import Ranks

_MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedEngine(WholeParameters):
    """Optimizer state sharded by DeepSpeed; implements :class:`Engine`.

    Raises:
        ConfigError: DeepSpeed is missing, or there is one process only.
    """

    def __init__(
        self, trained: Mapping[str, nn.Parameter], config: OptimConfig, ranks: Ranks, dtype: torch.dtype, stage: int
    ) -> None:
        if ranks.size == 1:
            raise ConfigError("parallel.engine=deepspeed shards over several processes; use ddp with one")
        super().__init__(trained, config, ranks, dtype, separate=True)
        inner = build_adamw(self._masters.values, config)
        self._engine = _initialise(self._masters.values, inner, config.grad_clip, stage)
        self.optimizer = self._engine.optimizer.optimizer

    def step(self) -> float:
        """Let DeepSpeed reduce, clip and update; without an update if any rank's gradient is not finite."""
        values = self._masters.values.values()
        gradients = [sum_.to(value.dtype) for sum_, value in zip(self._masters.gradients(), values, strict=True)]
        self._masters.clear()
        spoilt = torch.stack([~torch.isfinite(gradient).all() for gradient in gradients]).any()
        if self._ranks.maximum(float(spoilt)):
            return float("nan")
        # DeepSpeed averages over the ranks; losses carry global denominators, so the sum is wanted.
        pairs = zip(values, gradients, strict=True)
        self._engine.backward(sum((master * gradient).sum() for master, gradient in pairs) * self._ranks.size)
        self._engine.step()
        self._updated()
        return float(self._engine.get_global_grad_norm())

    def snapshot(self, keep: bool = True) -> Snapshot:
        """Copies on the CPU, gathered from the shards."""
        from deepspeed.utils import safe_get_full_optimizer_state

        optimizer: dict[str, dict[str, Tensor]] = {}
        if self.optimizer.state:
            self._link_states()
            step = next(iter(self.optimizer.state.values()))["step"]
            for name, value in self._masters.values.items():
                moments: dict[str, Any] = {key: safe_get_full_optimizer_state(value, key) for key in _MOMENTS}
                if keep:
                    optimizer[name] = whole_on_cpu({"step": step, **moments})
        return self._snapshot(optimizer, keep)

    def restore(self, snapshot: Snapshot) -> None:
        """Take over a snapshot; raises CheckpointError if names or shapes differ."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        self._restore_values(snapshot)
        for value in self._masters.values.values():
            safe_set_full_fp32_param(value, value.detach())
        if not snapshot.optimizer:
            return
        # Every parameter must have its moments: DeepSpeed keeps them in one flat tensor per group.
        wanted = {name: torch.empty_like(value) for name, value in self._masters.values.items()}
        for key in _MOMENTS:
            moments = {name: entry[key] for name, entry in snapshot.optimizer.items() if key in entry}
            copy_strictly(moments, wanted, "optimizer state of the checkpoint")
        step = next(iter(snapshot.optimizer.values()))["step"]
        for flat in self._engine.optimizer.single_partition_of_fp32_groups:
            self.optimizer.state[flat] = {"step": step.clone()} | {k: torch.zeros_like(flat) for k in _MOMENTS}
        self._link_states()
        for name, value in self._masters.values.items():
            for key in _MOMENTS:
                safe_set_full_optimizer_state(value, snapshot.optimizer[name][key].to(value.device), key)

    def _link_states(self) -> None:
        """Tell DeepSpeed where each parameter's moments lie.

        It does so itself after the first step of the first parameter group, when the other groups have none yet.
        """
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        inner = self._engine.optimizer
        for parameters, flat in zip(inner.bit16_groups, inner.single_partition_of_fp32_groups, strict=True):
            lazy_init_hp_params_optimizer_state(parameters, flat, self.optimizer.state)


def _initialise(values: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, clip: float, stage: int) -> Any:
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(f"parallel.engine=deepspeed needs the package: {install('gpu')} ({error})") from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Its shared-memory collective would be compiled for minutes at the first use on a CPU; gloo does without it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 30,
    }
    holder = nn.Module()
    for number, value in enumerate(values.values()):
        holder.register_parameter(f"p{number}", value)
    initialize: Any = deepspeed.initialize  # its annotations call a list of parameters a module
    engine, *_ = initialize(model=holder, model_parameters=[*values.values()], optimizer=optimizer, config=settings)
    return engine

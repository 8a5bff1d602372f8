"""FSDP2: parameters, gradients and optimizer state sharded over the ranks, for models that do not fit one GPU.

Every block is one sharded unit that is gathered where it runs, outside of what is computed again in its backward. The
small rest (embeddings, head, camera gains) is replicated; trained parameters among it are summed as in the replicated
engine. Slower than that one where a model fits: every forward gathers what it needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from geoalign.config.training import OptimConfig
from geoalign.errors import ConfigError
from geoalign.training.engines.masters import MovingAverage
from geoalign.training.engines.optim import build_adamw, load_optimizer_state, optimizer_state
from geoalign.training.engines.snapshot import Snapshot, copy_strictly, sharded_like, whole_on_cpu
from geoalign.training.processes.ranks import Ranks

if TYPE_CHECKING:
    from geoalign.models.dit import RetakeDiT


class ShardedEngine:
    """Parameters sharded by FSDP2; implements :class:`Engine`.

    The shards of trained parameters are float32 whatever the files hold; blocks gather them in the computing precision.

    Raises:
        ConfigError: there is one process only.
    """

    def __init__(
        self,
        model: RetakeDiT,
        trained: Mapping[str, nn.Parameter],
        config: OptimConfig,
        ranks: Ranks,
        dtype: torch.dtype,
    ) -> None:
        if ranks.size == 1:
            raise ConfigError("parallel.engine=fsdp shards over several processes; use ddp with one")
        self._ranks, self._clip = ranks, config.grad_clip
        for parameter in model.parameters():
            wanted = torch.promote_types(parameter.dtype, torch.float32) if parameter.requires_grad else dtype
            parameter.data = parameter.data.to(wanted)
        _shard(model, ranks, dtype)
        found = dict(model.named_parameters())  # sharding has replaced the parameters
        self.trained: Mapping[str, nn.Parameter] = {name: found[name] for name in trained}
        self._average = MovingAverage(self.trained, config.ema)
        self.optimizer = build_adamw(self.trained, config)

    def begin(self) -> None:
        """Forget all gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this rank's share of the loss; those of sharded parameters are summed here."""
        loss.backward()

    def accumulate(self, gradients: Mapping[str, Tensor]) -> None:
        """Whole gradients do not exist here; the configuration refuses what would need them."""
        assert not gradients

    def step(self) -> float:
        """Sum the replicated gradients, clip, update."""
        for parameter in self.trained.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        replicated = [p for p in self.trained.values() if not isinstance(p, DTensor)]
        if replicated:
            summed = self._ranks.sum_tensors([p.grad for p in replicated if p.grad is not None], "gradients")
            for parameter, gradient in zip(replicated, summed, strict=True):
                parameter.grad = gradient
        norm = self._norm()
        if bool(torch.isfinite(norm)):
            factor = (self._clip / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
            for parameter in self.trained.values():
                assert parameter.grad is not None
                parameter.grad.mul_(factor.to(parameter.grad.dtype))
            self.optimizer.step()
            self._average.update()
        return float(norm)

    def swap_average(self) -> None:
        """Exchange parameters and moving average."""
        self._average.swap()

    def snapshot(self, keep: bool = True) -> Snapshot:
        """Copies on the CPU, gathered from the shards one tensor at a time."""
        states = optimizer_state(self.optimizer, self.trained)
        optimizer = {name: whole_on_cpu(entry, keep) for name, entry in states.items()}
        values, average = whole_on_cpu(self.trained, keep), whole_on_cpu(self._average.state(), keep)
        return Snapshot(values, average, optimizer if keep else {})

    def restore(self, snapshot: Snapshot) -> None:
        """Take over a snapshot; raises CheckpointError if names or shapes differ."""
        copy_strictly(snapshot.values, self.trained, "checkpoint")
        if self._average.average:
            copy_strictly(snapshot.average, self._average.average, "moving average of the checkpoint")
        parts = {
            name: {k: sharded_like(v, self.trained[name]) if v.dim() else v for k, v in entry.items()}
            for name, entry in snapshot.optimizer.items()
            if name in self.trained
        }
        load_optimizer_state(self.optimizer, self.trained, parts)

    def _norm(self) -> Tensor:
        """Norm of the summed gradient over all shards, equal on every rank."""
        squares = []
        for parameter in self.trained.values():
            gradient = parameter.grad
            assert gradient is not None
            local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            share = 1.0 if isinstance(gradient, DTensor) else 1.0 / self._ranks.size  # replicated ones count once
            squares.append(share * local.double().square().sum())
        return self._ranks.all_reduce(torch.stack(squares).sum(), "sum", "gradients").sqrt().float()


def _shard(model: RetakeDiT, ranks: Ranks, dtype: torch.dtype) -> None:
    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (ranks.size,))
    # Low precision where weights are gathered and used; gradients are summed and shards kept in float32.
    wide = torch.promote_types(dtype, torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=wide, cast_forward_inputs=False)
    rest = {p for name, p in model.named_parameters() if "blocks." not in name or "camera_gain" in name}
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=rest)
        for method in ("learned_phases", "cross_keys"):  # what runs of a block before its forward
            register_fsdp_forward_method(block, method)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=rest)
    register_fsdp_forward_method(model, "precompute")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # losses carry global denominators: sum, do not average
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum

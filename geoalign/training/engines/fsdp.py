"""FSDP2: parameters, gradients and optimizer state sharded over the ranks, for models that do not fit one GPU.

Every block's self-attention, cross-attention and feed-forward are sharded units that are gathered where they run. The
small rest (modulation, norms, embeddings, camera gains) is replicated; trained parameters among it are summed as in the
replicated engine. Slower than that one where a model fits: every forward gathers what it needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from geoalign.config.training import OptimConfig
from geoalign.errors import CheckpointError, ConfigError
from geoalign.training.masters import MovingAverage
from geoalign.training.optim import build_adamw, load_optimizer_state, on_cpu, optimizer_state
from geoalign.training.ranks import Ranks
from geoalign.training.snapshot import Snapshot

if TYPE_CHECKING:
    from geoalign.models.dit import RetakeDiT


class ShardedEngine:
    """Parameters sharded by FSDP2; implements :class:`Engine`.

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

    def snapshot(self) -> Snapshot:
        """Copies on the CPU, gathered from the shards."""
        state = optimizer_state(self.optimizer, self.trained)
        whole = {name: {key: _whole(value) for key, value in entry.items()} for name, entry in state.items()}
        return Snapshot(
            on_cpu({name: _whole(value) for name, value in self.trained.items()}),
            on_cpu({name: _whole(value) for name, value in self._average.state().items()}),
            {name: on_cpu(entry) for name, entry in whole.items()},
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Take over a snapshot; raises CheckpointError if names or shapes differ."""
        _copy_whole(snapshot.values, self.trained, "checkpoint")
        if self._average.average:
            _copy_whole(snapshot.average, self._average.average, "moving average of the checkpoint")
        parts = {
            name: {key: _like(value, self.trained[name]) if value.dim() else value for key, value in entry.items()}
            for name, entry in snapshot.optimizer.items()
            if name in self.trained
        }
        load_optimizer_state(self.optimizer, self.trained, parts)

    def _norm(self) -> Tensor:
        """Norm of the summed gradient over all shards, equal on every rank."""
        squares = torch.zeros((), dtype=torch.float64)
        for parameter in self.trained.values():
            gradient = parameter.grad
            assert gradient is not None
            local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            share = 1.0 if isinstance(gradient, DTensor) else 1.0 / self._ranks.size  # replicated ones count once
            squares += share * float(local.double().square().sum())
        return self._ranks.all_reduce(squares, "sum", "gradients").sqrt().float()


def _shard(model: RetakeDiT, ranks: Ranks, dtype: torch.dtype) -> None:
    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (ranks.size,))
    # Low precision where weights are gathered and used; gradients are summed and shards kept in float32.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    inside: set[nn.Parameter] = set()
    for block in model.blocks:
        gains = {p for name, p in block.self_attn.named_parameters() if name == "camera_gain"}
        for part in (block.self_attn, block.cross_attn, block.ffn):
            fully_shard(part, mesh=mesh, mp_policy=policy, ignored_params=gains)
        register_fsdp_forward_method(block.self_attn, "learned_phases")
        register_fsdp_forward_method(block.cross_attn, "prepare")
        inside |= {p for part in (block.self_attn, block.cross_attn, block.ffn) for p in part.parameters()} - gains
    rest = {p for p in model.parameters() if p not in inside}
    for parameter in rest:
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=rest)
    register_fsdp_forward_method(model, "prepare")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # losses carry global denominators: sum, do not average
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _like(whole: Tensor, target: Tensor) -> Tensor:
    """``whole``, sharded as ``target`` is."""
    if not isinstance(target, DTensor):
        return whole
    return distribute_tensor(whole.to(target.device), target.device_mesh, target.placements)


@torch.no_grad()
def _copy_whole(values: Mapping[str, Tensor], into: Mapping[str, Tensor], what: str) -> None:
    wrong = [name for name in into if name not in values or values[name].shape != into[name].shape]
    if wrong or len(values) != len(into):
        raise CheckpointError(f"{what} does not fit this model: {', '.join(wrong[:3]) or 'unexpected names'}")
    for name, target in into.items():
        target.copy_(_like(values[name], target))

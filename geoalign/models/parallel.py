"""Sequence parallelism over attention heads (DeepSpeed-Ulysses, arXiv 2309.14509): ranks share the tokens of a sample.

Every rank holds an equal, contiguous part of the target tokens and of the source tokens. Around the attention an
all-to-all turns "all heads of my tokens" into "my heads of all tokens" and back; the rest of a block is per token.
Parameter gradients of a rank are those of its tokens: their sum over the ranks is the gradient of the sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from geoalign.errors import ConfigError
from geoalign.models.conditioning import ConditionCache, on_tensors

Exchange = Callable[[Tensor], Tensor]
"""All-to-all on the leading dimension: row r goes to rank r, row r of the result came from rank r."""

_exchanges: dict[str, Exchange] = {}


@torch.library.custom_op("geoalign::exchange", mutates_args=())
def _exchange(x: Tensor, group: str) -> Tensor:
    # An operator of its own, so that checkpoint policies and compiled graphs see one opaque collective.
    return _exchanges[group](x.contiguous())


@_exchange.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep_group(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.group = inputs[1]


_exchange.register_autograd(lambda ctx, grad: (_exchange(grad, ctx.group), None), setup_context=_keep_group)


class _Gather(torch.autograd.Function):
    """Tokens of all ranks; every rank computes the same loss from them, so its gradient is its own part of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str, rank: int, size: int) -> Tensor:
        ctx.rank, ctx.size = rank, size
        parts = _exchange(x.expand(size, *x.shape), group)
        return parts.transpose(0, 1).flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return grads[0].unflatten(1, (ctx.size, -1))[:, ctx.rank], None, None, None


@dataclass(frozen=True, slots=True)
class LocalTokens:
    """Which tokens of ``[0, targets)`` and ``[targets, total)`` this rank holds.

    Attributes:
        rank, size: of the group.
        targets, total: tokens of the whole sample.
    """

    rank: int
    size: int
    targets: int
    total: int

    @property
    def count(self) -> int:
        """Target tokens held here; they come first."""
        return self.targets // self.size

    def rows(self, x: Tensor, dim: int = 0) -> Tensor:
        """The local part of ``x`` along its token dimension."""
        target, source = x.narrow(dim, 0, self.targets), x.narrow(dim, self.targets, self.total - self.targets)
        return torch.cat([part.tensor_split(self.size, dim)[self.rank] for part in (target, source)], dim)

    def tokens(self, x: Tensor) -> Tensor:
        """The local part of ``[B, N, ...]``."""
        return self.rows(x, 1)

    def cache(self, cache: ConditionCache) -> ConditionCache:
        """The local part of everything that blocks read per token."""
        phases, tokens, poses = on_tensors((cache.phases, cache.camera_tokens, cache.poses), self.tokens)
        return replace(cache, phases=phases, camera_tokens=tokens, poses=poses)


@dataclass(frozen=True, slots=True)
class SequenceParallel:
    """One group of ranks that share the tokens of every sample.

    Attributes:
        group: name under which its all-to-all is registered (:meth:`register`).
        rank, size: of this process in the group.
    """

    group: str
    rank: int
    size: int

    @staticmethod
    def register(group: str, rank: int, size: int, exchange: Exchange) -> SequenceParallel:
        """A group whose collective is ``exchange``."""
        _exchanges[group] = exchange
        return SequenceParallel(group, rank, size)

    def layout(self, targets: int, total: int) -> LocalTokens:
        """The local tokens of samples of ``total`` tokens.

        Raises:
            ConfigError: target or source tokens do not divide by the ranks.
        """
        for name, count in (("target", targets), ("source", total - targets)):
            if count % self.size:
                raise ConfigError(f"parallel.sequence {self.size} does not divide the {count} {name} tokens of a video")
        return LocalTokens(self.rank, self.size, targets, total)

    def to_heads(self, x: Tensor) -> Tensor:
        """``[B, n, H, hd]`` of the local tokens to ``[B, n * size, H / size, hd]`` of all tokens, rank by rank."""
        parts = torch.stack(x.tensor_split(self.size, 2))
        return _exchange(parts, self.group).transpose(0, 1).flatten(1, 2)

    def to_tokens(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`to_heads`."""
        parts = x.unflatten(1, (self.size, -1)).transpose(0, 1)
        return torch.cat(_exchange(parts, self.group).unbind(0), 2)

    def gather(self, x: Tensor) -> Tensor:
        """Target tokens of all ranks ``[B, n * size, D]`` in order; its backward returns the local part."""
        return _Gather.apply(x, self.group, self.rank, self.size)

"""How a network runs: what is recomputed, compiled, shared between ranks. Nothing of it belongs to a checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from geoalign_kernels import ProbedInt8Attention

if TYPE_CHECKING:
    from geoalign.models.layers import Block, Stream
    from geoalign.models.parallel import SequenceParallel

Recompute = Literal["none", "keep_attention", "full"]


@dataclass(slots=True)
class Execution:
    """Settings of one network, shared by all its blocks. All but ``probe`` leave the result as it is, rounding aside.

    Attributes:
        prune_source: skip the last block's queries and feed-forward of source tokens, whose output is unused.
        recompute: what a block's backward computes again: nothing, all but attention's output and log-sum-exp, or all.
        cache_phases: keep learned camera phases with the condition where no gradient is needed.
        core: exact attention core (:func:`geoalign_kernels.resolve_attention`); None resolves it at every call.
        probe: measures int8 attention for steps that take no log-probability; None: exact attention everywhere.
        sequence: ranks that share the tokens of every sample; None: all tokens are here.
        dtype: of the matrices of blocks where their stored weights have another one (FSDP2 masters), or None.
        compiled: run blocks through ``torch.compile``.
    """

    prune_source: bool = True
    recompute: Recompute = "none"
    cache_phases: bool = True
    core: str | None = None
    probe: ProbedInt8Attention | None = None
    sequence: SequenceParallel | None = None
    dtype: torch.dtype | None = None
    compiled: bool = False

    def run(self, block: Block, *args: Any) -> Stream:
        """``block.compute(*args)``, computed again in its backward and compiled as configured."""
        # A measurement cannot be compiled.
        unknown = self.probe is not None and self.probe.measures(block.self_attn.layer)
        step = _compiled() if self.compiled and not unknown else _eager
        return step(block, self.recompute if torch.is_grad_enabled() else "none", args)


def allow_graphs(limit: int = 64) -> None:
    """Let the compiler keep that many graphs of the block function.

    One network needs several: first, middle and pruned last block, with and without gradients, per batch shape.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)


def _eager(block: Block, recompute: Recompute, args: tuple[Any, ...]) -> Stream:
    if recompute == "none":
        return block.compute(*args)
    context = {} if recompute == "full" else {"context_fn": _KEEP_ATTENTION}
    # Nothing here draws from torch's generators, so their state need not be kept for the second time.
    return checkpoint(block.compute, *args, use_reentrant=False, preserve_rng_state=False, **context)


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = op is torch.ops.geoalign.attention.default
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


_KEEP_ATTENTION = partial(create_selective_checkpoint_contexts, _policy)


# One compiled function for all blocks: their parameters are inputs of its graph, so equal blocks share one graph. The
# checkpoint is inside, so that the compiler's own split between forward and backward respects what must be kept.
@functools.cache
def _compiled() -> Callable[..., Stream]:
    return torch.compile(_eager, fullgraph=True, dynamic=False)  # loads the compiler, which an eager run has no use for

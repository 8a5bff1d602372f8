"""What the adapters share: settings of a handle, reversible patches, attention of a Wan block, rotary angles."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from geoalign_kernels.ops.attention import attention, resolve_attention
from geoalign_kernels.ops.rms_norm import rms_norm
from geoalign_kernels.rows import working_dtype

_ABSENT = object()
_CACHED_SHAPES = 8
IMAGE_TOKENS = 257
"""CLIP tokens in front of the text in the context of an image-to-video model."""


@dataclass(slots=True)
class Patch:
    """One attribute of one instance, replaced until ``undo``; the class is never touched."""

    owner: Any
    name: str
    value: Any
    _before: Any = _ABSENT

    def apply(self) -> None:
        """Set the attribute."""
        self._before = self.owner.__dict__.get(self.name, _ABSENT)
        self.owner.__dict__[self.name] = self.value

    @property
    def is_ours(self) -> bool:
        """Whether the attribute is still what ``apply`` set."""
        return self.owner.__dict__.get(self.name) is self.value

    def undo(self) -> None:
        """Put back what was there."""
        if self._before is _ABSENT:
            del self.owner.__dict__[self.name]
        else:
            self.owner.__dict__[self.name] = self._before


@torch.compiler.assume_constant_result
def _resolved(device: torch.device, dtype: torch.dtype) -> str:
    return resolve_attention(device, dtype)


@dataclass(slots=True)
class Core:
    """The exact attention core: fixed by name, or resolved by device and dtype, once for each."""

    name: str | None

    def of(self, q: Tensor) -> str:
        """Name of the core that serves queries like ``q``."""
        return self.name or _resolved(q.device, q.dtype)


def wide(x: Tensor) -> Tensor:
    """x in float32, or as it is if it is float64."""
    return x.to(working_dtype(x))


def heads_of(x: Tensor, heads: int) -> Tensor:
    """[B, S, H * hd] as [B, S, H, hd]."""
    return x.unflatten(2, (heads, -1))


def cross_attention(
    q: Tensor, pairs: list[tuple[Tensor, Tensor, nn.Module]], norm_q: nn.Module, heads: int, core: Core
) -> Tensor:
    """Sum of the attentions of the normalised queries to several sets of keys and values: [B, S, H * hd].

    Args:
        q: projected queries [B, S, H * hd].
        pairs: (keys, values, norm of the keys) likewise; text, then image tokens if there are any.
        norm_q: RMSNorm of the queries. heads: H. core: of attention.
    """
    q = heads_of(rms(q, norm_q), heads)
    total: Tensor | None = None
    for k, v, norm_k in pairs:
        keys, values = heads_of(rms(k, norm_k), heads), heads_of(v, heads)
        out = attention(q, keys, values, core=core.of(q)).out
        total = out if total is None else total + out
    assert total is not None
    return total.flatten(2)


def rms(x: Tensor, norm: Any) -> Tensor:
    """The RMSNorm module of either project, over all heads."""
    return rms_norm(x, norm.weight, norm.eps)


class Memo:
    """The last few results by key, valid while ``sources`` are the same objects: a module moved or cast has others."""

    def __init__(self) -> None:
        self._sources: tuple[Tensor, ...] = ()
        self._results: OrderedDict[Any, Any] = OrderedDict()

    def get(self, key: Any, sources: tuple[Tensor, ...], compute: Callable[[], Any]) -> Any:
        """The result of ``compute`` for ``key``; always computed where a compiler traces."""
        if torch.compiler.is_compiling():
            return compute()
        if len(sources) != len(self._sources) or any(a is not b for a, b in zip(sources, self._sources, strict=True)):
            self._sources = sources
            self._results.clear()
        if key not in self._results:
            # What inference mode makes can never enter a backward, and this may be used by one.
            with torch.inference_mode(False), torch.no_grad():
                self._results[key] = compute()
            if len(self._results) > _CACHED_SHAPES:
                self._results.popitem(last=False)
        return self._results[key]

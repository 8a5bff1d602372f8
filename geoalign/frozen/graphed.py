"""Replay of a scorer's forward pass as a CUDA graph, one graph per input shape, with eager as the reference.

A graph records addresses, not values: its inputs, outputs and weights must stay where they were. Inputs are copied into
static buffers and outputs are cloned, so callers never see them. Weights are watched: a scorer whose weights moved is
captured again. To share memory between scorers without moving weights, see :class:`geoalign.frozen.arena.WeightArena`.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from geoalign.errors import UsageError
from geoalign.frozen.precision import HOST

_LOG = logging.getLogger(__name__)

Body = Callable[..., Mapping[str, Tensor]]
ShapeKey = tuple[tuple[tuple[int, ...], torch.dtype, torch.device], ...]


class CaptureBackend(Protocol):
    """How a body becomes a replayable graph. Scorers that share a backend share its memory pool and must run in turn.

    Attributes:
        device_type: inputs on such devices are captured, all others run eagerly ("cuda" in production).
    """

    device_type: str

    def capture(
        self, body: Body, inputs: tuple[Tensor, ...], warmups: int
    ) -> tuple[Callable[[], None], Mapping[str, Tensor]]:
        """Run ``body`` on ``inputs`` ``warmups`` times, then record it.

        Returns a replay function, which reads ``inputs`` in place and writes the returned static outputs in place.
        """
        ...

    def settle(self) -> None:
        """Wait until no graph runs; called before graphs are dropped."""
        ...


class CudaGraphBackend:
    """``torch.cuda.CUDAGraph`` capture with one private memory pool for all graphs of this backend.

    Every live graph has a capture stream of its own: torch keeps cuBLAS workspaces by stream and frees those of a
    graph's capture stream with the graph, whoever else recorded their addresses (pytorch/pytorch#193402).
    """

    device_type = "cuda"

    def __init__(self) -> None:
        self._pool: Any = None

    def capture(
        self, body: Body, inputs: tuple[Tensor, ...], warmups: int
    ) -> tuple[Callable[[], None], Mapping[str, Tensor]]:
        """Warm up on a side stream (libraries create handles and workspaces lazily), then capture."""
        with HOST, torch.cuda.device(inputs[0].device):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph, side = torch.cuda.CUDAGraph(), _CAPTURE_STREAMS.take(inputs[0].device)
            weakref.finalize(graph, _CAPTURE_STREAMS.give_back, inputs[0].device, side)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(warmups):
                    body(*inputs)
            torch.cuda.current_stream().wait_stream(side)
            # Other threads (decoding, collectives) may go on using the device while this one records.
            with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
                outputs = body(*inputs)
        return graph.replay, outputs

    def settle(self) -> None:
        """Wait until no graph runs, so that graphs may be dropped."""
        torch.cuda.synchronize()


class _Streams:
    """Streams that no two live graphs share, by device.

    ``make`` hands out streams of a small pool in turn (torch has 32), so the same one may come again.
    """

    _ATTEMPTS = 64

    def __init__(self, make: Callable[[torch.device], Any]) -> None:
        self._make, self._lock = make, threading.Lock()
        self._free: dict[torch.device, list[Any]] = {}
        self._taken: dict[torch.device, set[Any]] = {}

    def take(self, device: torch.device) -> Any:
        """A stream of ``device`` for one graph; raises UsageError when all are in use."""
        with self._lock:
            free, taken = self._free.setdefault(device, []), self._taken.setdefault(device, set())
            if free:
                return free.pop()
            for _ in range(self._ATTEMPTS):
                stream = self._make(device)
                if stream not in taken:
                    taken.add(stream)
                    return stream
        raise UsageError(
            f"{len(taken)} CUDA graphs are alive on {device}: use fewer scorers, or lower their max_graphs"
        )

    def give_back(self, device: torch.device, stream: Any) -> None:
        """The graph is gone."""
        with self._lock:
            self._free[device].append(stream)


_CAPTURE_STREAMS = _Streams(torch.cuda.Stream)


@dataclass(frozen=True, slots=True)
class _Captured:
    inputs: tuple[Tensor, ...]
    outputs: Mapping[str, Tensor]
    replay: Callable[[], None]
    weights: tuple[int, ...]


@dataclass(slots=True)
class GraphCounts:
    """What happened so far: ``eager`` runs, ``captures`` (first ones and repeats), ``replays``, ``evictions``, and
    ``moved`` (captures thrown away because weights had moved)."""

    eager: int = 0
    captures: int = 0
    replays: int = 0
    evictions: int = 0
    moved: int = 0


@dataclass(slots=True)
class GraphedScorer:
    """Calls ``body`` eagerly or as a captured graph; both give the same numbers.

    Attributes:
        body: tensors in, named tensors out; static shapes, no host reads, no random numbers, no state.
        module: the weights that ``body`` reads (parameters and buffers), watched for moves.
        backend: how to capture; give several scorers one backend to let them share its memory pool.
        max_graphs: least recently used graphs beyond this many are dropped.
        warmups: eager runs before a capture.

    Raises UsageError (at construction) for ``max_graphs`` or ``warmups`` below 1.
    """

    body: Body
    module: nn.Module | None = None
    backend: CaptureBackend = field(default_factory=CudaGraphBackend)
    max_graphs: int = 4
    warmups: int = 3
    counts: GraphCounts = field(default_factory=GraphCounts, init=False)
    _graphs: OrderedDict[ShapeKey, _Captured] = field(default_factory=OrderedDict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.max_graphs < 1 or self.warmups < 1:
            raise UsageError(f"max_graphs and warmups must be at least 1, got {self.max_graphs} and {self.warmups}")

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Run on ``inputs``; the returned tensors belong to the caller."""
        if inputs[0].device.type != self.backend.device_type:
            self.counts.eager += 1
            return dict(self.body(*inputs))
        graph = self._graph_for(inputs)
        for static, fresh in zip(graph.inputs, inputs, strict=True):
            static.copy_(fresh, non_blocking=True)
        graph.replay()
        self.counts.replays += 1
        return {name: output.clone() for name, output in graph.outputs.items()}

    def clear(self) -> None:
        """Drop all graphs and their static buffers."""
        while self._graphs:
            self._drop()

    def _graph_for(self, inputs: tuple[Tensor, ...]) -> _Captured:
        key: ShapeKey = tuple((tuple(x.shape), x.dtype, x.device) for x in inputs)
        addresses = self._weight_addresses()
        graph = self._graphs.get(key)
        if graph is not None and graph.weights != addresses:
            _LOG.warning("weights moved since capture; %d graph(s) are captured again", len(self._graphs))
            self.counts.moved += len(self._graphs)
            self.clear()
            graph = None
        if graph is None:
            if len(self._graphs) == self.max_graphs:
                self._drop()
                self.counts.evictions += 1
            static = tuple(x.clone(memory_format=torch.contiguous_format) for x in inputs)
            replay, outputs = self.backend.capture(self.body, static, self.warmups)
            self.counts.captures += 1
            graph = self._graphs[key] = _Captured(static, outputs, replay, addresses)
        self._graphs.move_to_end(key)
        return graph

    def _drop(self) -> None:
        """Forget the least recently used graph; no capture begins before it is gone."""
        with HOST:
            self.backend.settle()
            self._graphs.popitem(last=False)

    def _weight_addresses(self) -> tuple[int, ...]:
        if self.module is None:
            return ()
        return tuple(t.data_ptr() for group in (self.module.parameters(), self.module.buffers()) for t in group)

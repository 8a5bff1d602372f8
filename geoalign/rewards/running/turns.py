"""When and where the rewards of a batch run; all of them give equal scores.

Rewards in the training process run in turn, so they may share a pose estimate and a memory pool. Rewards elsewhere (in
worker processes) begin first and are collected last. All of them may run beside the decoding of the next videos: on a
side stream of the same GPU, or on a thread of the CPU.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from geoalign.errors import UsageError
from geoalign.frozen.precision import host
from geoalign.perf.spans import span
from geoalign.rewards.base import Reward, RewardOutput
from geoalign.rewards.running.guard import check_output, concatenate, invalid_output
from geoalign.types import RetakeBatch

_LOG = logging.getLogger(__name__)

Decode = Callable[[Tensor, RetakeBatch], Tensor]
"""(rows ``[n]`` int64, their n conditions) -> videos ``[n, F, 3, H, W]`` in [-1, 1]."""


@dataclass(frozen=True, slots=True)
class Scored:
    """What all rewards say of R videos.

    Attributes:
        outputs: reward name -> scores, valid mask, parts and diagnostics of R rows, on the device of the videos.
        seconds: reward name -> seconds it was busy. Rewards that ran side by side add up to more than the wall clock.
    """

    outputs: dict[str, RewardOutput]
    seconds: dict[str, float]

    def camera(self, row: int) -> Tensor | None:
        """The camera ``[F, 4, 4]`` that the first reward with cameras read from video ``row``; None without one."""
        return next((o.cameras[row] for o in self.outputs.values() if o.cameras is not None), None)


def score_all(rewards: Mapping[str, Reward], videos: Tensor, batch: RetakeBatch) -> Scored:
    """Score ``videos`` ``[R, F, 3, H, W]`` of R conditions with all rewards.

    A reward that raises makes its samples invalid and is logged; the others keep their scores. (A ``GuardedReward``
    singles out the bad sample first.) A UsageError (a wrong set-up, not a bad sample) is raised once all have ended.
    """
    elsewhere = [name for name, reward in rewards.items() if getattr(reward, "elsewhere", False)]
    stream = torch.cuda.current_stream(videos.device) if videos.is_cuda else None
    if stream is not None:
        stream.synchronize()  # decoding that is still under way is charged to no reward
    answers: dict[str, tuple[RewardOutput, float]] = {}
    with ThreadPoolExecutor(max(1, len(elsewhere)), thread_name_prefix="reward") as pool:
        begun = {name: pool.submit(_score, name, rewards[name], videos, batch, stream) for name in elsewhere}
        for name, reward in rewards.items():
            if name not in begun:
                answers[name] = _score(name, reward, videos, batch, stream)
        answers |= {name: future.result() for name, future in begun.items()}
    return Scored({name: answers[name][0] for name in rewards}, {name: answers[name][1] for name in rewards})


def _score(name: str, reward: Reward, videos: Tensor, batch: RetakeBatch, stream: Any) -> tuple[RewardOutput, float]:
    """One reward's answer on the device of the videos, and its seconds, device work included."""
    began = time.perf_counter()
    with torch.cuda.stream(stream), span(f"reward/{name}"):
        try:
            output = check_output(reward(videos, batch), reward.keys, len(batch))
        except UsageError:
            raise
        except Exception as error:
            _LOG.warning("reward %s failed on %d videos: %s: %s", name, len(batch), type(error).__name__, error)
            output = invalid_output(reward.keys, len(batch), videos.device)
        output = output.map(lambda value: value.to(videos.device))
        if stream is not None:
            stream.synchronize()
    return output, time.perf_counter() - began


def decode_and_score(
    rewards: Mapping[str, Reward],
    decode: Decode,
    batch: RetakeBatch,
    conditions: Tensor | None = None,
    *,
    chunk: int | None = None,
    beside: bool = False,
) -> Scored:
    """Decode and score R videos, a chunk at a time, as if all were scored at once.

    Scores are those of :func:`score_all` on all videos, up to the rounding of another batch shape inside a scorer;
    ``beside`` changes no bit. Retries, time-outs and what a raising, unguarded reward loses count per chunk.

    Args:
        rewards: scorers by name.
        decode: makes the videos of a chunk; called in order, on the caller's thread and stream.
        batch: B conditions.
        conditions: ``[R]`` int64, the condition of each video; default: one video of each.
        chunk: videos per chunk; None takes all at once.
        beside: score a chunk while the next one is decoded. At most two decoded chunks are alive; otherwise one.

    Raises UsageError for a chunk below 1, and what ``decode`` raises.
    """
    owner = torch.arange(len(batch)) if conditions is None else conditions
    count = len(owner)
    if count < 1 or (chunk is not None and chunk < 1):
        raise UsageError(f"nothing to score: {count} videos in chunks of {chunk}")
    pieces = torch.arange(count, device=owner.device).split(chunk or count)

    def make(rows: Tensor) -> tuple[Tensor, RetakeBatch]:
        part = batch.select(owner[rows])
        with host():  # no scorer on another thread switches precision or captures a graph meanwhile
            return decode(rows, part), part

    chunks = _score_beside(rewards, make, pieces) if beside else (score_all(rewards, *make(rows)) for rows in pieces)
    return _join(list(chunks))


def _join(chunks: Sequence[Scored]) -> Scored:
    names = chunks[0].outputs
    return Scored(
        {name: concatenate([chunk.outputs[name] for chunk in chunks]) for name in names},
        {name: sum(chunk.seconds[name] for chunk in chunks) for name in names},
    )


def _score_beside(
    rewards: Mapping[str, Reward], make: Callable[[Tensor], tuple[Tensor, RetakeBatch]], pieces: Sequence[Tensor]
) -> Iterator[Scored]:
    """Scores of each piece in order, each computed on a thread (CUDA: and a side stream) while the next is made."""
    with ThreadPoolExecutor(1, thread_name_prefix="rewards") as pool:
        pending: Future[Scored] | None = None
        for rows in pieces:
            begun = _begin(pool, rewards, *make(rows))
            if pending is not None:
                yield _received(pending)
            pending = begun
        if pending is not None:
            yield _received(pending)


def _begin(
    pool: ThreadPoolExecutor, rewards: Mapping[str, Reward], videos: Tensor, batch: RetakeBatch
) -> Future[Scored]:
    """Queue the scoring of one chunk; nothing here, the pool's queue included, keeps the chunk once it is scored."""
    ready = torch.cuda.current_stream(videos.device).record_event() if videos.is_cuda else None
    return pool.submit(_on_side_stream, rewards, [(videos, batch)], ready)


def _on_side_stream(rewards: Mapping[str, Reward], chunk: list[tuple[Tensor, RetakeBatch]], ready: Any) -> Scored:
    videos, batch = chunk.pop()
    if ready is None:
        return score_all(rewards, videos, batch)
    side = _side_stream(videos.device)
    side.wait_event(ready)
    with torch.cuda.stream(side):
        # Ends with the side stream idle, so no tensor of the chunk is freed while it is still read.
        return score_all(rewards, videos, batch)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One per device for good: the allocator keeps freed memory apart by stream."""
    return torch.cuda.Stream(device)


def _received(pending: Future[Scored]) -> Scored:
    """The result of a scoring thread, safe to read and free on the caller's stream."""
    scored = pending.result()

    def keep(value: Tensor) -> Tensor:
        if value.is_cuda:
            value.record_stream(torch.cuda.current_stream(value.device))
        return value

    return Scored({name: output.map(keep) for name, output in scored.outputs.items()}, scored.seconds)

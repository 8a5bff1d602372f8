"""What happens when a reward fails: samples without a score leave as invalid, counted, and nobody else notices.

Guarded rewards raise on wrong usage alone, so that no rank misses a collective and the scores of other rewards stay as
they are.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from geoalign.errors import RewardError, UsageError
from geoalign.rewards.base import Reward, RewardOutput, ScorerTimeoutError
from geoalign.types import RetakeBatch

_LOG = logging.getLogger(__name__)
FIRST_CALL = 10
"""How many times the limit the first batch of a shape may take: native code is built, graphs are captured."""


def invalid_output(keys: Sequence[str], count: int, device: torch.device) -> RewardOutput:
    """``count`` samples without a score: zeros that the mask keeps out of every mean."""
    scores = {key: torch.zeros(count, device=device) for key in keys}
    return RewardOutput(scores, torch.zeros(count, dtype=torch.bool, device=device))


def check_output(output: RewardOutput, keys: Sequence[str], count: int) -> RewardOutput:
    """Non-finite scores become invalid; missing keys or rows raise, because nobody knows which rows they are.

    Raises RewardError when keys or shapes differ from what was asked.
    """
    values = {**output.diagnostics, **output.parts, **output.scores, "valid": output.valid, "lost": output.lost}
    shapes = {key: tuple(value.shape) for key, value in values.items()}
    if set(output.scores) != set(keys) or any(shape != (count,) for shape in shapes.values()):
        raise RewardError(f"expected {count} values for each of {sorted({*keys, *shapes})}, got {shapes}")
    cameras = output.cameras
    if cameras is not None and (cameras.dim() != 4 or cameras.shape[0] != count or cameras.shape[2:] != (4, 4)):
        raise RewardError(f"expected cameras of shape ({count}, frames, 4, 4), got {tuple(cameras.shape)}")
    return output.masked_by_finite()


@dataclass(slots=True)
class FailureCounts:
    """What went wrong so far, for the log.

    Attributes:
        calls: batches asked for. retries: calls repeated. timeouts: answers that came too late.
        errors: exceptions and malformed answers by type name. invalid: samples that left without a score.
    """

    calls: int = 0
    retries: int = 0
    timeouts: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    invalid: int = 0

    def named(self) -> dict[str, int]:
        """Numbers by name; ``errors`` is their total."""
        return {"retries": self.retries, "timeouts": self.timeouts, "errors": self.errors.total()}


class GuardedReward:
    """A reward that never fails: late, failing or malformed answers turn into invalid samples.

    A usage error is raised: it names a wrong set-up, which no retry repairs and which every rank meets alike.

    A batch that raises is tried again, then sample by sample, so that one bad sample does not take the others with it.
    A late batch is not tried again: the time is gone.

    Args:
        reward: what to guard; with a time-out it runs on a thread of its own.
        timeout_s: longest time per call in seconds (first call of a shape: ten times that), None waits forever. A
            thread cannot be killed: until a hung call returns, further calls are invalid at once. A reward that runs
            elsewhere keeps the time itself: its process can be killed and started again.
        retries: how often a raising batch is repeated.
    """

    def __init__(self, reward: Reward, *, timeout_s: float | None = None, retries: int = 1) -> None:
        self.reward, self.name, self.keys = reward, reward.name, reward.keys
        self.elsewhere = getattr(reward, "elsewhere", False)
        self.timeout_s, self.retries, self.counts = timeout_s, retries, FailureCounts()
        self._hung: threading.Thread | None = None
        self._seen: set[torch.Size] = set()

    def __call__(self, videos: Tensor, batch: RetakeBatch) -> RewardOutput:
        """Score ``videos`` ``[B, F, 3, H, W]``; always returns B rows."""
        self.counts.calls += 1
        output = self._score(videos, batch)
        self.counts.invalid += int((~output.valid).sum())
        return output

    def _score(self, videos: Tensor, batch: RetakeBatch) -> RewardOutput:
        for attempt in range(self.retries + 1):
            self.counts.retries += attempt > 0
            try:
                return self._once(videos, batch)
            except UsageError:
                raise
            except ScorerTimeoutError:
                return invalid_output(self.keys, len(videos), videos.device)
            except Exception:  # any exception of a scorer is an infrastructure failure; it was logged and counted
                continue
        if len(videos) == 1:
            return invalid_output(self.keys, 1, videos.device)
        return concatenate([self._alone(videos[i : i + 1], batch.select([i])) for i in range(len(videos))])

    def _alone(self, video: Tensor, batch: RetakeBatch) -> RewardOutput:
        try:
            return self._once(video, batch)
        except UsageError:
            raise
        except Exception:  # logged and counted, as above
            return invalid_output(self.keys, 1, video.device)

    def _once(self, videos: Tensor, batch: RetakeBatch) -> RewardOutput:
        try:
            return check_output(self._timed(videos, batch), self.keys, len(videos))
        except UsageError:
            raise
        except ScorerTimeoutError as error:
            self.counts.timeouts += 1
            _LOG.warning("reward %s: %s", self.name, error)
            raise
        except Exception as error:
            self.counts.errors[type(error).__name__] += 1
            _LOG.warning("reward %s failed on %d sample(s): %s", self.name, len(videos), error)
            raise

    def _timed(self, videos: Tensor, batch: RetakeBatch) -> RewardOutput:
        if self.timeout_s is None or self.elsewhere:
            return self.reward(videos, batch)
        if self._hung is not None and self._hung.is_alive():
            raise ScorerTimeoutError("still busy with an earlier call that timed out")
        answer: list[RewardOutput] = []
        raised: list[BaseException] = []
        stream = torch.cuda.current_stream(videos.device) if videos.is_cuda else None

        def run() -> None:
            try:
                with torch.cuda.stream(stream):
                    answer.append(self.reward(videos, batch))
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=run, name=f"reward-{self.name}", daemon=True)
        limit = self.timeout_s * (1 if videos.shape in self._seen else FIRST_CALL)
        thread.start()
        thread.join(limit)
        if thread.is_alive():
            self._hung = thread
            raise ScorerTimeoutError(f"no answer within {limit:g} s")
        self._seen.add(videos.shape)
        if raised:
            raise raised[0]
        return answer[0]


def concatenate(outputs: Sequence[RewardOutput]) -> RewardOutput:
    """Join batches of one reward; parts, diagnostics and cameras that some batch lacks are NaN there."""

    def join(name: str) -> dict[str, Tensor]:
        keys = {key: None for output in outputs for key in getattr(output, name)}
        return {key: torch.cat([getattr(o, name).get(key, o.valid * torch.nan) for o in outputs]) for key in keys}

    valid, lost = torch.cat([output.valid for output in outputs]), torch.cat([output.lost for output in outputs])
    read = next((output.cameras for output in outputs if output.cameras is not None), None)
    cameras = None
    if read is not None:
        nothing = torch.full_like(read[:1], torch.nan)
        cameras = torch.cat(
            [o.cameras if o.cameras is not None else nothing.expand(len(o.valid), -1, -1, -1) for o in outputs]
        )
    return RewardOutput(join("scores"), valid, join("parts"), join("diagnostics"), lost, cameras)

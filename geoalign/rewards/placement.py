"""Where a reward runs, and what happens when it fails: in place, on a side stream, or in a process of its own.

All placements give equal scores. Guarded rewards raise on wrong usage alone: samples of a failing scorer come back
invalid with a counted cause, so that no rank misses a collective and the scores of other rewards stay as they are.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from geoalign.errors import RewardError, UsageError
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.rewards.base import Reward, RewardOutput
from geoalign.types import RetakeBatch, SourceClip

_LOG = logging.getLogger(__name__)
_START_TIMEOUT_S = 600.0  # of a worker: imports and gigabytes of weights


class ScorerTimeoutError(RewardError):
    """A scorer did not answer in time."""


def invalid_output(keys: Sequence[str], count: int, device: torch.device) -> RewardOutput:
    """``count`` samples without a score: zeros that the mask keeps out of every mean."""
    scores = {key: torch.zeros(count, device=device) for key in keys}
    return RewardOutput(scores, torch.zeros(count, dtype=torch.bool, device=device))


def check_output(output: RewardOutput, keys: Sequence[str], count: int) -> RewardOutput:
    """Non-finite scores become invalid; missing keys or rows raise, because nobody knows which rows they are.

    Raises RewardError when keys or shapes differ from what was asked.
    """
    shapes = {key: tuple(score.shape) for key, score in output.scores.items()} | {"valid": tuple(output.valid.shape)}
    if set(output.scores) != set(keys) or any(shape != (count,) for shape in shapes.values()):
        raise RewardError(f"expected {count} scores for each of {sorted(keys)}, got {shapes}")
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


class GuardedReward:
    """A reward that never fails: late, failing or malformed answers turn into invalid samples.

    A usage error is raised: it names a wrong set-up, which no retry repairs and which every rank meets alike.

    A batch that raises is tried again, then sample by sample, so that one bad sample does not take the others with it.
    A late batch is not tried again: the time is gone.

    Args:
        reward: what to guard; with a time-out it runs on a thread of its own.
        timeout_s: longest time per call in seconds, None waits forever. A thread cannot be killed: until a hung call
            returns, further calls are invalid at once. A :class:`WorkerReward` is killed and restarted instead.
        retries: how often a raising batch is repeated.
    """

    def __init__(self, reward: Reward, *, timeout_s: float | None = None, retries: int = 1) -> None:
        self.reward, self.name, self.keys = reward, reward.name, reward.keys
        self.timeout_s, self.retries, self.counts = timeout_s, retries, FailureCounts()
        self._hung: threading.Thread | None = None

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
        if self.timeout_s is None or isinstance(self.reward, WorkerReward):
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
        thread.start()
        thread.join(self.timeout_s)
        if thread.is_alive():
            self._hung = thread
            raise ScorerTimeoutError(f"no answer within {self.timeout_s} s")
        if raised:
            raise raised[0]
        return answer[0]


def concatenate(outputs: Sequence[RewardOutput]) -> RewardOutput:
    """Join batches of one reward; parts and diagnostics that some batch lacks are NaN there."""

    def join(name: str) -> dict[str, Tensor]:
        keys = {key: None for output in outputs for key in getattr(output, name)}
        return {key: torch.cat([getattr(o, name).get(key, o.valid * torch.nan) for o in outputs]) for key in keys}

    valid = torch.cat([output.valid for output in outputs])
    return RewardOutput(join("scores"), valid, join("parts"), join("diagnostics"))


def score_in_turn(rewards: Mapping[str, Reward], videos: Tensor, batch: RetakeBatch) -> dict[str, RewardOutput]:
    """All rewards one after another on the same device: the phase-wise placement."""
    return {name: reward(videos, batch) for name, reward in rewards.items()}


def score_beside(
    decode: Callable[[int], Tensor], batches: Sequence[RetakeBatch], rewards: Mapping[str, Reward]
) -> Iterator[dict[str, RewardOutput]]:
    """Score batch i on a side stream while batch i + 1 is decoded on the current one.

    Args:
        decode: gives the videos of batch i; called in order, on the caller's thread and stream.
        batches: the conditions of each.

    Yields the scores of each batch in order. At most two decoded batches exist at a time.
    """
    streams: dict[torch.device, Any] = {}

    def run(videos: Tensor, batch: RetakeBatch, ready: Any) -> tuple[dict[str, RewardOutput], Any]:
        if not videos.is_cuda:
            return score_in_turn(rewards, videos, batch), None
        side = streams.setdefault(videos.device, torch.cuda.Stream(videos.device))
        with torch.cuda.stream(side):
            side.wait_event(ready)
            videos.record_stream(side)
            outputs = score_in_turn(rewards, videos, batch)
            return outputs, side.record_event()

    with ThreadPoolExecutor(1, thread_name_prefix="rewards") as pool:
        pending = None
        for index, batch in enumerate(batches):
            videos = decode(index)
            ready = torch.cuda.current_stream(videos.device).record_event() if videos.is_cuda else None
            following = pool.submit(run, videos, batch, ready)
            if pending is not None:
                yield _collect(*pending.result())
            pending = following
        if pending is not None:
            yield _collect(*pending.result())


def _collect(outputs: dict[str, RewardOutput], done: Any) -> dict[str, RewardOutput]:
    if done is not None:
        torch.cuda.current_stream().wait_event(done)
        for output in outputs.values():
            for tensor in (*output.scores.values(), output.valid, *output.parts.values(), *output.diagnostics.values()):
                if tensor.is_cuda:
                    tensor.record_stream(torch.cuda.current_stream())
    return outputs


class WorkerReward:
    """A reward in a process of its own, possibly with another Python environment or device.

    The process starts at :meth:`start` or at the first call and serves one batch at a time through files in a private
    folder. It is killed when it does not answer in time, and started again at the next call.

    Args:
        name: of the reward inside.
        keys: of the reward inside; the answer of :meth:`start` replaces them.
        factory: ``module:callable`` that builds it there.
        options: JSON-able keyword arguments of the factory.
        python: interpreter of the worker's environment; it needs torch and safetensors beside the scorer's packages.
        environment: extra variables, for instance ``CUDA_VISIBLE_DEVICES`` for a dedicated GPU.
        timeout_s: longest time per batch in seconds, start-up (imports, weights) excluded: that may take 600 s.
    """

    def __init__(
        self,
        name: str,
        keys: Sequence[str],
        factory: str,
        *,
        options: Mapping[str, Any] | None = None,
        python: str = sys.executable,
        environment: Mapping[str, str] | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        self.name, self.keys, self.timeout_s, self.starts = name, tuple(keys), timeout_s, 0
        self._setup = {"factory": factory, "options": dict(options or {})}
        self._python, self._environment = python, dict(environment or {})
        self._process: subprocess.Popen[str] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix=f"geoalign-{name}-")

    def __call__(self, videos: Tensor, batch: RetakeBatch) -> RewardOutput:
        """Score in the worker.

        Raises RewardError or UsageError with the worker's own message, ScorerTimeoutError when it is late.
        """
        self.start()
        folder = Path(self._folder.name)
        save_request(folder / "request", videos, batch)
        self._ask(str(folder), self.timeout_s)
        return load_output(folder / "answer.safetensors", videos.device)

    def start(self) -> None:
        """Start the process unless it runs, build the reward there and take over its keys.

        Raises RewardError or UsageError with the worker's own message when the reward cannot be built.
        """
        if self._process is not None and self._process.poll() is None:
            return
        self._launch()
        try:
            self.keys = tuple(self._ask("", _START_TIMEOUT_S)["keys"])
        except (RewardError, UsageError):  # a reward that cannot be built leaves no process behind
            self._kill()
            raise

    def close(self) -> None:
        """End the worker and delete its folder."""
        self._kill()
        self._folder.cleanup()

    def _launch(self) -> None:
        self._kill()
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, (root, str(Path(root) / "kernels"), os.environ.get("PYTHONPATH"))))
        try:
            self._process = subprocess.Popen(
                [self._python, "-m", "geoalign.rewards.placement", json.dumps(self._setup)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": path, **self._environment},
            )
        except OSError as error:
            raise RewardError(f"worker of reward {self.name}: {self._python} cannot be started ({error})") from error
        self.starts += 1

    def _ask(self, request: str, timeout_s: float) -> dict[str, Any]:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        late = threading.Event()

        def give_up() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(timeout_s, give_up)
        timer.start()
        try:
            process.stdin.write(f"{request}\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if line:
            answer = json.loads(line)
            if "error" in answer:
                raise (UsageError if answer["usage"] else RewardError)(
                    f"worker of reward {self.name}: {answer['error']}"
                )
            return answer
        self._kill()
        if late.is_set():
            raise ScorerTimeoutError(f"worker gave no answer within {timeout_s} s and was killed")
        raise RewardError(f"worker of reward {self.name} ended without an answer; its messages are on stderr")

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
            self._process = None


def save_request(stem: Path, videos: Tensor, batch: RetakeBatch) -> None:
    """Write ``stem.safetensors`` and ``stem.json``."""
    from safetensors.torch import save_file

    source = batch.source
    tensors = {
        "videos": videos,
        "source_video": source.video,
        "source_c2w": source.camera.c2w,
        "source_intrinsics": source.camera.intrinsics,
        "target_c2w": batch.target_camera.c2w,
        "target_intrinsics": batch.target_camera.intrinsics,
    }
    if source.ground_plane is not None:
        tensors["ground_plane"] = source.ground_plane
    # Cloned: safetensors refuses tensors that share memory, and views of one clip do.
    save_file({key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}, f"{stem}.safetensors")
    Path(f"{stem}.json").write_text(json.dumps({"prompts": batch.prompts, "clip_ids": source.clip_ids}))


def load_request(stem: Path) -> tuple[Tensor, RetakeBatch]:
    """Read what :func:`save_request` wrote."""
    from safetensors.torch import load_file

    tensors, names = load_file(f"{stem}.safetensors"), json.loads(Path(f"{stem}.json").read_text())
    source = SourceClip(
        tensors["source_video"],
        CameraTrajectory(tensors["source_c2w"], tensors["source_intrinsics"]),
        tensors.get("ground_plane"),
        tuple(names["clip_ids"]),
    )
    target = CameraTrajectory(tensors["target_c2w"], tensors["target_intrinsics"])
    return tensors["videos"], RetakeBatch(source, target, tuple(names["prompts"]))


def save_output(path: Path, output: RewardOutput) -> None:
    """Write a reward's answer as one safetensors file."""
    from safetensors.torch import save_file

    groups = {"scores": output.scores, "parts": output.parts, "diagnostics": output.diagnostics}
    tensors = {f"{group}/{key}": value for group, values in groups.items() for key, value in values.items()}
    tensors["valid"] = output.valid
    save_file({key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}, path)


def load_output(path: Path, device: torch.device) -> RewardOutput:
    """Read what :func:`save_output` wrote."""
    from safetensors.torch import load_file

    tensors = load_file(path, device=str(device))
    groups: dict[str, dict[str, Tensor]] = {"scores": {}, "parts": {}, "diagnostics": {}}
    valid = tensors.pop("valid")
    for name, value in tensors.items():
        group, key = name.split("/", 1)
        groups[group][key] = value
    return RewardOutput(groups["scores"], valid, groups["parts"], groups["diagnostics"])


def serve(setup: Mapping[str, Any], requests: IO[str], answers: IO[str]) -> None:
    """The worker's loop: one folder name per line in, one JSON line out.

    The reward is built at the first request. An empty line asks for that alone; the answer holds the reward's keys.
    """
    from importlib import import_module

    reward: Reward | None = None
    for line in requests:
        answer: dict[str, Any] = {}
        try:
            if reward is None:
                module, attribute = setup["factory"].split(":")
                reward = getattr(import_module(module), attribute)(**setup["options"])
            answer["keys"] = list(reward.keys)
            if folder := line.strip():
                save_output(Path(folder) / "answer.safetensors", reward(*load_request(Path(folder) / "request")))
        except Exception as error:  # reported to the parent, which counts it
            answer |= {"error": f"{type(error).__name__}: {error}", "usage": isinstance(error, UsageError)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    """Entry point of a worker process; scorers that print must not disturb the protocol, so stdout becomes stderr."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(json.loads(sys.argv[1]), sys.stdin, answers)


if __name__ == "__main__":
    main()

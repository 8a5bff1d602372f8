"""A reward in a process of its own: another Python environment, another device, and crashes that stay there.

Run as a module this file is the worker. Requests and answers are files in a private folder, announced line by line.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from geoalign.errors import RewardError, UsageError
from geoalign.files.locks import private_folder
from geoalign.files.sealed import write_tensors
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.rewards.base import Reward, RewardOutput, ScorerTimeoutError
from geoalign.types import RetakeBatch, SourceClip

_START_TIMEOUT_S = 600.0  # imports and gigabytes of weights


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

    Attributes:
        elsewhere: it waits for another process, so its caller may do other work meanwhile (see ``turns``).
    """

    elsewhere = True

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
        self._scratch = contextlib.ExitStack()
        self._folder: Path | None = None

    def __call__(self, videos: Tensor, batch: RetakeBatch) -> RewardOutput:
        """Score in the worker.

        Raises RewardError or UsageError with the worker's own message, ScorerTimeoutError when it is late.
        """
        self.start()
        if self._folder is None:
            self._folder = self._scratch.enter_context(private_folder("geoalign-worker-"))
        folder = self._folder
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
        self._scratch.close()
        self._folder = None

    def _launch(self) -> None:
        self._kill()
        root = str(Path(__file__).parents[3])
        path = os.pathsep.join(filter(None, (root, str(Path(root) / "kernels"), os.environ.get("PYTHONPATH"))))
        try:
            self._process = subprocess.Popen(
                [self._python, "-m", "geoalign.rewards.running.worker", json.dumps(self._setup)],
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
        assert process is not None
        line, late = ask_line(process, request, timeout_s, process.kill)
        if line.endswith("\n"):  # else it ended, perhaps within a line
            answer = json.loads(line)
            if "error" in answer:
                raise (UsageError if answer["usage"] else RewardError)(
                    f"worker of reward {self.name}: {answer['error']}"
                )
            return answer
        self._kill()
        if late:
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


def ask_line(
    process: subprocess.Popen[str], request: str, timeout_s: float, kill: Callable[[], object]
) -> tuple[str, bool]:
    """Give a process one line, and wait for the line that it answers with.

    Args:
        process: with pipes for input and output.
        request: without a newline.
        timeout_s: seconds, after which ``kill`` is called in a thread beside.

    Returns:
        (its line, which ends with a newline unless the process ended before, whether it was killed).
    """
    assert process.stdin is not None and process.stdout is not None
    late = threading.Event()

    def give_up() -> None:
        late.set()
        kill()

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
    return line, late.is_set()


def save_request(stem: Path, videos: Tensor, batch: RetakeBatch) -> None:
    """Write ``stem.safetensors`` and ``stem.json``."""
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
    _write(tensors, stem.with_suffix(".safetensors"))
    Path(f"{stem}.json").write_text(
        json.dumps({"prompts": batch.prompts, "clip_ids": source.clip_ids, "fps": batch.fps})
    )


def _write(tensors: Mapping[str, Tensor], path: Path) -> None:
    # Cloned: safetensors refuses tensors that share memory, and views of one clip do.
    write_tensors({key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}, path)


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
    return tensors["videos"], RetakeBatch(source, target, tuple(names["prompts"]), fps=names["fps"])


def save_output(path: Path, output: RewardOutput) -> None:
    """Write a reward's answer as one safetensors file."""
    groups = {"scores": output.scores, "parts": output.parts, "diagnostics": output.diagnostics}
    tensors = {f"{group}/{key}": value for group, values in groups.items() for key, value in values.items()}
    tensors |= {"valid": output.valid, "lost": output.lost}
    _write(tensors, path)


def load_output(path: Path, device: torch.device) -> RewardOutput:
    """Read what :func:`save_output` wrote."""
    from safetensors.torch import load_file

    # Cloned: on the CPU they are views of the file, which the next answer replaces.
    tensors = {name: value.clone() for name, value in load_file(path, device=str(device)).items()}
    groups: dict[str, dict[str, Tensor]] = {"scores": {}, "parts": {}, "diagnostics": {}}
    valid, lost = tensors.pop("valid"), tensors.pop("lost")
    for name, value in tensors.items():
        group, key = name.split("/", 1)
        groups[group][key] = value
    return RewardOutput(groups["scores"], valid, groups["parts"], groups["diagnostics"], lost)


def serve(setup: Mapping[str, Any], requests: IO[str], answers: IO[str]) -> None:
    """The worker's loop: one folder name per line in, one JSON line out.

    The reward is built at the first request. An empty line asks for that alone; the answer holds the reward's keys.
    Ends with its requests, or quietly when nobody reads the answers any more.
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
        try:
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
        except BrokenPipeError:  # whoever asked was killed meanwhile
            return


def choose_device(environment: Mapping[str, str], devices: int) -> int | None:
    """Which visible CUDA device a worker takes as its current one: ranks of a machine spread over them in turn.

    So the workers of four ranks with ``CUDA_VISIBLE_DEVICES=4,5,6,7`` have a device each. None without a device.
    """
    return int(environment.get("LOCAL_RANK", "0")) % devices if devices else None


def main() -> None:
    """Entry point of a worker process; scorers that print must not disturb the protocol, so stdout becomes stderr."""
    device = choose_device(os.environ, torch.cuda.device_count())
    if device is not None:
        torch.cuda.set_device(device)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(json.loads(sys.argv[1]), sys.stdin, answers)


if __name__ == "__main__":
    main()

"""Float32 that stays float32 on CUDA, and the lock around everything that changes state of the whole process.

Precision switches and a graph capture concern all threads. Whoever touches them, and whoever launches work that would
notice (the decode beside which a reward runs), holds ``HOST`` while launching. Replays of captured graphs need neither:
the kernels were chosen at capture.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from geoalign.errors import RunError

HOST = threading.RLock()
"""Held while process-wide CUDA state is changed, or while work is launched that depends on it."""
PATIENCE_S = 900.0
"""How long the trainer waits for ``HOST``: longer than any capture takes."""


@contextlib.contextmanager
def host() -> Iterator[None]:
    """Hold ``HOST``; raises RunError instead of waiting forever for a scorer that hangs while it holds it."""
    if not HOST.acquire(timeout=PATIENCE_S):
        raise RunError(
            f"a scorer of this process has held the GPU's settings for {PATIENCE_S:.0f} s and seems to hang (the log "
            "names those that are late); give it placement=worker, which can be killed, then --resume auto"
        )
    try:
        yield
    finally:
        HOST.release()


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Compute float32 matrix products and convolutions in float32, whatever TF32 setting the trainer uses."""
    # Looked up by name: the cudnn module gains its attributes when it is imported.
    switches = (torch.backends.cuda.matmul, getattr(torch.backends.cudnn, "conv"))  # noqa: B009
    with HOST:
        before = [switch.fp32_precision for switch in switches]
        try:
            for switch in switches:
                switch.fp32_precision = "ieee"
            yield
        finally:
            for switch, precision in zip(switches, before, strict=True):
                switch.fp32_precision = precision


def exactly(body: Callable[..., Any]) -> Callable[..., Any]:
    """``body`` under :func:`exact_float32` where its first input is on a CUDA device; unchanged elsewhere."""

    def run(*inputs: Tensor) -> Any:
        with exact_float32() if inputs[0].is_cuda else contextlib.nullcontext():
            return body(*inputs)

    return run

"""Registers ops with torch.library: eager, autograd, torch.compile and checkpoint policies all see one opaque op.

``Library.define/impl`` is used rather than ``torch.library.custom_op``, whose wrapper costs about three times the call
overhead, and rather than ``triton_op``, which cannot compile on a machine without a GPU.

Every tensor that an op returns is contiguous, whatever the strides of its operands. A compiled graph is built on the
strides that the fake promises, and a backend that handed on those of an operand, as plain torch does, would break it.
The rule has its home here: ``define`` holds every backend and every fake to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from geoalign_kernels import dispatch

NAMESPACE = "geoalign"
library = torch.library.Library(NAMESPACE, "DEF")


def on_device(device: torch.device, function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` with ``device`` as the current one: Triton launches there, wherever its operands lie."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return function(*args)
    with torch.cuda.device(device):
        return function(*args)


def contiguous(results: Any) -> Any:
    """What an op returns (a tensor, several, or None) with every tensor contiguous; free for those that are."""
    if results is None:
        return None
    return results.contiguous() if isinstance(results, torch.Tensor) else tuple(t.contiguous() for t in results)


def define(
    name: str,
    schema: str,
    *,
    fake: Callable[..., Any],
    implementation: Callable[..., Any] | None = None,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    guard: Callable[[], None] | None = None,
) -> None:
    """Defines ``geoalign::name`` for CPU and CUDA; ``dispatch`` chooses the implementation at each call.

    The first tensor argument decides the device. ``fake`` says shapes and dtypes; its strides, like those of every
    implementation, do not matter (see above). ``implementation`` runs in place of what ``dispatch`` would choose.
    ``guard`` may refuse a call by raising, also one of a compiled graph, which no check in Python around the op would
    see. ``backward`` and ``setup_context`` are those of ``torch.library.register_autograd``.
    """
    library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))

    def run(first: torch.Tensor, *args: Any) -> Any:
        if guard is not None:
            guard()
        if implementation is not None:
            return contiguous(on_device(first.device, implementation, first, *args))
        return contiguous(on_device(first.device, dispatch.run, name, first.device, (first, *args)))

    def promise(*args: Any) -> Any:
        return contiguous(fake(*args))

    for key in ("CPU", "CUDA"):
        library.impl(name, run, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", promise, lib=library)
    if backward is not None:
        torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=library)

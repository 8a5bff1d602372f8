"""Registers ops with torch.library: eager, autograd, torch.compile and checkpoint policies all see one opaque op.

``Library.define/impl`` is used rather than ``torch.library.custom_op``, whose wrapper costs about three times the call
overhead, and rather than ``triton_op``, which cannot compile on a machine without a GPU.
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


def define(
    name: str,
    schema: str,
    *,
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    guard: Callable[[], None] | None = None,
) -> None:
    """Defines ``geoalign::name`` for CPU and CUDA; ``dispatch`` chooses the implementation at each call.

    The first tensor argument decides the device. ``guard`` may refuse a call by raising, also one of a compiled graph,
    which no check in Python around the op would see. ``backward`` and ``setup_context`` are those of
    ``torch.library.register_autograd``.
    """
    library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))

    def run(first: torch.Tensor, *args: Any) -> Any:
        if guard is not None:
            guard()
        return on_device(first.device, dispatch.run, name, first.device, (first, *args))

    for key in ("CPU", "CUDA"):
        library.impl(name, run, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    if backward is not None:
        torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=library)

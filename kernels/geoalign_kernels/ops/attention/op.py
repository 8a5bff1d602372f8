"""``attention``: public function, the guard of the SDE window, registration.

The exact op is one opaque operator with outputs (O, LSE): a selective checkpoint policy can keep both and recompute the
rest. Its core is an argument of the operator, so a compiled or recomputed graph holds the choice that was made.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from geoalign_kernels import capture, dispatch
from geoalign_kernels.ops.attention import cores
from geoalign_kernels.registration import define
from geoalign_kernels.rows import working_dtype

_HERE = "geoalign_kernels.ops.attention"
dispatch.register(
    "attention",
    reporter=f"{_HERE}.cores:report",
    reference=f"{_HERE}.reference:forward",
    triton=f"{_HERE}.triton_impl:forward",
)
QUANTISED = ("int8", "int8_fp8")
for _name, _reporter in (("attention_int8", ""), ("attention_int8_fp8", f"{_HERE}.fp8_support:report_fp8")):
    dispatch.register(
        _name, reporter=_reporter, reference=f"{_HERE}.reference:{_name}", triton=f"{_HERE}.triton_impl:{_name}"
    )
_exact_only = False
_inside, _inside_lock = 0, threading.Lock()  # how many blocks are open, in all threads


class AttentionOutput(NamedTuple):
    """Result of ``attention``."""

    out: Tensor
    """[B, Sq, H, hd] in the dtype of q."""
    lse: Tensor | None
    """[B, H, Sq] float32, natural logarithm of the summed exponentials; None for the quantised modes."""


def inside_exact_only() -> bool:
    """Whether this code runs inside ``exact_only()``; a compiled graph is kept for each answer."""
    return _exact_only


@contextlib.contextmanager
def exact_only() -> Iterator[None]:
    """Inside (the SDE window of a rollout, the learner) nothing may replace the exact kernels, which the ratio needs.

    Quantised attention is refused there, also by graphs that were compiled outside. It holds for the whole process:
    blocks of several threads may overlap, and it ends with the last of them.
    """
    _count_inside(1)
    try:
        yield
    finally:
        _count_inside(-1)


def _count_inside(change: int) -> None:
    global _exact_only, _inside
    with _inside_lock:
        _inside += change
        _exact_only = _inside > 0


def resolve_attention(device: torch.device | str, dtype: torch.dtype, *, deterministic: bool = False) -> str:
    """Name of the exact core for this device and dtype; resolve it once and pass it to rollout and learner alike.

    On compute capability 9.0 FlashAttention 3, cuDNN, FlashAttention 2, torch's flash operator, in this order,
    whichever is there; elsewhere the last two. ``deterministic`` leaves out those whose backward does not repeat.

    Raises:
        BackendUnavailableError: the core that GEOALIGN_ATTENTION or ``use_backend`` names cannot run.
    """
    return cores.resolve(torch.device(device), dtype, deterministic=deterministic)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mode: Literal["exact", "int8", "int8_fp8"] = "exact",
    scale: float | None = None,
    core: str | None = None,
) -> AttentionOutput:
    """softmax(scale q k^T) v, non-causal, any lengths.

    Args:
        q: [B, Sq, H, hd], floating dtype. k: [B, Sk, H, hd]. v: like k.
        mode: "exact" (float32 accumulation, differentiable); "int8" (q and k in int8 with per-block scales, v in 16
            bits: as it is, float32 rounded to bfloat16 by the kernel); "int8_fp8" (probabilities and v in fp8 as well;
            compute capability 9.0 only). The quantised ones have no gradient, take heads of 32 to 128 in their kernels,
            and are for deterministic steps only; ``ProbedInt8Attention`` chooses per layer.
        scale: default hd^-0.5.
        core: one of ``cores.CORES``; default ``resolve_attention``.

    Raises:
        ValueError: shapes differ, or the mode or core is unknown.
        RuntimeError: a quantised mode inside ``exact_only()`` or where a gradient is needed.
        BackendUnavailableError: the core, or fp8, cannot run here.
    """
    if q.dim() != 4 or k.shape != v.shape or q.shape[::2] != k.shape[::2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q must be [B, Sq, H, hd] and k, v [B, Sk, H, hd]: {q.shape}, {k.shape}, {v.shape}")
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if mode in QUANTISED:
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            raise RuntimeError(f"{mode} attention has no gradient; use mode='exact' where one is needed")
        return AttentionOutput(getattr(torch.ops.geoalign, f"attention_{mode}")(q, k, v, scale), None)
    if mode != "exact":
        raise ValueError(f"attention mode '{mode}': choose one of exact, {', '.join(QUANTISED)}")
    core = core or resolve_attention(q.device, q.dtype)
    if core not in cores.CORES:
        raise ValueError(f"attention core '{core}': the cores are {', '.join(cores.CORES)}")
    return AttentionOutput(*torch.ops.geoalign.attention(q, k, v, scale, core))


def _fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=working_dtype(q))
    return torch.empty_like(q), lse


def _run(q: Tensor, k: Tensor, v: Tensor, scale: float, core: str) -> tuple[Tensor, Tensor]:
    capture.record("attention", (q, k, v, scale, core))
    return cores.forward(core, q, k, v, scale)


def _run_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, core: str
) -> tuple[Tensor, Tensor, Tensor]:
    capture.record("attention_backward", (grad, q, k, v, out, lse, scale, core))
    return cores.backward(core, grad, q, k, v, out, lse, scale)


def _backward_fake(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t) for t in (q, k, v))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale, ctx.core = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    grads = torch.ops.geoalign.attention_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.core)
    return *grads, None, None


# The core is chosen by argument, not by ``dispatch``.
define(
    "attention",
    "(Tensor q, Tensor k, Tensor v, float scale, str core) -> (Tensor, Tensor)",
    fake=_fake,
    implementation=_run,
    backward=_backward,
    setup_context=_setup_context,
)
define(
    "attention_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale, str core) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    implementation=_run_backward,
)


def _refuse(mode: str) -> None:
    if _exact_only:
        raise RuntimeError(
            f"{mode} attention inside the SDE window or the learner: its error exceeds the clip range of the policy "
            "ratio; use mode='exact' there"
        )


for _mode in QUANTISED:
    define(
        f"attention_{_mode}",
        "(Tensor q, Tensor k, Tensor v, float scale) -> Tensor",
        fake=lambda q, *_: torch.empty_like(q),
        guard=functools.partial(_refuse, _mode),
    )


@register_flop_formula(torch.ops.geoalign.attention)
def _attention_flops(q_shape: torch.Size, k_shape: torch.Size, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Two products, 2 FLOP a multiply-add: what torch's FLOP counter sees of an exact attention."""
    batch, queries, heads, head = q_shape
    return 4 * batch * heads * queries * k_shape[1] * head


@register_flop_formula(torch.ops.geoalign.attention_backward)
def _attention_backward_flops(
    _: torch.Size, q_shape: torch.Size, k_shape: torch.Size, *rest: Any, **options: Any
) -> int:
    """Five products, of which one repeats the scores."""
    return _attention_flops(q_shape, k_shape) * 5 // 2

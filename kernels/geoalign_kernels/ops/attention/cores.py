"""The exact attention cores behind one interface: forward -> (O, LSE), backward from (O, LSE).

Every core computes in the input dtype with float32 accumulation and gives LSE as the natural logarithm [B, H, Sq], so a
backward may come from another core than the forward: our Triton forward hands O and LSE to the flash backward.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from geoalign_kernels import dispatch
from geoalign_kernels.ops.attention import reference

ENV = "GEOALIGN_ATTENTION"
FLASH2 = (2, 7)
"""The first flash-attn whose inner functions take their arguments in the order used here."""
CORES = ("reference", "sdpa_flash", "sdpa_cudnn", "flash2", "flash3", "flash4", "triton")
REPEATABLE = {"reference", "sdpa_flash", "flash2", "triton"}
"""Cores whose backward can be made to repeat bit for bit; torch's flash operator needs torch's deterministic mode."""
ORDER = {90: ("flash3", "sdpa_cudnn", "flash2", "sdpa_flash")}
"""Cores in the order of their published rates at long sequences, by compute capability."""
aten = torch.ops.aten


def why_not(core: str, device: torch.device, dtype: torch.dtype) -> str:
    """Empty if ``core`` can run here, else the reason."""
    if core == "reference" or (core == "sdpa_flash" and device.type == "cpu"):
        return ""
    if core == "triton" and dispatch.interpreting():
        return ""
    if device.type != "cuda":
        return f"it needs CUDA, not '{device.type}'"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, not {dtype}"
    module = {"flash2": "flash_attn", "flash3": "flash_attn_interface", "flash4": "flash_attn.cute"}.get(core)
    if module and not _importable(module):
        return f"the package '{module}' is not installed"
    if core == "flash2" and _flash2_version() < FLASH2:
        return f"it needs flash-attn >= {_dotted(FLASH2)}, installed is {_dotted(_flash2_version()) or 'none'}"
    if core == "flash3" and torch.cuda.get_device_capability(device) != (9, 0):
        return "FlashAttention 3 is for sm_90"
    if core == "sdpa_cudnn" and not (torch.backends.cudnn.is_available() and _capability(device) >= 80):
        return "it needs cuDNN and compute capability 8.0"
    return ""


def why_not_repeatable(core: str) -> str:
    """Empty if the backward of ``core`` can be made to repeat bit for bit, else the reason."""
    return "" if core in REPEATABLE else f"the backward of '{core}' does not repeat bit for bit (run.deterministic)"


def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def report(device: torch.device) -> dict[str, str]:
    """Row of ``dispatch.report``: the core of exact attention in bfloat16 (float32 on a CPU), which others exist."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    reasons = {core: why_not(core, device, dtype) for core in CORES}
    try:
        chosen = resolve(device, dtype)
    except (dispatch.BackendUnavailableError, ValueError) as error:
        chosen = f"error: {error}"
    return dispatch.row("attention", chosen, reasons)


@functools.lru_cache(maxsize=1)
def _flash2_version() -> tuple[int, ...]:
    """(major, minor) of flash-attn; empty where only another package fills its name space."""
    try:
        return tuple(int(part) for part in metadata.version("flash-attn").split(".")[:2])
    except metadata.PackageNotFoundError:
        return ()


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def resolve(device: torch.device, dtype: torch.dtype, *, deterministic: bool = False) -> str:
    """The core of this run: GEOALIGN_ATTENTION, else what ``use_backend`` names, else the fastest that is there.

    Raises:
        BackendUnavailableError: a core named explicitly cannot run, or not repeat where that is asked for.
    """
    named = os.environ.get(ENV, "")
    if not named:
        chosen = dispatch.wanted("attention")
        named = chosen if chosen in ("reference", "triton") else ""
    if named:
        if named not in CORES:
            raise ValueError(f"{ENV}={named!r}: the attention cores are {', '.join(CORES)}")
        reason = why_not(named, device, dtype) or (why_not_repeatable(named) if deterministic else "")
        if reason:
            raise dispatch.BackendUnavailableError(f"attention core '{named}' was asked for: {reason}")
        return named
    usual = ("flash2", "sdpa_flash")
    order = ORDER.get(_capability(device), usual) if device.type == "cuda" else ("sdpa_flash",)
    fit = (core for core in order if not (deterministic and why_not_repeatable(core)))
    return next((core for core in fit if not why_not(core, device, dtype)), "reference")


def forward(core: str, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(O [B, Sq, H, hd], LSE [B, H, Sq]) by the named core."""
    if core == "reference" or 0 in (*q.shape, *k.shape):
        return reference.forward(q, k, v, scale)
    if core == "triton":
        from geoalign_kernels.ops.attention import triton_impl

        return triton_impl.forward(q, k, v, scale)
    if core == "flash2":
        from flash_attn.flash_attn_interface import _flash_attn_forward

        out, lse, *_ = _flash_attn_forward(q, k, v, 0.0, scale, False, -1, -1, 0.0, None, False)
        return out, lse
    turned = [t.transpose(1, 2) for t in (q, k, v)]
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(*turned, scale=scale)
    elif core == "sdpa_cudnn":
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(*turned, None, True, scale=scale)
    else:
        _activate(core)
        out, lse, *_ = aten._scaled_dot_product_flash_attention(*turned, scale=scale)
    return out.transpose(1, 2), lse.reshape(q.shape[0], q.shape[2], q.shape[1])


def backward(
    core: str, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv); the Triton core uses the flash backward on CUDA and the reference in the interpreter."""
    if core == "reference" or q.numel() == 0 or k.numel() == 0 or (core == "triton" and q.device.type == "cpu"):
        return reference.backward(grad, q, k, v, out, lse, scale)
    if core == "flash2":
        from flash_attn.flash_attn_interface import _flash_attn_backward

        grads = [torch.empty_like(t) for t in (q, k, v)]
        _flash_attn_backward(
            grad.contiguous(), q, k, v, out, lse, *grads, 0.0, scale, False, -1, -1, 0.0, None, True, None
        )  # fmt: skip
        return grads[0], grads[1], grads[2]
    turned: list[Any] = [t.transpose(1, 2) for t in (grad, q, k, v, out)]
    dq, dk, dv = _torch_backward(core, turned, lse, (q.shape[1], k.shape[1]), scale)
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _torch_backward(
    core: str, turned: list[Any], lse: Tensor, lengths: tuple[int, int], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward of torch's own operators, operands [B, H, S, hd].

    Torch takes sequence offsets that are given, even empty ones, for a packed batch, and a bias that is given for a
    bias: what does not exist is None, which these operators accept although their schema does not say so.
    """
    if turned[0].device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(*turned, lse, 0.0, False, scale=scale)
    if core == "sdpa_cudnn":
        seed, offset, bias, offsets = None, None, None, (None, None)
        return aten._scaled_dot_product_cudnn_attention_backward(
            *turned, lse.unsqueeze(-1), seed, offset, bias, *offsets, *lengths, 0.0, False, scale=scale
        )
    _activate(core)
    return aten._scaled_dot_product_flash_attention_backward(
        *turned, lse, None, None, *lengths, 0.0, False, None, None, scale=scale
    )


def _activate(core: str) -> None:
    """Puts FlashAttention 3 or 4 behind torch's flash operator, or takes it away again (process-wide in torch)."""
    from torch.nn import attention as switch

    wanted = {"flash3": "FA3", "flash4": "FA4"}.get(core)
    if switch.current_flash_attention_impl() == wanted:
        return
    if wanted is None:
        switch.restore_flash_attention_impl()
    else:
        switch.activate_flash_attention_impl(wanted)

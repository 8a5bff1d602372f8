"""Where mode int8_fp8 can run: asked by its kernel, and without Triton by whoever chooses a mode."""

from __future__ import annotations

import torch

from geoalign_kernels import dispatch


def why_not_fp8(device: torch.device) -> str:
    """Empty if the Triton kernel of mode int8_fp8 can run on ``device``, else the reason."""
    if device.type != "cuda":
        return "" if dispatch.interpreting() else f"it needs CUDA, not '{device.type}'"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        return f"its fp8 tensor cores are those of compute capability 9.0 (H100, H200), this device has {major}.{minor}"
    return ""


def report_fp8(device: torch.device) -> dict[str, str]:
    """Row of ``dispatch.report`` of mode int8_fp8, which no reference replaces on a GPU that lacks fp8."""
    reasons = {"reference": "", "triton": why_not_fp8(device)}
    wanted = dispatch.wanted("attention_int8_fp8")
    if wanted == "auto":
        wanted = "reference" if device.type == "cpu" else "triton"
    return dispatch.row("attention_int8_fp8", f"error: {reasons[wanted]}" if reasons[wanted] else wanted, reasons)

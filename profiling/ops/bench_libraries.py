"""Adapters of other people's kernels: which function of which package, its version, and what it does to the numbers.

A package that is not installed, or lacks the function, is the reason (a string) in place of a function, and becomes a
"not run" row. Levels: *lossless* computes what the published formulation computes, bit for bit; *rounding* rounds
elsewhere; *changing* works in another number format.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from importlib import metadata
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

Implementation = Callable[..., Any]
Level = Literal["lossless", "rounding", "changing"]


class Origin(NamedTuple):
    """Distribution that an implementation comes from, and its level."""

    package: str
    level: Level


ORIGINS: dict[str, Origin] = {
    "eager": Origin("torch", "lossless"),
    "torch": Origin("torch", "rounding"),
    "compiled": Origin("torch", "rounding"),
    "cublaslt": Origin("torch", "rounding"),
    "ours": Origin("geoalign", "rounding"),
    "triton": Origin("geoalign", "rounding"),
    "reference": Origin("geoalign", "rounding"),
    "int8": Origin("geoalign", "changing"),
    "int8_fp8": Origin("geoalign", "changing"),
    "sdpa_flash": Origin("torch", "rounding"),
    "sdpa_cudnn": Origin("torch", "rounding"),
    "flash2": Origin("flash-attn", "rounding"),
    "flash3": Origin("flash-attn-3", "rounding"),
    "flash4": Origin("flash-attn-4", "rounding"),
    "liger": Origin("liger-kernel", "rounding"),
    "flashinfer": Origin("flashinfer-python", "rounding"),
    "sglang": Origin("sglang", "rounding"),
    "sgl_kernel": Origin("sgl-kernel", "rounding"),
    "sage": Origin("sageattention", "changing"),
    "torchao": Origin("torchao", "changing"),
}


def level_of(impl: str, variant: str) -> str | None:
    """Level of a row; 8-bit variants change numbers whoever computes them."""
    if variant in ("int8", "fp8"):
        return "changing"
    return ORIGINS[impl].level if impl in ORIGINS else None


@functools.cache
def version_of(impl: str) -> str | None:
    """Version of the package behind a row."""
    try:
        return metadata.version(ORIGINS[impl].package)
    except (KeyError, metadata.PackageNotFoundError):
        return None


def _function(package: str, *places: str) -> Implementation | str:
    """The first of `module:name` that can be imported, or why none can."""
    reason = f"{package} is not installed"
    for place in places:
        module, _, name = place.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            if not module.startswith(error.name or "?"):  # it is there and needs something that is not
                reason = f"{package} cannot be imported: {error}"
        except Exception as error:  # a package made for another torch fails as it likes
            reason = f"{package} cannot be imported: {type(error).__name__}: {error}"
    return reason


def liger_norm(eps: float) -> Implementation | str:
    """Liger's LayerNorm with weight 1 + scale and bias shift: the same function for one sample."""
    found = _function("liger-kernel", "liger_kernel.ops.layer_norm:LigerLayerNormFunction")
    if isinstance(found, str):
        return found
    return lambda x, scale, shift: found.apply(x, (1.0 + scale[0]).to(x.dtype), shift[0].to(x.dtype), eps)


def liger_rms_norm(eps: float) -> Implementation | str:
    """Liger's RMSNorm with float32 statistics."""
    found = _function("liger-kernel", "liger_kernel.ops.rms_norm:LigerRMSNormFunction")
    return found if isinstance(found, str) else lambda x, weight: found.apply(x, weight, eps, 0.0, "gemma", False)


def flashinfer_rms_norm(eps: float) -> Implementation | str:
    """FlashInfer's RMSNorm; forward only."""
    return _rows_norm(_function("flashinfer-python", "flashinfer.norm:rmsnorm"), eps)


def sgl_rms_norm(eps: float) -> Implementation | str:
    """SGLang's RMSNorm (sgl-kernel); forward only."""
    return _rows_norm(_function("sgl-kernel", "sgl_kernel:rmsnorm"), eps)


def _rows_norm(found: Implementation | str, eps: float) -> Implementation | str:
    """A norm of [rows, width] on [..., width]."""
    if isinstance(found, str):
        return found
    return lambda x, weight: found(x.flatten(0, -2), weight, eps).view_as(x)


def sglang_norm(eps: float) -> Implementation | str:
    """SGLang's modulation of its diffusion models behind torch's LayerNorm; forward only."""
    place = "{}:fuse_scale_shift_kernel".format
    found = _function(
        "sglang", place("sglang.jit_kernel.diffusion.triton.scale_shift"),
        place("sglang.multimodal_gen.runtime.layers.triton_ops"),
    )  # fmt: skip
    if isinstance(found, str):
        return found

    def norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        unit = functional.layer_norm(x, x.shape[-1:], eps=eps)
        return found(unit, scale.to(x.dtype), shift.to(x.dtype))

    return norm


def flashinfer_attention() -> Implementation | str:
    """FlashInfer's prefill of one request on [1, S, H, hd]; forward only."""
    found = _function("flashinfer-python", "flashinfer:single_prefill_with_kv_cache")
    return found if isinstance(found, str) else lambda q, k, v: found(q[0], k[0], v[0], causal=False)[None]


def sage_attention() -> Implementation | str:
    """SageAttention: its Triton kernel in version 1, what it chooses for the card later; forward only."""
    found = _function("sageattention", "sageattention:sageattn")
    if isinstance(found, str):
        return found
    return lambda q, k, v: found(q, k, v, tensor_layout="NHD", is_causal=False)


ATTENTION: dict[str, Callable[[], Implementation | str]] = {
    "sage": sage_attention,
    "flashinfer": flashinfer_attention,
}


def import_all() -> None:
    """Imports every package that is there: not inside a mode that a module would keep what it makes from."""
    for make in (liger_norm, liger_rms_norm, flashinfer_rms_norm, sgl_rms_norm, sglang_norm):
        make(1e-6)
    for attention in ATTENTION.values():
        attention()


def attention_absent(name: str, device: torch.device) -> str:
    """Why a rival's attention does not run here; empty if it does."""
    found = ATTENTION[name]()
    if isinstance(found, str):
        return found
    return "" if device.type == "cuda" else f"it needs CUDA, not '{device.type}'"

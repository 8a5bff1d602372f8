"""Residual connection with a gate per sample and channel."""

from geoalign_kernels.ops.gated_residual.op import gated_residual

__all__ = ["gated_residual"]

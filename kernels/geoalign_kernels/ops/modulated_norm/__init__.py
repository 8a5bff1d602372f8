"""LayerNorm without affine parameters, then scale and shift per sample."""

from geoalign_kernels.ops.modulated_norm.op import modulated_norm

__all__ = ["modulated_norm"]

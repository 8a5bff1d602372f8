"""RMSNorm over all channels with a weight, in one pass."""

from geoalign_kernels.ops.rms_norm.op import rms_norm

__all__ = ["rms_norm"]

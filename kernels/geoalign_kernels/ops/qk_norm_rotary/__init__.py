"""RMSNorm over all heads of q and k + 3-D rotary embedding + camera phases on q, k and v."""

from geoalign_kernels.ops.qk_norm_rotary.op import qk_norm_rotary

__all__ = ["qk_norm_rotary"]

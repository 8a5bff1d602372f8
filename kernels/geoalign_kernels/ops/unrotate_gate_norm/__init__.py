"""Attention epilogue: camera rotation of the projected output, gate, residual and the next norm in one pass."""

from geoalign_kernels.ops.unrotate_gate_norm.op import unrotate_gate_norm

__all__ = ["unrotate_gate_norm"]

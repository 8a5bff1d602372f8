"""Non-causal attention: exact (output and log-sum-exp, several cores) and int8 QK for steps that take no gradient."""

from geoalign_kernels.ops.attention.op import (
    AttentionOutput,
    attention,
    exact_only,
    inside_exact_only,
    resolve_attention,
)

__all__ = ["AttentionOutput", "attention", "exact_only", "inside_exact_only", "resolve_attention"]

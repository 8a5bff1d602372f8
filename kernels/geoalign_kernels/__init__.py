"""Fused kernels of a camera-controlled video diffusion transformer and its reinforcement-learning sampler.

Every op has a plain torch reference (CPU and CUDA, any float dtype, differentiable) and a Triton implementation for
CUDA; ``use_backend``, the environment variable GEOALIGN_KERNELS and ``report`` choose and show which one runs.
The package imports torch only (Triton at the first kernel launch) and nothing of ``geoalign``.
"""

from geoalign_kernels.dispatch import BackendUnavailableError, report, set_backend, use_backend
from geoalign_kernels.dropin import Handle, UnknownNetwork, accelerate
from geoalign_kernels.ops.attention import (
    AttentionOutput,
    attention,
    exact_only,
    inside_exact_only,
    resolve_attention,
)
from geoalign_kernels.ops.attention.probe import ProbedInt8Attention
from geoalign_kernels.ops.flow_step import FlowStep, flow_log_prob, flow_step
from geoalign_kernels.ops.frame_preprocess import CropTarget, FrameInputs, FramePlan, frame_plan, frame_preprocess
from geoalign_kernels.ops.gated_residual import gated_residual
from geoalign_kernels.ops.modulated_norm import modulated_norm
from geoalign_kernels.ops.qk_norm_rotary import qk_norm_rotary
from geoalign_kernels.ops.rms_norm import rms_norm
from geoalign_kernels.ops.unrotate_gate_norm import unrotate_gate_norm
from geoalign_kernels.philox import NoiseKey, philox_normal, philox_uniform

__all__ = [
    "AttentionOutput",
    "BackendUnavailableError",
    "CropTarget",
    "FlowStep",
    "FrameInputs",
    "FramePlan",
    "Handle",
    "NoiseKey",
    "ProbedInt8Attention",
    "UnknownNetwork",
    "accelerate",
    "attention",
    "exact_only",
    "flow_log_prob",
    "flow_step",
    "frame_plan",
    "frame_preprocess",
    "gated_residual",
    "inside_exact_only",
    "modulated_norm",
    "philox_normal",
    "philox_uniform",
    "qk_norm_rotary",
    "report",
    "resolve_attention",
    "rms_norm",
    "set_backend",
    "unrotate_gate_norm",
    "use_backend",
]

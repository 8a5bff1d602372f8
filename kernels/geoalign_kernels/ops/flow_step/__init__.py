"""CFG combine + affine ODE/SDE step + counter-based noise, and the log-density of a stored step."""

from geoalign_kernels.ops.flow_step.op import FlowStep, flow_log_prob, flow_step

__all__ = ["FlowStep", "flow_log_prob", "flow_step"]

"""One decoded clip to the resized, 8-bit-rounded, normalised, patch-ordered inputs of three reward models."""

from geoalign_kernels.ops.frame_preprocess.op import FrameInputs, frame_preprocess
from geoalign_kernels.ops.frame_preprocess.plan import CropTarget, FramePlan, frame_plan

__all__ = ["CropTarget", "FrameInputs", "FramePlan", "frame_plan", "frame_preprocess"]

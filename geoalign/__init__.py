"""geoalign: reinforcement learning of camera-controlled video with rewards in metres and degrees.

The names in ``__all__`` are the public face (docs/api.md); every other module is internal and may change. Importing
``geoalign`` imports none of them, nor torch: each name is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from geoalign.version import __version__

if TYPE_CHECKING:
    from geoalign.api import Retake, RetakePolicy, load_trajectory, score, train
    from geoalign.config.flow import FlowConfig
    from geoalign.errors import UserError
    from geoalign.flow.policy import Velocity
    from geoalign.flow.sampler import FlowSampler, initial_noise
    from geoalign.flow.table import build_step_table
    from geoalign.geometry.trajectory import CameraTrajectory
    from geoalign.rewards.base import RewardOutput
    from geoalign.rewards.registry import build_evaluator, build_reward

__all__ = [
    "CameraTrajectory",
    "FlowConfig",
    "FlowSampler",
    "Retake",
    "RetakePolicy",
    "RewardOutput",
    "UserError",
    "Velocity",
    "__version__",
    "build_evaluator",
    "build_reward",
    "build_step_table",
    "initial_noise",
    "load_trajectory",
    "score",
    "train",
]

_HOMES = {
    "CameraTrajectory": "geoalign.geometry.trajectory",
    "FlowConfig": "geoalign.config.flow",
    "FlowSampler": "geoalign.flow.sampler",
    "Retake": "geoalign.api",
    "RetakePolicy": "geoalign.api",
    "RewardOutput": "geoalign.rewards.base",
    "UserError": "geoalign.errors",
    "Velocity": "geoalign.flow.policy",
    "build_evaluator": "geoalign.rewards.registry",
    "build_reward": "geoalign.rewards.registry",
    "build_step_table": "geoalign.flow.table",
    "initial_noise": "geoalign.flow.sampler",
    "load_trajectory": "geoalign.api",
    "score": "geoalign.api",
    "train": "geoalign.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'geoalign' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value  # the next use finds it without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

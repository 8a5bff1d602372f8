"""The sampler and the kernels for pipelines of other projects; docs/drop-in.md is the way in.

``group_rollout`` is the sampler over plain tensors; the other modules are one file per project, with that project's own
signatures. None of them imports the project it serves.
"""

from geoalign.integrations.group_rollout import GroupRollout, GroupSamples, NetworkInputs

__all__ = ["GroupRollout", "GroupSamples", "NetworkInputs"]

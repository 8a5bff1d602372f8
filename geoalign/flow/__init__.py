"""Rectified-flow sampling: one float64 step table, group rollouts with a shared prefix, replay, deterministic sampling.

The policy is only a callable here; nothing in this package knows a network.
"""

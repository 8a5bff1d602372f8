"""Errors that a user can cause and fix: one clear message each, no traceback, a documented exit code."""

from __future__ import annotations


class UserError(Exception):
    """Base of all errors whose message names the offending path or value and the fix."""

    exit_code = 1


class Stopped(UserError):
    """A signal stopped a run after it wrote its checkpoint: no error, and not finished (exit code 75, EX_TEMPFAIL)."""

    exit_code = 75


class UsageError(UserError):
    """Wrong arguments or an impossible request (exit code 2)."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration that cannot be used (exit code 2)."""


class DataError(UserError):
    """A clip, trajectory, cache or manifest that cannot be read or is inconsistent."""


class CheckpointError(UserError):
    """A checkpoint that is missing, truncated, of the wrong layout or for another model."""


class RewardError(UserError):
    """A reward that cannot be built (missing package, missing weights) or failed too often."""


class RunError(UserError):
    """A run that had to stop (too many invalid samples, parity broken, disk full)."""


class MissingInputsError(UserError):
    """What a run reads is missing or another thing; a line for each, so that all can be fetched at once."""

"""Which implementation of an op runs: one registry, one rule, no import side effects.

``auto`` takes the best implementation of the tensor's device (CUDA: cuda, triton, reference; CPU: cpp, reference). A
backend named for all ops holds for those that have it; the others stay as they were. Naming it for an op that does not
have it is refused at once. One that an op has and that cannot run here raises ``BackendUnavailableError``; it is never
replaced silently. The choice is read on every call, inside the registered op, so it also holds for compiled graphs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from geoalign_kernels import capture

ENV = "GEOALIGN_KERNELS"
BACKENDS = ("auto", "reference", "triton", "cuda", "cpp")
logger = logging.getLogger("geoalign_kernels")

_implementations: dict[str, dict[str, str]] = {}
_reporters: dict[str, str] = {}
_choice: dict[str, str] = {}  # op name -> backend


class BackendUnavailableError(RuntimeError):
    """An explicitly requested backend cannot run on this device."""


class UnsupportedInput(ValueError):
    """A kernel cannot take these shapes or dtypes; under ``auto`` the reference runs instead."""


def register(op: str, *, reporter: str = "", **targets: str) -> None:
    """Declares the implementations of ``op`` as ``backend="module:function"``; a module is imported when first used.

    ``reporter`` names a function likewise that makes the op's row of ``report`` from a device, where the backend alone
    does not say what runs.
    """
    _implementations[op] = targets
    if reporter:
        _reporters[op] = reporter


def backend_for(op: str, device: torch.device) -> str:
    """Name of the backend that runs ``op`` on ``device`` under the present choice.

    Raises:
        BackendUnavailableError: the chosen backend cannot run on ``device``.
    """
    choice = wanted(op)
    if choice != "auto":
        reason = _why_not(choice, device)
        if reason:
            raise BackendUnavailableError(f"kernel backend '{choice}' asked for op '{op}': {reason}")
        return choice
    candidates = {"cuda": ("cuda", "triton"), "cpu": ("cpp",)}.get(device.type, ())
    reasons = {name: _why_not(name, device) for name in candidates if name in _implementations[op]}
    for candidate, reason in reasons.items():
        if not reason:
            return candidate
    if reasons:
        _warn_fallback(op, "; ".join(reasons.values()))
    return "reference"


def set_backend(backend: str, *ops: str) -> None:
    """Chooses ``backend`` for the named ops until changed again.

    If no op is named, it holds for all that have such a backend, and choices made before it end.

    Raises:
        ValueError: unknown backend or op, or a named op does not have the backend.
    """
    chosen = _meant(backend, ops)
    if not ops:
        _choice.clear()
    _choice.update(chosen)


@contextlib.contextmanager
def use_backend(backend: str, *ops: str) -> Iterator[None]:
    """``set_backend`` for the length of a ``with`` block; process-wide, not per thread."""
    before = dict(_choice)
    set_backend(backend, *ops)
    try:
        yield
    finally:
        _choice.clear()
        _choice.update(before)


def report(device: torch.device | str | None = None) -> list[dict[str, str]]:
    """One row per op: ``op``, its ``backend`` on ``device`` now, what is ``available``, what is ``missing`` and why."""
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    rows = []
    for op, targets in sorted(_implementations.items()):
        if op in _reporters:
            rows.append(_load(_reporters[op])(where))
            continue
        try:
            chosen = backend_for(op, where)
        except BackendUnavailableError as error:
            chosen = f"error: {error}"
        rows.append(row(op, chosen, {name: _why_not(name, where) for name in targets}))
    return rows


def row(op: str, chosen: str, reasons: dict[str, str]) -> dict[str, str]:
    """A row of ``report``; ``reasons`` is empty for what is available and says why for what is not."""
    alike: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        alike.setdefault(reason, []).append(name)
    return {
        "op": op,
        "backend": chosen,
        "available": ", ".join(alike.get("", [])),
        "missing": "; ".join(f"{', '.join(names)}: {reason}" for reason, names in alike.items() if reason),
    }


def interpreting() -> bool:
    """Whether Triton kernels run in its CPU interpreter (the flag counts when the kernels are imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def wanted(op: str) -> str:
    """The backend asked for: ``use_backend``, else the environment, else ``auto``."""
    return _choice.get(op) or _from_environment(os.environ.get(ENV, "")).get(op, "auto")


@functools.lru_cache(maxsize=8)
def _from_environment(text: str) -> dict[str, str]:
    """``triton``, or ``attention=reference,flow_step=triton``, or both: ``triton,attention=reference``.

    The later of two items that mean the same op counts.
    """
    choice: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        op, _, backend = item.rpartition("=")
        try:
            choice.update(_meant(backend, (op,) if op else ()))
        except ValueError as error:
            raise ValueError(f"{ENV}={text!r}: {error}") from error
    return choice


def _meant(backend: str, ops: tuple[str, ...]) -> dict[str, str]:
    """``{op: backend}`` of the named ops, of all that have the backend if none is named.

    Raises:
        ValueError: as ``set_backend``.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown kernel backend '{backend}'; choose one of {', '.join(BACKENDS)}")
    for op in ops:
        if op not in _implementations:
            raise ValueError(f"unknown op '{op}'; the ops are {', '.join(sorted(_implementations))}")
        if not _has(op, backend):
            raise ValueError(f"op '{op}' has no backend '{backend}', only {', '.join(_implementations[op])}")
    return dict.fromkeys(ops or (op for op in _implementations if _has(op, backend)), backend)


def _has(op: str, backend: str) -> bool:
    return backend == "auto" or backend in _implementations[op]


def _why_not(backend: str, device: torch.device) -> str:
    """Empty if ``backend`` can run on ``device``, else the reason."""
    if backend == "reference":
        return ""
    if backend == "cpp" and device.type != "cpu":
        return f"it needs a CPU tensor, got one on '{device.type}'"
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if backend != "cpp" and device.type != "cuda" and not (backend == "triton" and interpreting()):
        return f"it needs a CUDA tensor, got one on '{device.type}'"
    if backend in ("cpp", "cuda"):
        from geoalign_kernels import native  # not above: ``-m geoalign_kernels.native`` imports this package first

        return native.obstacle(device.type)
    return ""


@functools.lru_cache(maxsize=64)
def _load(target: str) -> Callable[..., Any]:
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)


def run(op: str, device: torch.device, args: tuple[Any, ...]) -> Any:
    """Calls the implementation of ``op``; what ``auto`` picked may decline its input in favour of the reference.

    Raises:
        BackendUnavailableError: as ``backend_for``.
        UnsupportedInput: a backend chosen by name cannot take these inputs.
    """
    capture.record(op, args)
    backend = backend_for(op, device)
    try:
        return _load(_implementations[op][backend])(*args)
    except UnsupportedInput as error:
        if wanted(op) != "auto":
            raise
        _warn_fallback(op, str(error))
        return _load(_implementations[op]["reference"])(*args)


@functools.lru_cache(maxsize=64)
def _warn_fallback(op: str, reason: str) -> None:
    logger.warning("op '%s' runs its plain torch reference: %s", op, reason)

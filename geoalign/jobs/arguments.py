"""What numbers, sizes and names verbs and Python functions take alike: a rule each, told in the caller's words.

Imports no torch, so that a parser may ask. Every rule raises UsageError for what it does not take.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from geoalign.errors import UsageError, argument

LEAST_SIDE = 16
"""Pixels: no video model and no pose evaluator sees anything in a smaller frame."""
_BEYOND = 10**18
_MOST_SHOWN = 100


def whole(name: str, value: Any, least: int) -> int:
    """A whole number of at least ``least``."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or not least <= number < _BEYOND:
        raise _refusal(name, value, f"a whole number of at least {least}")
    return number


def positive(name: str, value: Any) -> float:
    """A finite number above 0."""
    if not _is_real(value) or not 0 < value < math.inf:
        raise _refusal(name, value, "a finite number above 0")
    return float(value)


def four_numbers(name: str, value: Any) -> tuple[float, float, float, float]:
    """Four finite numbers."""
    if _is_row(value) and len(value) == 4 and all(_is_real(one) and math.isfinite(one) for one in value):
        first, second, third, fourth = map(float, value)
        return first, second, third, fourth
    raise _refusal(name, value, "four numbers, finite and separated by commas")


def frame_size(name: str, value: Any) -> tuple[int, int]:
    """(height, width) in pixels."""
    if not (_is_row(value) and len(value) == 2 and all(type(one) is int for one in value)):
        example = argument(
            name, "HEIGHTxWIDTH, for instance 480x832", f"{name}=(HEIGHT, WIDTH), for instance (480, 832)"
        )
        raise _refusal(name, value, example)
    if min(value) < LEAST_SIDE:
        sides = argument(name, "x".join(map(str, value)), f"{name}={tuple(value)}")
        raise UsageError(f"{sides}: each side must have at least {LEAST_SIDE} pixels")
    return value[0], value[1]


def path_of(name: str, value: Any) -> Path:
    """The path of a file or folder."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise _refusal(name, value, "the name of a file or folder")
    return Path(text)


def text_of(name: str, value: Any) -> str:
    """A text, which may be empty."""
    if not isinstance(value, str):
        raise _refusal(name, value, "a text")
    return value


def shown(value: Any) -> str:
    """A value as Python writes it, in one line."""
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN and text.isprintable() else f"a {type(value).__name__}"


def _refusal(name: str, value: Any, expected: str) -> UsageError:
    typed = ",".join(f"{one:g}" if _is_real(one) else str(one) for one in value) if _is_row(value) else str(value)
    return UsageError(f"{argument(name, typed, f'{name}={shown(value)}')}: expected {expected}")


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_row(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)

"""The boundary to files that others wrote: regular, of bounded size, and parsers' exceptions become the project's.

A damaged or hostile file ends in one error that names file and place, never in a traceback, a hang or a full memory.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from geoalign.errors import DataError, UserError

MAX_TEXT = 32 << 20
"""Bytes of a JSON file; its parsed form may take thirty times as much."""
MAX_YAML = 256 << 10
"""Bytes of a YAML file: PyYAML reads about 100 kB a second."""
_MAX_NODES = 100_000  # of YAML, each alias counted with all that it stands for

_HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # may be half a character

Failure = Callable[[str], UserError]


def first_line(problem: BaseException) -> str:
    """The first line of an exception's text, or its type where it has none."""
    return next(iter(str(problem).splitlines()), "") or type(problem).__name__


def check_regular(path: Path, *, limit: int | None = None, failure: Failure = DataError) -> int:
    """The size of ``path`` in bytes; a pipe, a device, a folder and a file above ``limit`` bytes are refused.

    Raises:
        failure: as said, or the file is missing.
    """
    try:
        state = path.stat()
    except (OSError, ValueError) as problem:  # ValueError: a zero byte in the name
        raise failure(f"{path}: cannot be read ({getattr(problem, 'strerror', None) or problem})") from problem
    if not stat.S_ISREG(state.st_mode):
        raise failure(f"{path}: not a regular file; give one, not a folder, pipe or device")
    if limit is not None and state.st_size > limit:
        raise failure(f"{path}: {state.st_size:,} bytes, at most {limit:,} are read here; not a file of this kind")
    return state.st_size


def read_bytes(path: str | os.PathLike[str], *, limit: int = MAX_TEXT, failure: Failure = DataError) -> bytes:
    """The bytes of a regular file of at most ``limit`` bytes.

    Raises:
        failure: missing, not a regular file, larger, or unreadable.
    """
    file = Path(path)
    check_regular(file, limit=limit, failure=failure)
    try:
        with file.open("rb") as stream:
            return stream.read(limit + 1)
    except OSError as problem:
        raise failure(f"{file}: cannot be read ({problem.strerror or problem})") from problem


def read_text(path: str | os.PathLike[str], *, limit: int = MAX_TEXT, failure: Failure = DataError) -> str:
    """The UTF-8 text of a file, without a byte-order mark; raises as :func:`read_bytes`, and for other encodings."""
    try:
        return read_bytes(path, limit=limit, failure=failure).decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise failure(f"{path}: not UTF-8 (byte {problem.start}); save it as UTF-8") from problem


def parse_json(
    text: str | bytes,
    where: object,
    failure: Failure = DataError,
    *,
    pairs: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> Any:
    """The value of a JSON text; ``pairs`` makes an object of its keys and values, and raises ValueError to refuse it.

    Raises:
        failure: not JSON, nested too deeply, or half a character in a string; ``where`` is named first.
    """
    try:
        value = json.loads(text, object_pairs_hook=pairs)
        if _HALF.search(text if isinstance(text, bytes) else text.encode()):
            json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate could be neither printed nor written
    except RecursionError:
        raise failure(f"{where}: not valid JSON (nested too deeply)") from None
    except ValueError as problem:
        raise failure(f"{where}: not valid JSON ({first_line(problem)})") from problem
    return value


def read_json(path: str | os.PathLike[str], failure: Failure = DataError) -> Any:
    """The value of a JSON file; raises as :func:`read_text` and :func:`parse_json`."""
    return parse_json(read_text(path, failure=failure), path, failure)


def read_json_object(path: str | os.PathLike[str], failure: Failure = DataError) -> dict[str, Any]:
    """The object in a JSON file; raises as :func:`read_json`, and where it holds anything else."""
    value = read_json(path, failure)
    if not isinstance(value, dict):
        raise failure(f"{path}: must hold a JSON object, not {type(value).__name__}; restore or delete the file")
    return value


def parse_yaml(
    text: str, where: object, failure: Failure = DataError, loader_class: type[yaml.SafeLoader] = yaml.SafeLoader
) -> tuple[yaml.Node | None, Any]:
    """The syntax tree and the value of one YAML document; (None, None) of an empty one.

    Raises:
        failure: not YAML, a tag that does not fit, nested too deeply, or aliases that multiply without bound.
    """
    try:
        loader = loader_class(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None, None
            _count_nodes(node, {})
            return node, loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as problem:
        line = f":{problem.problem_mark.line + 1}" if problem.problem_mark else ""
        raise failure(f"{where}{line}: not valid YAML: {problem.problem or problem.context}") from None
    except RecursionError:
        raise failure(f"{where}: not valid YAML: nested too deeply") from None
    except Exception as problem:  # `!!int x`, `!!timestamp x`, control bytes: ValueError, AttributeError, KeyError, ...
        raise failure(f"{where}: not valid YAML: {first_line(problem)}") from None


def read_yaml(path: str | os.PathLike[str], failure: Failure = DataError) -> Any:
    """The value of a YAML file; raises as :func:`read_text` and :func:`parse_yaml`."""
    return parse_yaml(read_text(path, limit=MAX_YAML, failure=failure), path, failure)[1]


def _count_nodes(node: yaml.Node, counts: dict[int, int]) -> int:
    """Nodes below ``node`` as if every alias were written out; ``counts`` remembers them by identity, 0 while open."""
    known = counts.get(id(node))
    if known == 0:
        raise yaml.YAMLError("an alias stands for what it lies in")
    if known is None:
        counts[id(node)] = 0
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        flat = (part for child in children for part in (child if isinstance(child, tuple) else (child,)))
        known = counts[id(node)] = 1 + sum(_count_nodes(child, counts) for child in flat)
    if known > _MAX_NODES:
        raise yaml.YAMLError(f"its aliases stand for more than {_MAX_NODES:,} values")
    return known

"""YAML that others wrote, within the bounds of :mod:`geoalign.files.parsing`, which is imported without PyYAML.

One dialect for all files, those of runs included: a reader of another takes ``off`` for false and ``1e-4`` for text.
"""

from __future__ import annotations

import os
import re
from typing import Any

import yaml

from geoalign.errors import DataError
from geoalign.files.parsing import Failure, first_line, read_text

MAX_YAML = 256 << 10
"""Bytes of a YAML file: PyYAML reads about 100 kB a second."""
_MAX_NODES = 100_000  # of YAML, each alias counted with all that it stands for


class Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: ``1e-4`` is a number, ``off`` and ``no`` are words, ``1:30`` is text."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  (PyYAML's own name)


Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|)$"), ["~", "n", ""])
Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), list("tf"))
Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9][0-9_]*$"), list("-+0123456789"))
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^(?:[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan)$"),
    list("-+0123456789."),
)


def _construct_float(loader: Loader, node: yaml.ScalarNode) -> float:
    text = loader.construct_scalar(node).replace("_", "")
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


def _construct_int(loader: Loader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node).replace("_", ""), 10)  # 010 is ten, not eight


Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)
Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def parse_yaml(text: str, where: object, failure: Failure = DataError) -> tuple[yaml.Node | None, Any]:
    """The syntax tree and the value of one YAML document; (None, None) of an empty one.

    Raises:
        failure: not YAML, a tag that does not fit, nested too deeply, or aliases that multiply without bound.
    """
    try:
        loader = Loader(text)
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

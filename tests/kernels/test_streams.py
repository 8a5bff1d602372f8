"""The purposes of counter-based noise keep their numbers, and no other module names one."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from geoalign_kernels import streams

ROOT = Path(__file__).parents[2]
# A number that changes gives every seed other noise, data or evaluation; a purpose that joins gets a line here.
FROZEN = {"SDE": 0, "INITIAL_NOISE": 1, "CLIP": 2, "PATH": 3, "EVALUATION": 4, "WINDOW": 5, "SHUFFLE": 6, "SUBSET": 7}
# Where the stream stands among the positional arguments.
POSITION = {"philox_uniform": 6, "NoiseKey": 5, "initial_noise": None, "retake": None}


def test_numbers_are_frozen_and_distinct() -> None:
    assert {name: value for name, value in vars(streams).items() if name.isupper()} == FROZEN
    assert len(set(FROZEN.values())) == len(FROZEN)


def nodes() -> Iterator[tuple[str, ast.AST]]:
    for folder in ("geoalign", "kernels/geoalign_kernels", "profiling"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            name = str(file.relative_to(ROOT))
            for node in ast.walk(ast.parse(file.read_text())):
                yield f"{name}:{getattr(node, 'lineno', 0)}", node


def stream_of(node: ast.AST) -> ast.expr | None:
    """What a call that draws or names noise passes as its stream, if anything."""
    if not isinstance(node, ast.Call) or (name := ast.unparse(node.func).rpartition(".")[2]) not in POSITION:
        return None
    named = [word.value for word in node.keywords if word.arg == "stream"]
    position = POSITION[name]
    return named[0] if named else node.args[position] if position and len(node.args) > position else None


def test_a_stream_is_named_in_one_module_and_passed_by_its_name() -> None:
    shadows, unnamed, used = [], [], set()
    for place, node in nodes():
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            shadows += [place for t in targets if "STREAM" in ast.unparse(t) and isinstance(node.value.value, int)]
        stream = stream_of(node)
        if isinstance(stream, ast.Attribute) and ast.unparse(stream.value) == "streams":
            used.add(stream.attr)
        elif isinstance(stream, ast.Constant | ast.Name | ast.Attribute) and ast.unparse(stream) != "stream":
            unnamed.append(f"{place}: {ast.unparse(stream)}")  # neither of `streams` nor an argument handed through
    assert not shadows and not unnamed
    # INITIAL_NOISE is the default of `initial_noise`; the rest shows that the scan sees the calls.
    assert used == set(FROZEN) - {"INITIAL_NOISE"}

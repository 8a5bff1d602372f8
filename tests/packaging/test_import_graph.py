"""No two files of the package import each other, and no import hides from that check as a string."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from repository import ROOT

PACKAGE = ROOT / "geoalign"
BY_NAME = {
    "geoalign/__init__.py": "the public face, each name at its first use",
    "geoalign/cli/main.py": "the table of verbs",
    "geoalign/rewards/registry.py": "the tables of rewards and pose evaluators",
    "geoalign/rewards/running/worker.py": "what the registry tells another process to build",
}
"""Files that may import our own modules by a name that is data."""
IMPORTERS = ("import_module", "__import__")


def modules() -> dict[str, Path]:
    """Module name -> file."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import that may run: at module level or in a function, but not for a type checker alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for other in node.orelse:
                yield from imports(other)
        else:
            yield from imports(node)


def import_graph(known: dict[str, Path]) -> dict[str, set[str]]:
    """Module -> modules of the package that it imports."""
    graph: dict[str, set[str]] = {}
    for name, path in known.items():
        wanted: set[str] = set()
        for node in imports(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                wanted |= {alias.name for alias in node.names}
                continue
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                wanted.add(inner if inner in known else str(node.module))
        graph[name] = {module for module in wanted if module in known and module != name}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        open_ = [start]
        while open_:
            for target in graph[open_.pop()] - seen:
                seen.add(target)
                open_.append(target)
        reach[start] = seen
    groups = {tuple(sorted({a} | {b for b in reach[a] if a in reach[b]})) for a in graph if a in reach[a]}
    return sorted(map(list, groups))


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}) == [["a", "b", "c"]]
    source = "import a\nif TYPE_CHECKING:\n    import b\ndef f():\n    from c import d\n"
    assert [ast.unparse(node) for node in imports(ast.parse(source))] == ["import a", "from c import d"]


def test_no_file_imports_itself_through_others() -> None:
    graph = import_graph(modules())
    assert len(graph) > 150 and "geoalign.training.learner" in graph["geoalign.training.trainer"]
    assert circles(graph) == []


def test_no_import_of_ours_is_hidden_as_a_string() -> None:
    """``import_module`` of a literal may name foreign packages only; with a computed name it stands in ``BY_NAME``."""
    found = set()
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call) or ast.unparse(node.func).split(".")[-1] not in IMPORTERS:
                continue
            name = node.args[0]
            if isinstance(name, ast.Constant) and not str(name.value).startswith("geoalign"):
                continue
            found.add(path.relative_to(ROOT).as_posix())
    assert found == set(BY_NAME)

"""The tests whose outcome could depend on the speed of a machine: those that start processes, wait or time out.

`pytest $(python tests/support/timed.py)` runs them; beside fifteen busy processes it shows that their limits are wide.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

SUPPORT = Path(__file__).parent
TESTS = SUPPORT.parent
SIGNS = re.compile(
    r"\b(subprocess|Popen|launch|WorkerReward|Thread|Barrier|PATIENCE_S|timeout_s|timeout|monotonic|sleep|placement)\b"
)


def timed_parts(path: Path) -> Iterator[str]:
    """Functions and classes of a file that show a sign, in their own text or in that of what they use of the file, or
    of what the file imports from tests/support."""
    tree = ast.parse(path.read_text("utf-8"))
    parts = {
        node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)
    }
    words = {name: set(re.findall(r"\w+", ast.unparse(node))) for name, node in parts.items()}
    borrowed = _borrowed(tree)
    for name in parts:
        used, waiting = {name}, [name]
        while waiting:
            more = words[waiting.pop()] & parts.keys() - used
            used |= more
            waiting += more
        if any(SIGNS.search(ast.unparse(parts[part])) or words[part] & borrowed for part in used):
            yield name


def _borrowed(tree: ast.Module) -> set[str]:
    """Names that a file imports from a module of tests/support and that show a sign there."""
    names = set()
    for node in tree.body:
        module = SUPPORT / f"{node.module}.py" if isinstance(node, ast.ImportFrom) else None
        if module and module.is_file():
            names |= {alias.name for alias in node.names} & set(timed_parts(module))
    return names


def timed() -> list[str]:
    """Node ids below the repository, in order; parametrised tests once."""
    files = sorted(path for path in TESTS.rglob("test_*.py") if "interpreted" not in path.parts)
    found = [(path, name) for path in files for name in timed_parts(path) if name.startswith("test_")]
    return [f"{path.relative_to(TESTS.parent)}::{name}" for path, name in found]


if __name__ == "__main__":
    print("\n".join(timed()))

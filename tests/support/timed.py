"""The tests whose outcome could depend on the speed of a machine: those that start processes, wait or time out.

`pytest $(python tests/support/timed.py)` runs them; beside fifteen busy processes it shows that their limits are wide.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parents[1]
SIGNS = re.compile(
    r"\b(subprocess|Popen|launch|WorkerReward|Thread|Barrier|PATIENCE_S|timeout_s|timeout|monotonic|sleep|placement)\b"
)


def timed_tests(path: Path) -> Iterator[str]:
    """Names of the tests of a file that show a sign, in their own text or in that of what they use of the file."""
    tree = ast.parse(path.read_text("utf-8"))
    parts = {
        node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)
    }
    words = {name: set(re.findall(r"\w+", ast.unparse(node))) for name, node in parts.items()}
    for name in parts:
        if not name.startswith("test_"):
            continue
        used, waiting = {name}, [name]
        while waiting:
            more = words[waiting.pop()] & parts.keys() - used
            used |= more
            waiting += more
        if any(SIGNS.search(ast.unparse(parts[part])) for part in used):
            yield name


def timed() -> list[str]:
    """Node ids below the repository, in order; parametrised tests once."""
    files = sorted(path for path in TESTS.rglob("test_*.py") if "interpreted" not in path.parts)
    return [f"{path.relative_to(TESTS.parent)}::{name}" for path in files for name in timed_tests(path)]


if __name__ == "__main__":
    print("\n".join(timed()))

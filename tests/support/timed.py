"""The tests whose outcome could depend on the speed of a machine: those that start processes, wait or time out.

`pytest $(python tests/support/timed.py)` runs them; beside fifteen busy processes it shows that their limits are wide.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SUPPORT = Path(__file__).parent
TESTS = SUPPORT.parent
SIGNS = re.compile(
    r"\b(subprocess|Popen|launch|playwright|multiprocessing|num_workers|foreign_tools|WorkerReward|placement|Thread|"
    r"Timer|ThreadPoolExecutor|Barrier|PATIENCE_S|rank_timeout_s|timeout_s|timeout|set_default_timeout|monotonic|sleep)\b"
)
TEST = re.compile("test_|Test")
Part = tuple[Path, str]
"""A function or class: its file and its name there."""


@dataclass(frozen=True, slots=True)
class File:
    """What a file of tests or helpers holds: its functions and classes with the words of each, and what it imports.

    ``shows`` are the names whose own text has a sign; ``named`` leads from a name to a helper's, ``whole`` are helper
    modules imported as such; ``everywhere`` are words that hold for every test: `pytestmark` and autouse fixtures.
    """

    words: dict[str, set[str]]
    shows: set[str]
    named: dict[str, Part]
    whole: dict[str, Path]
    everywhere: set[str]


@functools.cache
def read(path: Path) -> File:
    tree = ast.parse(path.read_text("utf-8"))
    file = File({}, set(), {}, {}, set())
    for node in tree.body:
        text = ast.unparse(node)
        words = set(re.findall(r"\w+", text))
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            file.words[node.name] = words
            if SIGNS.search(text):
                file.shows.add(node.name)
            if any("autouse" in ast.unparse(decorator) for decorator in node.decorator_list):
                file.everywhere.add(node.name)
        elif isinstance(node, ast.Assign) and "pytestmark" in words:
            file.everywhere.update(words)
    for node in ast.walk(tree):  # also inside functions
        if isinstance(node, ast.ImportFrom) and node.module and (helper := _helper(path, node.module)):
            file.named.update({alias.asname or alias.name: (helper, alias.name) for alias in node.names})
        if isinstance(node, ast.Import):
            file.whole.update(
                {alias.asname or alias.name: found for alias in node.names if (found := _helper(path, alias.name))}
            )
    return file


def _helper(path: Path, module: str) -> Path | None:
    """The file of a module that lies in tests/support, beside ``path`` or above it."""
    folders = [folder for folder in path.parents if folder.is_relative_to(TESTS)]
    places = (folder / f"{module}.py" for folder in (*folders, SUPPORT))
    return next((place for place in places if place.is_file() and place != path), None)


def _uses(part: Part) -> Iterator[Part]:
    """What a part names: of its own file, of helpers that the file imports, and fixtures of the conftests above."""
    path, name = part
    file = read(path)
    words = set(file.words[name])
    conftests = [place for folder in path.parents if (place := folder / "conftest.py").is_file()]
    conftests = [place for place in conftests if place.is_relative_to(TESTS) and place != path]
    if TEST.match(name):
        words.update(file.everywhere, *(read(place).everywhere for place in conftests))
    helpers = [file.whole[word] for word in words & file.whole.keys()]
    for word in words:
        yield path, word
        if word in file.named:
            yield file.named[word]
        yield from ((place, word) for place in (*conftests, *helpers))


def _is_timed(part: Part) -> bool:
    """Whether a part shows a sign, in its own text or in that of anything it uses."""
    seen, waiting = {part}, [part]
    while waiting:
        path, name = found = waiting.pop()
        if name in read(path).shows:
            return True
        more = {(place, word) for place, word in _uses(found) if word in read(place).words} - seen
        seen |= more
        waiting += more
    return False


def timed() -> list[str]:
    """Node ids below the repository, in order; parametrised tests once, and a class of tests as a whole."""
    files = sorted(path for path in TESTS.rglob("test_*.py") if "interpreted" not in path.parts)
    tests = [(path, name) for path in files for name in read(path).words if TEST.match(name)]
    return [f"{path.relative_to(TESTS.parent)}::{name}" for path, name in tests if _is_timed((path, name))]


if __name__ == "__main__":
    print("\n".join(timed()))

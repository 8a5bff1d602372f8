"""The pages as text: nothing twice in one of them, no file named that is not there, the layers as they are checked."""

from __future__ import annotations

import ast
import re
import tomllib
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from repository import ROOT

from geoalign.install import install

PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("tests/**/README.md")]
)
HOMES = [ROOT / folder for folder in (".", "geoalign", "kernels")]
FOREIGN = {"inference.py", "wan_pipeline_with_logprob.py", "reconstruct_source_tracks.py"}
"""Files of other projects that the pages name."""
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text("utf-8")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose_of(page: Path) -> str:
    """The text without code blocks and comments."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)


def twice(texts: list[str]) -> list[str]:
    return [text for text, count in Counter(texts).items() if count > 1]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_nothing_stands_twice(page: Path) -> None:
    """Merges leave a section, a paragraph or an entry of a list beside its other version."""
    text, path, headings = prose_of(page), [""] * 7, []
    for marks, title in re.findall(r"^(#{1,6}) (.+)$", text, re.MULTILINE):
        path[len(marks) :] = [title] + [""] * (6 - len(marks))
        headings.append(" / ".join(path))  # "Added" stands once in every version of the changelog
    parts = [" ".join(part.split()) for part in re.split(r"\n(?=\n|\s*- |\d+\. |#)", text)]
    # What is short, such as a command, may serve twice; a table begins with the head of others like it.
    assert twice(headings) == []
    assert twice([part for part in parts if len(part) > 60 and not part.startswith("|")]) == []
    lines = [*text.splitlines(), ""]
    rows = [line for line, after in pairwise(lines) if line.startswith("|") and not re.match(r"\| ?-+ ?\|", after)]
    assert twice([row for row in rows if len(row) > 100 and re.search(r"\w", row)]) == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_merge_was_left_open(page: Path) -> None:
    assert re.findall(r"^(?:<{7}|={7}|>{7})(?: .*)?$", prose_of(page), re.MULTILINE) == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_blank_line_stands_before_every_heading(page: Path) -> None:
    lines = ["", *prose_of(page).strip().splitlines()]
    assert [after for before, after in pairwise(lines) if before and re.match("#{1,6} ", after)] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_merge_was_left_half_done(page: Path) -> None:
    assert re.findall(r"^(?:<{7}|={7}|>{7}).*", page.read_text("utf-8"), re.MULTILINE) == []


def test_every_program_that_a_page_names_exists() -> None:
    """By the end of its path, as a reader would look for it; the log tells of what was."""
    folders = ("geoalign", "kernels", "csrc", "profiling", "configs", "tests", "examples", ".ci")
    files = ["/" + name_of(file) for folder in folders for file in (ROOT / folder).rglob("*.*")]
    named = {
        (page.name, name)
        for page in PAGES
        if page.name != "log.md"
        for name in re.findall(r"`([\w./-]+\.(?:py|sh|js|cu|cpp))`", page.read_text("utf-8"))
        if name not in FOREIGN and not re.search(r"[A-Z]{3}", name)  # PATH and NAME stand for something
    }
    assert len(named) > 60
    assert sorted((page, name) for page, name in named if not any(file.endswith("/" + name) for file in files)) == []


def test_every_path_of_the_architecture_exists() -> None:
    paths = re.findall(r"`([\w.-]+/[\w./-]*)`", ARCHITECTURE)
    paths += re.findall(r"# ([\w/]+\.py)", ARCHITECTURE)  # what a line of the iteration is done by
    assert len(paths) > 40
    assert [path for path in paths if not any((home / path).exists() for home in HOMES)] == ["parity/log_prob_diff_max"]


def calls_of(file: str, kind: str, method: str) -> list[str]:
    """Names that a method calls, as the text has them one after the other; methods of its own class are opened."""
    tree = ast.parse((ROOT / "geoalign" / "training" / file).read_text("utf-8"))
    (body,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == kind)
    methods = {node.name: node for node in body.body if isinstance(node, ast.FunctionDef)}

    def opened(function: ast.FunctionDef) -> list[str]:
        calls = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
        found = []
        for called in sorted(calls, key=lambda node: (node.end_lineno, node.end_col_offset)):
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            own = isinstance(called, ast.Attribute) and ast.unparse(called.value) == "self" and name in methods
            found += [name.lstrip("_"), *(opened(methods[name]) if own else ())]
        return found

    return opened(methods[method])


def in_order(names: list[str], called: list[str]) -> list[str]:
    """The names that do not follow, in ``called``, on those before them."""
    rest, missing = iter(called), []
    for name in names:
        if name not in rest:
            missing.append(name)
            rest = iter(called)
    return missing


def test_the_iteration_of_the_architecture_is_the_trainers_line_by_line() -> None:
    """What is indented happens inside the update."""
    block = re.search(r"```python\n(.*?)```", ARCHITECTURE, re.DOTALL)
    assert block is not None
    lines = [line.split("#")[0] for line in block[1].splitlines()]
    step, inside = (
        [n for line in lines if line.startswith(" ") is deep for n in re.findall(r"(\w+)\(", line)]
        for deep in (False, True)
    )
    assert len(step) > 10 and len(inside) == 1
    assert in_order(step, calls_of("trainer.py", "Trainer", "step")) == []
    assert in_order(inside, calls_of("learner.py", "Learner", "update")) == []
    assert in_order(["prepare", "batch"], calls_of("trainer.py", "Trainer", "step")) == ["batch"]  # it can say no


def test_the_layers_are_those_that_are_checked() -> None:
    block = re.search(r"```\n(cli .*?)```", ARCHITECTURE, re.DOTALL)
    assert block is not None
    drawn = [set(re.split(r"\s\s+", line.strip())[0].split(" | ")) for line in block[1].splitlines()]
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    layers = next(each["layers"] for each in contracts if each["type"] == "layers" and "containers" not in each)
    packages = [{name.removeprefix("geoalign.") for name in layer.split(" | ")} for layer in layers]
    small = {"__main__", "api", "errors", "install", "version"}  # one file each, above and below everything
    assert drawn == [left for layer in packages if (left := layer - small)]


def test_advice_to_install_leads_to_a_clone_and_to_parts_that_exist() -> None:
    """No index holds geoalign: by its name pip would find nothing, or somebody else's package."""
    folders, kinds = ("geoalign", "kernels", "profiling", "examples", "configs", "tests"), (".py", ".yaml", ".sh")
    sources = [file for folder in folders for file in (ROOT / folder).rglob("*") if file.suffix in kinds]
    files = [file for file in (*sources, *PAGES) if file != Path(__file__) and file.name != "CHANGELOG.md"]
    texts = {name_of(file): file.read_text("utf-8").replace("in a clone of geoalign", "") for file in files}
    by_name = re.compile(r"pip install[^\n]*?\bgeoalign(?![\w/-])|\bgeoalign\[")
    assert [name for name, text in texts.items() if by_name.search(text)] == []
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    every = "\n".join(texts.values())
    asked = set(re.findall(r"install\([\"']([\w-]+)[\"']", every))
    written = {part for parts in re.findall(r"'\.\[([\w,-]+)\]'", every) for part in parts.split(",")}
    assert asked >= {"gpu", "flash", "wandb", "dali-cu13"} and asked | written <= extras.keys()
    assert install() == "pip install . in a clone of geoalign"
    assert install("gpu") == "pip install '.[gpu]' in a clone of geoalign"

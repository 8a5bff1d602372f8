"""The container recipe, which is not built here, names what exists and is well formed."""

from __future__ import annotations

import datetime
import importlib.util
import re
import tomllib

import yaml
from repository import ROOT

RECIPE = (ROOT / "Containerfile").read_text("utf-8")
INSTRUCTIONS = {"FROM", "RUN", "ENV", "COPY", "ENTRYPOINT", "CMD"}


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments), continued lines joined."""
    text = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", RECIPE, flags=re.MULTILINE))
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in text.splitlines() if line]


def test_every_instruction_is_known_and_the_base_is_pinned() -> None:
    found = instructions()
    assert {name for name, _ in found} <= INSTRUCTIONS and found[0][0] == "FROM"
    assert re.fullmatch(r"[\w./-]+:[\w.-]*\d[\w.-]*", found[0][1]), "the base image has a version, not latest"


def test_what_is_copied_and_installed_exists() -> None:
    for arguments in (text for name, text in instructions() if name == "COPY"):
        *sources, target = arguments.split()
        assert target.startswith("/src/") and all((ROOT / source).exists() for source in sources), arguments
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    named = {extra for group in re.findall(r"/src\[([\w,-]+)\]", RECIPE) for extra in group.split(",")}
    assert named and named <= set(project["optional-dependencies"])


def test_lists_of_packages_leave_nothing_behind() -> None:
    """What linters of such recipes ask: no cache of lists in the layer, no recommended packages, no cache of pip."""
    for arguments in (text for name, text in instructions() if name == "RUN" and "apt-get install" in text):
        assert "--no-install-recommends" in arguments and arguments.endswith("rm -rf /var/lib/apt/lists/*")
    assert "PIP_NO_CACHE_DIR=1" in RECIPE


def test_what_is_run_and_set_is_known_to_the_code() -> None:
    for module in re.findall(r"python -m ([\w.]+)", RECIPE):
        assert importlib.util.find_spec(module), module
    sources = "".join(file.read_text("utf-8") for file in (ROOT / "kernels").rglob("*.py"))
    ours = re.findall(r"(GEOALIGN_\w+)=", RECIPE)
    assert ours and all(f'"{name}"' in sources for name in ours)
    assert instructions()[-2:] == [("ENTRYPOINT", '["geoalign"]'), ("CMD", '["--help"]')]


def test_the_citation_has_a_date() -> None:
    released = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))["date-released"]
    assert isinstance(released, datetime.date) and released >= datetime.date(2026, 11, 29)

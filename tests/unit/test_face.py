"""The public face: importing it costs nothing, each name is there, and nothing else pretends to be public."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import geoalign

HEAVY = ("torch", "numpy", "pydantic", "yaml", "scipy", "matplotlib", "geoalign_kernels")


def test_importing_geoalign_imports_nothing_heavy() -> None:
    code = "import sys, geoalign; geoalign.__version__; dir(geoalign); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, env=_paths())
    loaded = done.stdout.split()
    assert not {name.split(".")[0] for name in loaded} & set(HEAVY)
    assert sorted(name for name in loaded if name.startswith("geoalign")) == ["geoalign", "geoalign.version"]


def _paths() -> dict[str, str]:
    """Where this very ``geoalign`` lies; -S leaves out the packages, which could not be imported by accident."""
    return {"PYTHONPATH": str(geoalign.__path__[0]).rsplit("/", 1)[0]}


def test_every_name_is_what_a_type_checker_is_told() -> None:
    """Each public name exists, and is an object of the module that the type checker's import names."""
    assert set(geoalign._HOMES) == set(geoalign.__all__) - {"__version__"}
    for name, home in geoalign._HOMES.items():
        value = getattr(geoalign, name)
        assert value is getattr(sys.modules[home], name) and value.__doc__, name
    tree = ast.parse(Path(geoalign.__file__).read_text("utf-8"))
    told = {
        alias.name: node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert {name: told[name] for name in geoalign._HOMES} == geoalign._HOMES


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = geoalign.nothing

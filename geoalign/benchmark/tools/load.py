"""The tools that a benchmark asks for, by name."""

from __future__ import annotations

from geoalign.benchmark.records import Tool
from geoalign.benchmark.tools.dyn_met3r import DynMet3rTool
from geoalign.benchmark.tools.settings import read_tool
from geoalign.benchmark.tools.worker_tool import WorkerTool
from geoalign.config.benchmark import BenchmarkConfig


def load_tools(config: BenchmarkConfig) -> list[Tool]:
    """The tools of ``config`` in its order; nothing is started before a case is measured.

    Raises ConfigError for an unknown name or a file with problems.
    """
    return [_build(name) for name in config.tools]


def _build(name: str) -> Tool:
    stem, settings = read_tool(name)
    return DynMet3rTool(stem, settings) if settings.kind == "dyn_met3r" else WorkerTool(stem, settings)

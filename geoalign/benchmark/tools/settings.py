"""What a tool is, in YAML: which script runs it, in which environment, for how long, and what it measures."""

from __future__ import annotations

import json
import os
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from geoalign.config.base import Section
from geoalign.config.load import flatten, load_config
from geoalign.config.source import did_you_mean
from geoalign.errors import ConfigError
from geoalign.files.digest import by_content, content_hash, text_hash

FOLDER_VARIABLE = "GEOALIGN_TOOLS"
RUNNERS = Path(__file__).parent / "runners"
_DEFINITIONS = Path(__file__).parent / "definitions"


class EnvironmentSettings(Section):
    """The Python environment of a tool."""

    python: Path | None = None
    """Its interpreter; unset: ``bin/python`` in the folder of its name under ``$GEOALIGN_TOOLS``, else under
    ``~/.cache/geoalign/tools``."""
    distribution: str
    """The package that must be installed there, as its index calls it."""
    versions: tuple[str, ...] = Field(min_length=1)
    """Accepted versions, or their beginnings: ``1.2`` accepts 1.2 and 1.2.0."""
    files: tuple[str, ...] = ()
    """Files that must be there too, as paths from where the package is installed."""
    commands: tuple[str, ...] = Field(min_length=1)
    """Shell commands that make the environment; ``{folder}`` stands for its folder."""

    def accepts(self, version: str) -> bool:
        """Whether ``version`` is one of the accepted ones or begins with one."""
        return any(version == wanted or version.startswith(f"{wanted}.") for wanted in self.versions)


class WorkerSettings(Section):
    """One process of a tool."""

    runner: Path
    """Script with ``load(options)``, which returns ``measure(request)``; beside the YAML file, or one of ours."""
    environment: str
    """Name of its environment: one of ``environments`` here, or that of the built-in tool of this name."""
    options: dict[str, Any] = Field(default_factory=dict)
    """What ``load`` is given."""
    variables: dict[str, str] = Field(default_factory=dict)
    """Extra environment variables."""
    timeout_s: float = Field(gt=0)
    """Longest time for one case; a later answer is none, and the process and all it started are killed."""
    start_timeout_s: float = Field(600.0, gt=0)
    """Longest time until weights are loaded."""
    retries: int = Field(1, ge=0)
    """How often a case is tried again after an exception, a crash or an incomplete output; never after a time-out."""


class ToolSettings(Section):
    """A tool; the name of its file is its name."""

    kind: Literal["worker", "dyn_met3r"] = "worker"
    """``worker``: one process measures it all. ``dyn_met3r``: workers ``scene`` and ``features``, the rest is ours."""
    licence: str
    """One line."""
    metrics: tuple[str, ...] = ()
    """Names of the numbers in its answer; all must be there, and finite."""
    gives_poses: bool = False
    """Whether its answer holds the camera (``poses.npz``)."""
    workers: dict[str, WorkerSettings]
    """Its processes by name."""
    environments: dict[str, EnvironmentSettings] = Field(default_factory=dict)
    """Environments by name."""

    @model_validator(mode="after")
    def _workers_fit_the_kind(self) -> Self:
        wanted = {"worker": {"worker"}, "dyn_met3r": {"scene", "features"}}[self.kind]
        if set(self.workers) != wanted:
            raise ValueError(f"kind {self.kind} has workers {', '.join(sorted(wanted))}, not {', '.join(self.workers)}")
        return self


def builtin_tools() -> tuple[str, ...]:
    """Names of the tools that come with the package."""
    return tuple(sorted(path.stem for path in _DEFINITIONS.glob("*.yaml")))


def read_tool(name: str) -> tuple[str, ToolSettings]:
    """Name and settings of a built-in tool or of a YAML file, with every environment that its workers name.

    The runners are then absolute paths. Raises ConfigError for an unknown name, a file with problems, an environment
    that nothing describes, and a runner that is not there.
    """
    file = Path(name).expanduser()
    if file.suffix not in (".yaml", ".yml"):
        if name not in builtin_tools():
            known = builtin_tools()
            raise ConfigError(
                f"benchmark.tools: no tool is called {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}; "
                "or give a .yaml file"
            )
        file = _DEFINITIONS / f"{name}.yaml"
    settings = load_config(ToolSettings, str(file.absolute()))
    environments, workers = dict(settings.environments), dict(settings.workers)
    for name, worker in settings.workers.items():
        workers[name] = worker.model_copy(update={"runner": _runner(worker.runner.expanduser(), file)})
        if worker.environment not in environments:
            environments[worker.environment] = _environment(worker.environment, file)
    return file.stem, settings.model_copy(update={"environments": environments, "workers": workers})


def _runner(runner: Path, file: Path) -> Path:
    found = next((path for path in (file.absolute().parent / runner, RUNNERS / runner) if path.is_file()), None)
    if found is None:
        raise ConfigError(f"{file}: no runner {runner}, neither beside it nor among ours ({RUNNERS})")
    return found


def _environment(name: str, file: Path) -> EnvironmentSettings:
    if name not in builtin_tools() or _DEFINITIONS / f"{name}.yaml" == file:
        raise ConfigError(f"{file}: nothing describes the environment {name!r}; add it under environments")
    return load_config(ToolSettings, str(_DEFINITIONS / f"{name}.yaml")).environments[name]


def contents_of(settings: ToolSettings) -> dict[str, str]:
    """What decides on a tool's numbers, as :meth:`geoalign.benchmark.records.Tool.contents`; nothing is started.

    Raises DataError for a script or weights that cannot be read.
    """
    told = {
        name: [content_hash(worker.runner), by_content(flatten(worker.options)), by_content(worker.variables)]
        for name, worker in sorted(settings.workers.items())
    }
    versions = {f"environment {n}": version for n, e in settings.environments.items() if (version := _installed(n, e))}
    return {"definition": text_hash(json.dumps(told, sort_keys=True)), **versions}


def _installed(name: str, environment: EnvironmentSettings) -> str:
    """The version of an environment's distribution by what its installer left; empty where it is not there."""
    found = interpreter(name, environment).parent.parent.glob("lib/python3*/site-packages")
    paths = [str(path) for path in found]
    return next((found.version for found in distributions(name=environment.distribution, path=paths)), "")


def environment_folder(name: str) -> Path:
    """Where the environment called ``name`` lies."""
    root = os.environ.get(FOLDER_VARIABLE)
    return (Path(root).expanduser() if root else Path.home() / ".cache" / "geoalign" / "tools") / name


def interpreter(name: str, environment: EnvironmentSettings) -> Path:
    """The Python of an environment, whether or not it is there."""
    if environment.python is not None:
        return environment.python.expanduser()
    return environment_folder(name) / "bin" / "python"

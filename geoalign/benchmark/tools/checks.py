"""Which tools are there, for ``geoalign doctor``: nothing is loaded and no device is touched."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from geoalign.benchmark.tools.settings import (
    RUNNERS,
    EnvironmentSettings,
    environment_folder,
    interpreter,
    read_tool,
)
from geoalign.benchmark.tools.worker import ToolFailure, check_about, child_environment

_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class ToolCheck:
    """The state of one environment.

    Attributes:
        name: ``tool NAME``, the name of the environment.
        state: whether it is there, and as it must be.
        what: what was found, or what is wrong.
        fix: the commands that make it, one a line; "" if it is there.
    """

    name: str
    state: Literal["present", "absent", "wrong"]
    what: str
    fix: str


def tool_checks(names: Sequence[str]) -> list[ToolCheck]:
    """The environments that the tools ``names`` (as in ``benchmark.tools``) run in, each once.

    Raises ConfigError as :func:`read_tool`.
    """
    environments: dict[str, EnvironmentSettings] = {}
    for name in names:
        environments |= read_tool(name)[1].environments
    return [_check(name, environment) for name, environment in environments.items()]


def _check(name: str, environment: EnvironmentSettings) -> ToolCheck:
    fix = "\n".join(command.replace("{folder}", str(environment_folder(name))) for command in environment.commands)
    python = interpreter(name, environment)
    try:
        told = _about(name, environment)
        check_about(told, name, environment)
    except ToolFailure as failure:
        return ToolCheck(f"tool {name}", "absent" if failure.kind == "absent" else "wrong", str(failure), fix)
    return ToolCheck(f"tool {name}", "present", f"{environment.distribution} {told['version']} in {python}", "")


def _about(name: str, environment: EnvironmentSettings) -> dict[str, object]:
    """What the environment says of itself; raises ToolFailure where it cannot be asked."""
    python = interpreter(name, environment)
    if not python.exists():
        raise ToolFailure("absent", f"no {python}")
    setup = json.dumps({"distribution": environment.distribution, "files": list(environment.files)})
    try:
        done = subprocess.run(
            [str(python), str(RUNNERS / "host.py"), setup], input='{"do": "about"}\n', capture_output=True, text=True,
            timeout=_TIMEOUT_S, check=False, start_new_session=True, env=child_environment(os.environ, python),
        )  # fmt: skip
        return json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise ToolFailure("raised", f"{python} does not answer ({error})") from error

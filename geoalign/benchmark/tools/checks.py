"""Which tools are there, for ``geoalign doctor``: nothing is loaded and no device is touched."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from typing import Any

from geoalign.benchmark.tools.settings import (
    RUNNERS,
    EnvironmentSettings,
    environment_folder,
    interpreter,
    read_tool,
)
from geoalign.benchmark.tools.worker import ABOUT_TIMEOUT_S, ToolFailure, check_about, child_environment
from geoalign.config.schema import Config
from geoalign.errors import ConfigError
from geoalign.files.check import Check


def tool_environments(config: Config) -> Iterator[Check]:
    """The environments that the tools of ``benchmark.tools`` run in, each once; the fix of one is to make it.

    No run refuses to start without one: what its tool would have measured is then a counted failure.
    """
    environments: dict[str, EnvironmentSettings] = {}
    for name in config.benchmark.tools:
        try:
            environments |= read_tool(name)[1].environments
        except ConfigError as error:
            yield Check(f"tool {name}", "wrong", str(error), "correct benchmark.tools, or that file", error)
    for name, environment in environments.items():
        yield _check(name, environment)


def _check(name: str, environment: EnvironmentSettings) -> Check:
    python = interpreter(name, environment)
    try:
        told = _about(name, environment)
        check_about(told, name, environment)
    except ToolFailure as failure:
        commands = (command.replace("{folder}", str(environment_folder(name))) for command in environment.commands)
        state = "absent" if failure.kind == "absent" else "wrong"
        return Check(f"environment {name}", state, failure.text, "\n".join(commands))
    return Check(f"environment {name}", "present", f"{environment.distribution} {told['version']} in {python}")


def _about(name: str, environment: EnvironmentSettings) -> dict[str, Any]:
    """What the environment says of itself; raises ToolFailure where it cannot be asked."""
    python = interpreter(name, environment)
    if not python.exists():
        raise ToolFailure("absent", f"no {python}")
    setup = json.dumps({"distribution": environment.distribution, "files": list(environment.files)})
    try:
        done = subprocess.run(
            [str(python), str(RUNNERS / "host.py"), setup], input='{"do": "about"}\n', capture_output=True, text=True,
            timeout=ABOUT_TIMEOUT_S, check=False, start_new_session=True, env=child_environment(os.environ, python),
        )  # fmt: skip
        return json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise ToolFailure("raised", f"{python} does not answer ({error})") from error

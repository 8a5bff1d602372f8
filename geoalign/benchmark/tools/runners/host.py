"""The process in a tool's environment: serves one runner script, a JSON line in, a JSON line out.

Python 3.10 or later and the standard library. What runner and tool print goes to stderr, for stdout carries the
answers; nothing that the tool starts inherits either end of the conversation.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import signal
import sys
import threading
import time
import traceback
from typing import Any

_WATCH_S = 2.0


def about(distribution: str, files: list[str]) -> dict[str, Any]:
    """Version of an installed distribution, None if it is not installed, and which of its ``files`` are missing."""
    try:
        found = importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return {"version": None, "missing": []}
    missing = [name for name in files if not os.path.exists(str(found.locate_file(name)))]
    return {"version": found.version, "missing": missing}


def load_script(path: str) -> Any:
    """The runner as a module under a name that no package has."""
    spec = importlib.util.spec_from_file_location("_runner", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def end_with_parent(parent: int) -> None:
    """Kill this process and all that it started when ``parent`` is gone: a killed run leaves no device in use."""
    while os.getppid() == parent:
        time.sleep(_WATCH_S)
    os.killpg(os.getpgid(0), signal.SIGKILL)


def write_whole(path: str, value: Any) -> None:
    """A JSON file that is there as a whole or not at all."""
    with open(f"{path}.part", "w", encoding="utf-8") as file:
        json.dump(value, file)
    os.replace(f"{path}.part", path)


def answer(setup: dict[str, Any], request: dict[str, Any], loaded: list[Any]) -> dict[str, Any]:
    """What one request asks for: ``about`` the environment, to ``load`` the tool, or to ``measure`` a case."""
    if request["do"] == "about":
        return about(setup["distribution"], setup["files"])
    if not loaded:
        loaded.append(load_script(setup["runner"]).load(setup["options"]))
    if request["do"] == "measure":
        write_whole(os.path.join(request["folder"], "result.json"), loaded[0](request))
    return {}


def serve(setup: dict[str, Any]) -> None:
    """Answer requests until stdin ends."""
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    loaded: list[Any] = []
    for line in requests:
        try:
            told = answer(setup, json.loads(line), loaded)
        except Exception as error:  # of the tool; the parent counts it
            told = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        answers.write(json.dumps(told) + "\n")
        answers.flush()


if __name__ == "__main__":
    # Beside this file lie scripts named for their tools, and an import must find the tools.
    beside = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [place for place in sys.path if os.path.realpath(place) != beside]
    serve(json.loads(sys.argv[1]))

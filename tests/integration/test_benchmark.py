"""The whole benchmark on a DAVIS-shaped folder with a stand-in ViPE: killed at a random case, resumed, equal tables."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import foreign_tools
import pytest
from benchmark_cases import davis, davis_settings, random_policy
from patience import PATIENCE_S

from geoalign.benchmark.tools.settings import FOLDER_VARIABLE
from geoalign.cli.main import main

ROOT = Path(__file__).parents[2]
PATHS = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "tests/support"))
FAILURES = {
    "bear_camera_1_": (
        "raise",
        r"raised: RuntimeError: vipe infer ended with exit code 1; it printed: .*out of memory",
    ),
    "bear_camera_5_": ("hang", r"timed out: no answer within 1800 s, killed"),
    "rhino_camera_1_": ("half", r"raised: BadZipFile"),
    "rhino_camera_5_": ("identity", r"identity poses: all 5 poses are equal"),
}
"""What ViPE does with a case, and the cause that is counted."""
# The command line, but for the time of a tool that hangs: it is up at once, whatever the load of the machine.
COMMAND = """
import sys, threading
from pathlib import Path
import foreign_tools
from geoalign.cli.main import main
threading.Timer = foreign_tools.impatient_timer(Path(sys.argv[1]))
sys.exit(main(sys.argv[2:]))
"""


def told(folder: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows without their seconds, and every file of the tables."""
    rows = [json.loads(line) for line in (folder / "cases.jsonl").read_text().splitlines()]
    tables = {path.name: path.read_text() for path in (folder / "tables").iterdir()}
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows], tables


def test_killed_at_a_random_case_it_resumes_to_equal_tables_and_counts_every_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    davis(tmp_path / "davis", {"bear": 5, "rhino": 5, "swan": 5})
    base = random_policy(tmp_path / "base")
    vipe = foreign_tools.vipe(tmp_path / "tools")
    foreign_tools.behave_by_case(tmp_path / "tools", "vipe", {part: how for part, (how, _) in FAILURES.items()})
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "tools"))
    monkeypatch.setenv("PYTHONPATH", PATHS)
    monkeypatch.setattr(threading, "Timer", foreign_tools.impatient_timer(vipe))
    out = tmp_path / "out"
    command = ["benchmark", "run", "--config", "smoke", "--model", f"base={base}", "--out", str(out)]
    command += [*davis_settings(tmp_path / "davis"), "benchmark.tools=[vipe]"]
    assert main(command) == 0
    out.rename(tmp_path / "whole")

    number = random.randint(1, 4)  # of rows that are written when the process is killed: any will do
    process = subprocess.Popen([sys.executable, "-c", COMMAND, str(vipe), *command], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + PATIENCE_S
    while len(done := list((out / "rows").rglob("*_speed_1.json"))) < number:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    assert all(json.loads(row.read_text())["status"] == "ok" for row in done) and not (out / "tables").exists()
    kept = {row: row.stat().st_mtime_ns for row in done}
    assert main(command) == 0
    assert all(row.stat().st_mtime_ns == when for row, when in kept.items())  # none of them was done again
    assert told(out) == told(tmp_path / "whole"), f"killed after {number} rows"

    rows, tables = told(out)
    assert len(rows) == 6 and all(row["status"] == row["readers"]["told"]["status"] == "ok" for row in rows)
    for row in rows:
        vipe_read = row["readers"]["vipe"]
        cause = next((cause for part, (_, cause) in FAILURES.items() if row["case"].startswith(part)), None)
        assert vipe_read["status"] == ("failed" if cause else "ok")
        assert re.match(cause or "$", vipe_read["cause"]), vipe_read["cause"]
    assert "| vipe: base | 2 | 4 | 0 |" in tables["failures.md"] and "4 of 6" in tables["table1.md"]
    assert all(how in tables["failures.md"] for how in ("raised: ", "timed out: ", "raised: BadZipFile"))

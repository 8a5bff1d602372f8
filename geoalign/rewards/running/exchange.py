"""A line to a process and a line back, in time: how rewards and tools in processes of their own are spoken to."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable


def exchange(process: subprocess.Popen[str], line: str, timeout_s: float, kill: Callable[[], object]) -> str | None:
    """Send ``line`` and return the whole line that is answered.

    Args:
        process: with pipes for stdin and stdout, in text mode.
        line: without its end.
        timeout_s: longest time for the answer in seconds.
        kill: ends the process, and is called when that time is over, from another thread.

    Returns None when the time was over, and an empty text when the process ended, or left its line unfinished.
    """
    assert process.stdin is not None and process.stdout is not None
    late = threading.Event()

    def give_up() -> None:
        late.set()
        kill()

    timer = threading.Timer(timeout_s, give_up)
    timer.start()
    try:
        process.stdin.write(f"{line}\n")
        process.stdin.flush()
        answer = process.stdout.readline()
    except BrokenPipeError:
        answer = ""
    finally:
        timer.cancel()
    if answer.endswith("\n"):
        return answer
    return None if late.is_set() else ""

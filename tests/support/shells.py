"""Real shells that somebody types into: what a command gets after its words were completed by a key."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from patience import PATIENCE_S

TAB = "\t"
EVERY = "\x1b*"
"""The key that puts every possible completion on the line (of bash's own; bound in zsh here)."""
_SAY = "{}() {{ printf '\\n<'; printf '%s|' \"$@\"; printf '>\\n'; }}"
_SETUP = {
    "bash": "bind 'set enable-bracketed-paste off'; bind 'set bell-style none'; PS1=; PS2=",
    "zsh": """unsetopt zle_bracketed_paste prompt_sp prompt_cr beep; PS1=; autoload -Uz compinit && compinit -D -u
zle -C every complete-word _generic; bindkey '\\e*' every; bindkey '\\t' complete-word
zstyle ':completion:every:*' completer _all_matches _complete; zstyle ':completion:every:*' insert yes""",
}
_START = {"bash": ["bash", "--norc", "--noprofile", "-i"], "zsh": ["zsh", "-f", "-i"]}


def typed(shell: str, script: Path, command: str, lines: Sequence[str]) -> list[list[str]]:
    """The arguments that ``command`` gets of each line, which may hold TAB and EVERY, once ``script`` is sourced."""
    with _terminal(shell, script.parent) as master:
        ready = "echo REA''DY"  # what is echoed of the line typed is another text than what it prints
        for line in (*_SETUP[shell].split("\n"), _SAY.format(command), f"source ./{script.name}"):
            os.write(master, f"{line}; {ready}\n".encode())
            _until(master, "READY")
        answers = []
        for line in lines:
            os.write(master, f"{line}\n".encode())
            told = _until(master, "|>\r\n")
            answers.append(told[told.rindex("\n<") + 2 :].removesuffix("|>\r\n").split("|"))
        return answers


@contextmanager
def _terminal(shell: str, folder: Path) -> Iterator[int]:
    master, slave = pty.openpty()
    env = {"PATH": os.environ["PATH"], "HOME": str(folder), "TERM": "dumb", "LC_ALL": "C.UTF-8"}
    # A terminal of its own as controlling terminal, without which interactive shells complain.
    start = ["setsid", "--ctty", *_START[shell]]
    process = subprocess.Popen(start, stdin=slave, stdout=slave, stderr=slave, cwd=folder, env=env)
    os.close(slave)
    try:
        yield master
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(PATIENCE_S)
        os.close(master)


def _until(master: int, end: str) -> str:
    """What the terminal shows up to and with ``end``."""
    seen, limit = "", time.monotonic() + PATIENCE_S
    while end not in seen:
        if not select.select([master], [], [], max(0.0, limit - time.monotonic()))[0]:
            raise TimeoutError(f"the shell does not show {end!r} but {seen[-500:]!r}")
        seen += os.read(master, 65536).decode(errors="replace")
    return seen[: seen.index(end) + len(end)]

"""The ``geoalign`` command: find the verb, import only its module, run it, turn user errors into one line.

``geoalign.cli.VERB`` offers ``add_parser(subparsers, summary)``, which adds the verb's parser, described by that
summary, and those of its sub-verbs; each sets ``run=function(args) -> int``. Nothing heavy is imported before the verb
is known, so ``geoalign --help`` is instant.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import importlib
import io
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from geoalign.errors import Stopped, UsageError, UserError
from geoalign.install import install
from geoalign.training.processes.launcher import (
    INTERRUPTED,
    check_environment,
    die_with_launcher,
    leave_words,
    started_by_launcher,
)
from geoalign.version import __version__

DEBUG_VARIABLE = "GEOALIGN_DEBUG"
QUIET = ("torch", "transformers", "diffusers", "huggingface_hub", "tensorboard", "matplotlib", "multiprocessing")
"""Libraries whose warnings tell a user nothing to do."""
QUIET_LOGS = ("torchao", "torch.utils._pytree", "matplotlib.font_manager")
OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.ENOENT)
OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")


@dataclass(frozen=True, slots=True)
class Verb:
    """One command: the part of the help it belongs to, what it does in one line, and how it begins.

    ``says_first``: its first line is said here, before slow imports. False for what tells more as it begins, and for
    what answers at once.
    """

    name: str
    part: str
    summary: str
    says_first: bool = True

    @property
    def module(self) -> str:
        """Where its parser lives."""
        return f"geoalign.cli.{self.name}"


VERBS = (
    Verb("train", "Train", "reinforcement learning of the camera (GRPO); ends with report.html", says_first=False),
    Verb("pretrain", "Train", "make the base policy of the embedded default anew", says_first=False),
    Verb("evaluate", "Train", "camera errors of a checkpoint on held-out scenes and paths"),
    Verb("benchmark", "Train", "the paper's evaluation: clips x paths x methods, tables, report"),
    Verb("data", "Prepare", "check clips, camera paths and the cache; plot the paths"),
    Verb("prepare", "Prepare", "encode clips, text and source cameras once, for many runs", says_first=False),
    Verb("score", "Look", "score any video against a camera path; probe a reward with cheats"),
    Verb("world", "Look", "render the embedded world: clips, camera archives, a contact sheet"),
    Verb("report", "Look", "write the self-contained HTML report of a run folder"),
    Verb("path", "Use", "draw a camera path by hand over a video, on a page that works offline"),
    Verb("sample", "Use", "retake a video along a camera path, with trained or published weights"),
    Verb("export", "Use", "write a trained model for ReDirector, ReCamMaster, diffusers or LoRA"),
    Verb("model", "Inspect", "published layouts, and which model a checkpoint file belongs to", says_first=False),
    Verb("config", "Inspect", "print, check and compare configurations; schema for editors", says_first=False),
    Verb("budget", "Inspect", "predicted hours of a configuration, lever by lever", says_first=False),
    Verb("fidelity", "Inspect", "what approximate tails do to the order of a group, and what they save"),
    Verb("doctor", "Inspect", "versions, devices, kernel backends; what a configuration needs and where to get it"),
    Verb("completion", "Inspect", "complete verbs, options and settings in bash or zsh", says_first=False),
)

EXAMPLES = """\
examples:
  geoalign train --config tiny_cpu                       the demo: no GPU, no weights, no downloads
  geoalign train --config tiny_cpu run.seed=1            any setting by its dotted name
  geoalign train --config tiny_cpu run.ranks=2 run.name=two
  geoalign config print --config node_8gpu optim.lr=5e-6 the resolved settings of a run, before running it
  geoalign report runs/two                               one HTML file that opens offline

`geoalign VERB --help` explains a verb. Exit codes: 0 done, 1 failed while running, 2 wrong usage or configuration,
75 training was stopped by a signal and wrote its checkpoint (run it again with --resume auto), 130 interrupted.
An unexpected error leaves its traceback in a file that it names; GEOALIGN_DEBUG=1 shows that of any error."""


def help_text() -> str:
    """Compose the overview from the table of verbs; imports nothing."""
    lines = ["usage: geoalign VERB [options] [section.key=value ...]", ""]
    lines += ["Post-train a camera-controlled video model so that its camera follows the path you ask for,"]
    lines += ["rewarded in metres and degrees.", ""]
    width = max(len(verb.name) for verb in VERBS) + 2
    for part in dict.fromkeys(verb.part for verb in VERBS):
        lines.append(f"{part}:")
        lines += [f"  {verb.name:<{width}}{verb.summary}" for verb in VERBS if verb.part == part]
        lines.append("")
    return "\n".join([*lines, EXAMPLES, ""])


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    _quieten_others()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log shows lines when they are said, as a terminal does
    arguments = list(sys.argv[1:] if argv is None else argv)
    if started_by_launcher():
        die_with_launcher()
    try:
        code = _dispatch(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()  # a full disk behind it is told here, not by the interpreter when it ends
        return code
    except Stopped as stopped:
        return _ended(str(stopped), stopped.exit_code)
    except UserError as error:
        if os.environ.get(DEBUG_VARIABLE) == "1":
            raise
        return _ended(f"error: {error}", error.exit_code)
    except KeyboardInterrupt:
        return _ended("interrupted", INTERRUPTED)
    except BrokenPipeError:
        _forget_output()  # the reader (``| head``) left: nothing more to say
        return 0
    except Exception as error:
        if os.environ.get(DEBUG_VARIABLE) == "1":
            raise
        if isinstance(error, OSError) and error.filename is None:
            _forget_output()
        return _ended(_in_one_line(error), UserError.exit_code)


def _forget_output() -> None:
    """Let what was printed and not written go, so that the interpreter does not try to write it when it ends."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _ended(text: str, exit_code: int) -> int:
    """Say why the command ended, or let the process say so that started this one as a rank; returns ``exit_code``."""
    if started_by_launcher():
        leave_words(text, exit_code)
    else:
        with contextlib.suppress(OSError):  # a full disk behind it must not change the exit code
            print(f"{_speaker()}: {text}", file=sys.stderr)
    return exit_code


def _quieten_others() -> None:
    """Keep notices and bars of libraries off the screen, unless the environment asks for them."""
    import logging
    import warnings

    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if os.environ.get(DEBUG_VARIABLE) != "1":
        for name in QUIET_LOGS:
            logging.getLogger(name).setLevel(logging.ERROR)
        for library in QUIET:
            warnings.filterwarnings("ignore", module=rf"{library}(\.|$)")


def _in_one_line(error: Exception) -> str:
    """What is said of an exception that is no UserError: of disk and home the fix, else where the traceback is."""
    if isinstance(error, OSError) and (error.filename is not None or error.errno in OF_DISKS):
        from geoalign.files.atomic import fix_of

        where = "the output or a temporary file" if error.filename is None else error.filename
        return f"error: {where}: {error.strerror}; {fix_of(error)}"
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        from geoalign.config.packages import BASE

        if (package := error.name.partition(".")[0]) in BASE:
            return f"error: package {package} is not installed; {install()}"
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # pathlib's, of ~
        return f"error: ~: {error} Set HOME, or write the path out"
    return f"unexpected error: {_unexpected(error)}"


def _unexpected(error: Exception) -> str:
    """A fault of geoalign itself in one line, which names the file that holds its traceback."""
    import tempfile
    import traceback

    said = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="geoalign-", suffix=".txt", errors="replace", delete=False
        ) as file:
            file.write(
                f"geoalign {__version__} {shlex.join(sys.argv[1:])}\n{''.join(traceback.format_exception(error))}"
            )
    except OSError as problem:
        return f"{said} ({DEBUG_VARIABLE}=1 shows the traceback; no file could be written: {problem.strerror})"
    return f"{said} (traceback in {file.name}; please report it)"


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(help_text(), end="")
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"geoalign {__version__}")
        return 0
    verbs = {verb.name: verb for verb in VERBS}
    if arguments[0] not in verbs:
        close = difflib.get_close_matches(arguments[0], verbs, n=1, cutoff=0.5)
        hint = f" Did you mean `geoalign {close[0]}`?" if close else ""
        raise UsageError(f"no such verb: {arguments[0]}.{hint} `geoalign --help` lists all.")
    check_environment()
    verb = verbs[arguments[0]]
    args = _parse(parser_of(verb), arguments)
    if verb.says_first:
        from geoalign.jobs.progress import say

        say(f"{verb.name}: loading")
    return int(args.run(args) or 0)


def parser_of(verb: Verb) -> argparse.ArgumentParser:
    """The parser of a command line with this verb; imports its module."""
    parser = argparse.ArgumentParser(prog="geoalign", formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(dest="verb", required=True)
    importlib.import_module(verb.module).add_parser(subparsers, verb.summary)
    return parser


def _parse(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """Parse, accepting overrides on both sides of an option (argparse alone takes one uninterrupted group)."""
    args, rest = parser.parse_known_args(arguments)
    overrides = [word for word in rest if OVERRIDE.match(word)] if hasattr(args, "overrides") else []
    if len(overrides) < len(rest):
        unknown = " ".join(word for word in rest if word not in overrides)
        raise UsageError(f"unrecognized arguments: {unknown}. `geoalign {arguments[0]} --help` lists the options.")
    if overrides:
        args.overrides = [*args.overrides, *overrides]
    return args


def _speaker() -> str:
    """Name the rank under torchrun, so that eight equal lines can be told apart."""
    rank = os.environ.get("RANK")
    return f"geoalign [rank {rank}]" if rank is not None else "geoalign"

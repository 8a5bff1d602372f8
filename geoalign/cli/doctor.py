"""``geoalign doctor``: what this machine has, which kernels it would run, and what each missing extra would add."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from geoalign.cli.options import add_config, add_json, check_json, read_config, write_json
from geoalign.errors import UsageError
from geoalign.install import install
from geoalign.version import __version__

CHECKED = ("name", "state", "what", "fix")
# Versions on which the whole test suite has been run; other versions from ``requires-python`` on are expected to work.
PYTHON_TRIED = ("3.11",)
_ANSWER_S = 120.0
"""For a version from `nvcc` or `nvidia-smi`: a broken driver never answers, a busy machine late."""
SHOWN_PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "scipy",
    "diffusers",
    "transformers",
    "safetensors",
    "pydantic",
    "av",
)


EXAMPLES = """\
examples:
  geoalign doctor                                this machine: packages, devices, kernels
  geoalign doctor --config single_gpu            weights, data, disk and device that this run needs, and how to get them
  geoalign doctor --fetch-rewards                the prompts of VideoAlign and HPSv3, from their packages
"""


@dataclass(frozen=True, slots=True)
class Extra:
    """An optional part of the installation: the packages to look for and what they make possible."""

    name: str
    packages: tuple[str, ...]
    enables: str
    install: str


EXTRAS = (
    Extra(
        "dali",
        ("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
        "decoding clips on the GPU (data.clips.reader=dali); PyAV is used without it",
        f"{install('dali-cu13')} (CUDA 12 driver: dali-cu12)",
    ),
    Extra(
        "flash",
        ("flash-attn", "flash-attn-4"),
        "FlashAttention kernels; PyTorch's own flash kernels are used without it",
        f"{install('flash', '--no-build-isolation')} (needs nvcc)",
    ),
)


def add_parser(subparsers: Any, summary: str) -> None:
    """Add ``doctor``."""
    parser = subparsers.add_parser(
        "doctor",
        description=f"{summary}. Put the output into bug reports.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_json(parser, "one object")
    parser.add_argument(
        "--fetch-rewards",
        action="store_true",
        help="download the prompt templates of VideoAlign and HPSv3 and Wan's negative prompt, verify them by checksum "
        "and print their paths",
    )
    add_config(parser, required=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report; exit code 1 if a run with the ``--config`` could not start. A missing extra is no error.

    With ``--fetch-rewards`` fetch prompt templates instead; raises RewardError when one cannot be had.
    """
    if args.overrides and args.config is None:
        raise UsageError(f"{args.overrides[0]} changes a configuration; name it with --config")
    check_json(args)
    if args.fetch_rewards:
        from geoalign.rewards.vlm.templates import fetch

        paths = {name: str(path) for name, path in fetch().items()}
        if write_json(args, paths):
            print("\n".join(f"{name:<20}{path}" for name, path in paths.items()))
        return 0
    report = collect()
    if args.config is None:
        if write_json(args, report):
            print(render(report))
        return 0
    from geoalign.config.packages import missing_base
    from geoalign.files.check import lines_of

    found, tools, folder = missing_base(), [], {}
    if not found:  # nothing else could be looked at, the configuration included
        from geoalign.benchmark.tools.checks import tool_environments
        from geoalign.jobs import checks

        config = read_config(args)
        found, tools = checks.collect(config), list(tool_environments(config))
        folder = {"folder": str(config.run.folder)}
    bad = sum(check.state != "present" for check in found)
    lost = sum(check.state != "present" for check in tools)
    rows = [{name: getattr(check, name) for name in CHECKED} for check in (*found, *tools)]
    if write_json(args, report | {"config": args.config, **folder, "checks": rows}):
        state = f"{bad} of {len(found)} are missing or wrong: a run could not start" if bad else "a run can start"
        if lost:
            state += f"; what {lost} of {len(tools)} environments of tools would measure is counted as failed"
        lines = lines_of([*found, *tools])
        print("\n".join([render(report), "", f"Configuration {args.config}: {state}", *lines]))
    return int(bad > 0)


def collect() -> dict[str, Any]:
    """Gather the report as plain data."""
    return {
        "geoalign": __version__,
        "python": {"version": platform.python_version(), "executable": sys.executable, "tried": list(PYTHON_TRIED)},
        "system": {"platform": platform.platform(), "cpus": os.cpu_count(), "memory_gib": _memory_gib()},
        "packages": {name: _version(name) for name in SHOWN_PACKAGES},
        "torch": _torch_report(),
        "tools": {name: _first_line(command) for name, command in _tool_commands().items()},
        "kernels": _kernel_report(),
        "extras": [asdict(extra) | {"found": _found(extra)} for extra in EXTRAS],
    }


def render(report: dict[str, Any]) -> str:
    """Lay the report out as text for a terminal."""
    python, system, torch_ = report["python"], report["system"], report["torch"]
    lines = [f"geoalign {report['geoalign']}"]
    lines += [f"  Python    {python['version']} (suite run on {', '.join(python['tried'])})  {python['executable']}"]
    lines += [f"  System    {system['platform']}, {system['cpus']} CPUs, {system['memory_gib']} GiB"]
    lines += ["", "Packages"]
    lines += [f"  {name:<14}{version or f'missing: {install()}'}" for name, version in report["packages"].items()]
    lines += ["", "Devices"]
    if "error" in torch_:
        lines += [f"  torch cannot be imported: {torch_['error']}"]
    else:
        lines += [
            f"  {device['name']}, sm_{device['capability']}, {device['memory_gib']} GiB" for device in torch_["devices"]
        ]
        lines += [] if torch_["devices"] else [f"  no CUDA device (torch built for {torch_['cuda'] or 'CPU only'})"]
        lines += [f"  CPU, {torch_['threads']} threads"]
    lines += ["", "Kernels", *_kernel_lines(report["kernels"])]
    lines += ["", "Tools", *(f"  {name:<14}{found or 'not on PATH'}" for name, found in report["tools"].items())]
    lines += ["", "Extras"]
    for extra in report["extras"]:
        title = extra["packages"][0]
        if extra["found"]:
            lines += [f"  [x] {title:<22}{extra['found']:<12}{extra['enables']}"]
        else:
            lines += [f"  [ ] {title:<22}{'missing':<12}{extra['enables']}", f"{'':<40}{extra['install']}"]
    return "\n".join(lines)


def _torch_report() -> dict[str, Any]:
    try:
        import torch
    except Exception as error:  # a broken binary raises anything from ImportError to OSError: that is what we report
        return {"error": f"{type(error).__name__}: {error}"}
    devices = []
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": found.name,
                "capability": f"{found.major}{found.minor}",
                "memory_gib": round(found.total_memory / 2**30, 1),
            }
        )
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "devices": devices,
    }


def _kernel_report() -> dict[str, Any]:
    """Ask the kernel package which backend each op would use here."""
    if importlib.util.find_spec("geoalign_kernels") is None:
        return {"ops": [], "error": f"geoalign_kernels is not importable: {install()}"}
    try:
        import geoalign_kernels  # noqa: F401  (registers the ops)
        from geoalign_kernels import dispatch

        return {"ops": dispatch.report(), "error": None}
    except Exception as error:  # the report must come out whatever is broken
        return {"ops": [], "error": f"geoalign_kernels cannot report: {type(error).__name__}: {error}"}


def _kernel_lines(kernels: dict[str, Any]) -> list[str]:
    lines = [f"  {kernels['error']}"] if kernels["error"] else []
    ops, backends = (max((len(row[key]) for row in kernels["ops"]), default=0) + 2 for key in ("op", "backend"))
    lines += [f"  {row['op']:<{ops}}{row['backend']:<{backends}}{_reason(row)}".rstrip() for row in kernels["ops"]]
    return lines


def _reason(row: dict[str, str]) -> str:
    return f"({row['missing']})" if row["missing"] else ""


def _tool_commands() -> dict[str, list[str]]:
    return {
        "nvcc": ["nvcc", "--version"],
        "c++": ["c++", "--version"],
        "nsys": ["nsys", "--version"],
        "ncu": ["ncu", "--version"],
        "driver": ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
    }


def _first_line(command: list[str]) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not answer ({type(error).__name__})"
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    release = [line for line in lines if "release" in line]
    return (release or lines or [f"exit code {done.returncode}"])[0].strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _found(extra: Extra) -> str | None:
    return next((version for package in extra.packages if (version := _version(package))), None)


def _memory_gib() -> float | None:
    try:
        pages = {line.split(":")[0]: line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines()}
    except OSError:
        return None
    return round(int(pages["MemTotal"]) / 2**20, 1)

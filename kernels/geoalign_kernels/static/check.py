"""Compiles every shipped kernel for sm_80 and sm_90 without a GPU and compares what ptxas made of it with a table.

    python -m geoalign_kernels.static [--json FILE] [--update] [--only PART_OF_A_NAME]

A row per kernel, configuration and target. Gates: no spills and no stack frame unless listed; shared memory and
registers within what one block may have; the tensor-core instructions the kernel is built on are there, and ptxas does
not put them in series; no fp64 arithmetic. Under the Triton version the table was made with also: every global access
is 16 bytes wide but for the listed exceptions, and nothing has drifted from the table (``expectations.json``).
``--update`` rewrites the table; its diff is what a reviewer reads. Cycles of the main loop, and the rates that follow
from them: ``loop``.
Needs no GPU and no driver: Triton's wheel carries ptxas and nvdisasm.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from geoalign_kernels.static import loop

EXPECTATIONS = Path(__file__).with_name("expectations.json")
TARGETS = (80, 90)
SHARED_LIMIT = {80: 166_912, 90: 232_448}
REGISTER_FILE = 65_536
MOVED = 0.03
"""A bound further off than this has drifted."""
FIELDS = ("registers", "spill_bytes", "stack_bytes", "shared_bytes", "blocks_per_sm", "global_loads_128",
          "global_loads", "global_stores_128", "global_stores", "mma", "mma_count", "mma_in_series",
          "async_copies", "fp64", "tensor_cycles", "shared_cycles", "issue_cycles", "exp_cycles", "memory_cycles",
          "bound_tflops", "low_tflops", "expected_tflops", "high_tflops")  # fmt: skip
MUST_BE_ZERO = ("fp64", "mma_in_series")
MMA_OPCODES = ("HGMMA", "IGMMA", "QGMMA", "HMMA", "IMMA")
# Drift of these is a finding; register counts and instruction counts inside a few percent are not.
EXACT_FIELDS = ("spill_bytes", "stack_bytes", "global_loads_128", "global_loads", "global_stores_128",
                "global_stores", "mma", "fp64")  # fmt: skip


def compile_row(config: Any, target: int) -> dict[str, Any]:
    """Compiles one ``KernelConfig`` for one target and measures the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = config.source_arguments(target)
    source = ASTSource(fn=config.kernel(), signature=signature, constexprs=constants, attrs=attributes)
    log = io.StringIO()
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), contextlib.redirect_stdout(log):
        # What ptxas says about the very binary that will run: assembling the PTX again would need Triton's own flags,
        # and since 3.9 another of its two assemblers for each target. A cached binary comes without a log.
        triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
        options = config.launch_options(target)
        compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    row = {"kernel": config.kernel_name, "config": config.label, "target": f"sm_{target}"}
    listing = disassemble(compiled.asm["cubin"])
    row |= _measure(log.getvalue(), listing) | loop.columns(listing, target, options["num_warps"], config.flops(target))
    row |= {"shared_bytes": compiled.metadata.shared, "warps": options["num_warps"]}
    row["blocks_per_sm"] = blocks_per_sm(row)
    spill = config.spills.get(f"sm_{target}")
    return row | {
        "expected_mma": config.mma,
        "spill": spill._asdict() if spill else None,
        "narrow": [n._asdict() for n in (*config.narrow, *config.narrow_by_target.get(target, ()))],
        "not_applicable": {f"sm_{missing}": reason for missing, reason in config.not_applicable.items()},
    }


def disassemble(cubin: bytes) -> str:
    """The machine code as text."""
    import triton.backends.nvidia as nvidia

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        command = [Path(nvidia.__file__).parent / "bin" / "nvdisasm", "-c", file]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _measure(log: str, listing: str) -> dict[str, Any]:
    """Numbers of ptxas's log, and instruction counts of the machine code."""
    opcodes = re.findall(r"^\s+(?:/\*[0-9a-f]+\*/)?\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]+)", listing, re.MULTILINE)

    def count(pattern: str) -> int:
        return sum(1 for opcode in opcodes if re.match(pattern, opcode))

    def reported(pattern: str) -> int:
        found = re.search(pattern, log)
        if found is None:
            raise RuntimeError(f"ptxas -v no longer reports '{pattern}':\n{log}")
        return int(found[1])

    mma = [name for name in MMA_OPCODES if count(rf"{name}\.")]
    return {
        "registers": reported(r"Used (\d+) registers"),
        "spill_bytes": reported(r"(\d+) bytes spill stores") + reported(r"(\d+) bytes spill loads"),
        "stack_bytes": reported(r"(\d+) bytes stack"),
        "global_loads_128": count(r"LDG\.(.*\.)?128"),
        "global_loads": count(r"LDG\b"),
        "global_stores_128": count(r"STG\.(.*\.)?128"),
        "global_stores": count(r"STG\b"),
        "mma": "+".join(mma),
        "mma_in_series": len(re.findall(r"wgmma.*serialized", log)),
        "mma_count": sum(count(rf"{name}\.") for name in mma),
        "async_copies": count(r"LDGSTS") + count(r"UTMALDG"),
        "fp64": count(r"D(ADD|MUL|FMA|SETP|MNMX)\b") + count(r"MUFU\.\w*64"),
    }


def blocks_per_sm(row: dict[str, Any]) -> int:
    """Blocks of the row that fit a multiprocessor at once, by registers, shared memory and threads."""
    target, threads = int(row["target"].removeprefix("sm_")), 32 * row["warps"]
    by_registers = REGISTER_FILE // (-(-row["registers"] // 8) * 8 * threads)
    # A block's shared memory is rounded up to 128 bytes and 1 KiB of it is the system's.
    by_shared = (SHARED_LIMIT[target] + 1024) // (-(-row["shared_bytes"] // 128) * 128 + 1024)
    return min(by_registers, by_shared, 2048 // threads, 32)


def violations(row: dict[str, Any]) -> list[str]:
    """What breaks a gate that holds under every Triton version."""
    target = int(row["target"].removeprefix("sm_"))
    found = [f"{field} = {row[field]}, must be 0" for field in MUST_BE_ZERO if row[field]]
    allowed = row["spill"]["bytes"] if row["spill"] else 0
    # Spilled registers lie in the stack frame: a store and a load each.
    found += [
        f"{field} = {row[field]}, at most {allowed} are listed with a reason"
        for field in ("spill_bytes", "stack_bytes")
        if row[field] > allowed
    ]
    if row["shared_bytes"] > SHARED_LIMIT[target]:
        found.append(f"{row['shared_bytes']} bytes of shared memory, a block has {SHARED_LIMIT[target]}")
    if row["registers"] * row["warps"] * 32 > REGISTER_FILE:
        found.append(f"{row['registers']} registers x {row['warps']} warps exceed the register file")
    wanted = row["expected_mma"].get(row["target"], "") if row["expected_mma"] else ""
    if wanted and not set(wanted.split("+")) <= set(row["mma"].split("+")):
        found.append(f"tensor-core instructions '{row['mma']}', expected '{wanted}'")
    return found


def narrow_accesses(row: dict[str, Any]) -> list[str]:
    """Global accesses below 16 bytes beyond the exceptions that the configuration lists with their reasons."""
    found = []
    for kind in ("loads", "stores"):
        narrow = row[f"global_{kind}"] - row[f"global_{kind}_128"]
        listed = sum(exception[kind] for exception in row["narrow"])
        if narrow != listed:
            found.append(f"{narrow} global {kind} below 16 bytes, {listed} are listed with a reason")
    return found


def drift(row: dict[str, Any], table: dict[str, Any]) -> list[str]:
    """How the row differs from the checked-in table of the same Triton version."""
    expected = table["rows"].get(_key(row))
    if expected is None:
        return ["no such row in expectations.json; run with --update and review the diff"]
    found = [f"{f}: {expected[f]} -> {row[f]}" for f in EXACT_FIELDS if expected[f] != row[f]]
    if abs(row["bound_tflops"] - expected["bound_tflops"]) > MOVED * expected["bound_tflops"]:
        found.append(f"bound_tflops: {expected['bound_tflops']} -> {row['bound_tflops']}")
    if abs(row["registers"] - expected["registers"]) > 8:
        found.append(f"registers: {expected['registers']} -> {row['registers']} (more than 8 apart)")
    return found


def _key(row: dict[str, Any]) -> str:
    return f"{row['kernel']} / {row['config']} / {row['target']}"


def check(only: str = "", *, compare: bool = True) -> tuple[list[dict[str, Any]], list[str]]:
    """All rows, and one line per problem; what the table says matters only where it is to be compared."""
    import triton

    from geoalign_kernels.static.configs import CONFIGS

    table = json.loads(EXPECTATIONS.read_text()) if EXPECTATIONS.exists() else {"triton": "", "rows": {}}
    pinned = compare and table["triton"] == triton.__version__
    rows, problems = [], []
    for config in CONFIGS:
        for target in config.targets:
            if only not in f"{config.kernel_name} / {config.label} / sm_{target}":
                continue
            row = compile_row(config, target)
            rows.append(row)
            found = violations(row)
            if pinned:
                found += narrow_accesses(row) + drift(row, table)
            problems += [f"{_key(row)}: {problem}" for problem in found]
    if pinned and not only:
        gone = sorted(set(table["rows"]) - {_key(row) for row in rows})
        problems += [f"{key}: in expectations.json, but no configuration makes it" for key in gone]
    return rows, problems


def _write_table(rows: list[dict[str, Any]]) -> None:
    import triton

    table = {_key(row): {field: row[field] for field in FIELDS} for row in rows}
    text = json.dumps({"triton": triton.__version__, "rows": table}, indent=1) + "\n"
    temporary = EXPECTATIONS.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, EXPECTATIONS)


def _remarks(row: dict[str, Any]) -> list[str]:
    """What is not as one would expect of the kernel and configuration, with the reasons."""
    name = f"{row['kernel']} / {row['config']}"
    narrow = [f"{name}: below 16 bytes: {n['loads']} loads, {n['stores']} stores: {n['reason']}" for n in row["narrow"]]
    if row["spill"] and row["spill_bytes"]:
        narrow.append(f"{name} / {row['target']}: {row['spill_bytes']} bytes spilled: {row['spill']['reason']}")
    return narrow + [f"{name} / {at}: not applicable: {why}" for at, why in row["not_applicable"].items()]


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns 0 if every gate holds, 1 otherwise, 2 in an interpreting process."""
    parser = argparse.ArgumentParser(prog="python -m geoalign_kernels.static", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--update", action="store_true", help="rewrite the expectation table")
    parser.add_argument("--only", default="", help="rows whose 'kernel / config / target' contains this")
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("the static check compiles kernels: run it without TRITON_INTERPRET", file=sys.stderr)
        return 2
    rows, problems = check(options.only, compare=not options.update)
    if options.update and not options.only:
        _write_table(rows)
        problems = [f"{_key(row)}: {problem}" for row in rows for problem in violations(row) + narrow_accesses(row)]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        print(f"{_key(row):66s}", " ".join(f"{field}={row[field]}" for field in FIELDS if row[field] not in (0, "")))
    print("\n".join(sorted({line for row in rows for line in _remarks(row)})))
    for problem in problems:
        print(f"FAILED {problem}", file=sys.stderr)
    print(f"{len(rows)} rows, {len(problems)} problems")
    return 1 if problems else 0

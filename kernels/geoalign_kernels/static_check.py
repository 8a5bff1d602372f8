"""Compiles every shipped kernel for sm_80 and sm_90 without a GPU and compares what ptxas made of it with a table.

    python -m geoalign_kernels.static_check [--json FILE] [--update] [--only PART_OF_A_NAME]

A row per kernel, configuration and target. Gates: no spills; no stack frame; shared memory and registers within what
one block may have; the tensor-core instruction the kernel is built on is there; no fp64 arithmetic; and, under the
Triton version the table was made with, no drift from it (`static_expectations.json`). Under another version only the
gates hold. `--update` rewrites the table; its diff is what a reviewer reads.
Needs triton alone: its wheel carries ptxas and nvdisasm.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

EXPECTATIONS = Path(__file__).with_name("static_expectations.json")
TARGETS = (80, 90)
SHARED_LIMIT = {80: 166_912, 90: 232_448}
REGISTER_FILE = 65_536
FIELDS = ("registers", "spill_bytes", "stack_bytes", "shared_bytes", "global_loads_128", "global_loads",
          "global_stores_128", "global_stores", "mma", "mma_count", "async_copies", "fp64")  # fmt: skip
MMA_OPCODES = ("HGMMA", "IGMMA", "QGMMA", "HMMA", "IMMA")
# Drift of these is a finding; register counts and instruction counts inside a few percent are not.
EXACT_FIELDS = ("spill_bytes", "stack_bytes", "global_loads_128", "global_loads", "global_stores_128",
                "global_stores", "mma", "fp64")  # fmt: skip


def compile_row(config: Any, target: int) -> dict[str, Any]:
    """Compiles one `KernelConfig` for one target and measures the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = config.source_arguments()
    source = ASTSource(fn=config.kernel(), signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=config.options)
    row = {"kernel": config.kernel_name, "config": config.label, "target": f"sm_{target}"}
    return {**row, **_measure(compiled, target), "warps": config.options["num_warps"], "expected_mma": config.mma}


def _measure(compiled: Any, target: int) -> dict[str, Any]:
    import triton.backends.nvidia as nvidia

    tools = Path(nvidia.__file__).parent / "bin"
    arch = "sm_90a" if target == 90 else f"sm_{target}"
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(compiled.asm["ptx"])
        command = [tools / "ptxas", "-v", f"--gpu-name={arch}", ptx, "-o", cubin]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        listing = subprocess.run([tools / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
    opcodes = re.findall(r"^\s+(?:/\*[0-9a-f]+\*/)?\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]+)", listing, re.MULTILINE)

    def count(pattern: str) -> int:
        return sum(1 for opcode in opcodes if re.match(pattern, opcode))

    def reported(pattern: str) -> int:
        found = re.search(pattern, log)
        if found is None:
            raise RuntimeError(f"ptxas -v no longer reports '{pattern}':\n{log}")
        return int(found[1])

    mma = next((name for name in MMA_OPCODES if count(rf"{name}\.")), "")
    return {
        "registers": reported(r"Used (\d+) registers"),
        "spill_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", log))),
        "stack_bytes": reported(r"(\d+) bytes stack"),
        "shared_bytes": compiled.metadata.shared,
        "global_loads_128": count(r"LDG\.(.*\.)?128"),
        "global_loads": count(r"LDG\b"),
        "global_stores_128": count(r"STG\.(.*\.)?128"),
        "global_stores": count(r"STG\b"),
        "mma": "+".join(name for name in MMA_OPCODES if count(rf"{name}\.")),
        "mma_count": count(rf"{mma}\.") if mma else 0,
        "async_copies": count(r"LDGSTS") + count(r"UTMALDG"),
        "fp64": count(r"D(ADD|MUL|FMA|SETP|MNMX)\b") + count(r"MUFU\.\w*64"),
    }


def violations(row: dict[str, Any]) -> list[str]:
    """What breaks a gate that holds under every Triton version."""
    target = int(row["target"].removeprefix("sm_"))
    found = [f"{field} = {row[field]}, must be 0" for field in ("spill_bytes", "stack_bytes", "fp64") if row[field]]
    if row["shared_bytes"] > SHARED_LIMIT[target]:
        found.append(f"{row['shared_bytes']} bytes of shared memory, a block has {SHARED_LIMIT[target]}")
    if row["registers"] * row["warps"] * 32 > REGISTER_FILE:
        found.append(f"{row['registers']} registers x {row['warps']} warps exceed the register file")
    wanted = row["expected_mma"].get(row["target"], "") if row["expected_mma"] else ""
    if wanted and not set(wanted.split("+")) <= set(row["mma"].split("+")):
        found.append(f"tensor-core instructions '{row['mma']}', expected '{wanted}'")
    return found


def drift(row: dict[str, Any], table: dict[str, Any]) -> list[str]:
    """How the row differs from the checked-in table of the same Triton version."""
    expected = table["rows"].get(_key(row))
    if expected is None:
        return ["no such row in static_expectations.json; run with --update and review the diff"]
    found = [f"{f}: {expected[f]} -> {row[f]}" for f in EXACT_FIELDS if expected[f] != row[f]]
    if abs(row["registers"] - expected["registers"]) > 8:
        found.append(f"registers: {expected['registers']} -> {row['registers']} (more than 8 apart)")
    return found


def _key(row: dict[str, Any]) -> str:
    return f"{row['kernel']} / {row['config']} / {row['target']}"


def check(only: str = "") -> tuple[list[dict[str, Any]], list[str]]:
    """All rows, and one line per problem."""
    import triton

    from geoalign_kernels.static_configs import CONFIGS

    table = json.loads(EXPECTATIONS.read_text()) if EXPECTATIONS.exists() else {"triton": "", "rows": {}}
    rows, problems = [], []
    for config in CONFIGS:
        for target in config.targets:
            if only not in f"{config.kernel_name} / {config.label} / sm_{target}":
                continue
            row = compile_row(config, target)
            rows.append(row)
            found = violations(row)
            if table["triton"] == triton.__version__:
                found += drift(row, table)
            problems += [f"{_key(row)}: {problem}" for problem in found]
    return rows, problems


def _write_table(rows: list[dict[str, Any]]) -> None:
    import triton

    table = {_key(row): {field: row[field] for field in FIELDS} for row in rows}
    text = json.dumps({"triton": triton.__version__, "rows": table}, indent=1) + "\n"
    temporary = EXPECTATIONS.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, EXPECTATIONS)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns 0 if every gate holds, 1 otherwise, 2 in an interpreting process."""
    parser = argparse.ArgumentParser(prog="geoalign_kernels.static_check", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--update", action="store_true", help="rewrite the expectation table")
    parser.add_argument("--only", default="", help="rows whose 'kernel / config / target' contains this")
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("static_check compiles kernels: run it without TRITON_INTERPRET", file=sys.stderr)
        return 2
    rows, problems = check(options.only)
    if options.update and not options.only:
        _write_table(rows)
        problems = [f"{_key(row)}: {problem}" for row in rows for problem in violations(row)]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        print(f"{_key(row):66s}", " ".join(f"{field}={row[field]}" for field in FIELDS if row[field] not in (0, "")))
    for problem in problems:
        print(f"FAILED {problem}", file=sys.stderr)
    print(f"{len(rows)} rows, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

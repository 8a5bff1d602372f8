"""Table and roofline of a result file of `make gpu`, or of one benchmark; also of a file that was cut short.

    python profiling/figures.py RESULTS.jsonl [--out FOLDER]

Writes `<name>.md` and `<name>.svg` next to the results. Every number comes from the file: a second run of this script
gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

Row = dict[str, Any]
WIDTH, HEIGHT, MARGIN = 760, 440, 60
COLOURS = {
    "ours": "#c2410c",
    "triton": "#c2410c",
    "int8": "#7c3aed",
    "int8_fp8": "#a21caf",
    "eager": "#64748b",
    "compiled": "#0e7490",
}
OTHER = "#94a3b8"
MISS = 0.25
"""A prediction further off than this is listed."""
CORES = ("sdpa_flash", "sdpa_cudnn", "flash2", "flash3", "flash4", "triton")
"""Exact attention cores; `reference` is not timed at full length."""
INT8_WORTH = 1.15
"""A quantised attention is used where it is this much faster than the best exact core."""
TOKENS = 65_520
"""Tokens of a forward at 81 x 480 x 832, source and target: where the targets hold."""


def load(path: Path) -> list[Row]:
    """The rows of a result file; a last line that was cut off in the middle is left out.

    Raises:
        ValueError: the file does not start with an environment row, or a line before the last is no row.
    """
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: not a row of a result file") from None
    if not rows or rows[0].get("kind") != "environment":
        raise ValueError(f"{path} is not a result file: its first line must be the environment row")
    return rows


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}g}" if value < 1000 else f"{value:.0f}"


def _shape(row: Row) -> str:
    return " x ".join(f"{n:,}" for n in row.get("shape") or [])


def _table(header: list[str], lines: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines)]


def _of(row: Row) -> tuple[Any, ...]:
    """What the rows of one comparison share."""
    return row["name"], row["variant"], row["direction"], tuple(row["shape"]), row["dtype"]


def markdown(rows: list[Row]) -> str:
    """The report: environment, ceilings, targets, kernels, stages, failures, missed predictions, what was not run."""
    environment, kernels = rows[0], [row for row in rows if row["kind"] == "kernel"]
    timed = [row for row in kernels if row["status"] == "ok"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    commit = environment["commit"] + (" with uncommitted changes" if environment["dirty"] else "")
    text = [
        f"# Measured on {environment['device']}",
        "",
        f"Commit {commit}; {versions}; CUDA {environment['cuda']}; `{environment['command']}`.",
        *unsteady(rows),
        "## Ceilings",
        "",
    ]
    ceilings = [row for row in rows if row["kind"] == "ceiling"]
    text += _table(
        ["name", "shape", "when", "ms", "GB/s", "TFLOP/s"],
        [[r["name"], _shape(r), r["impl"], _number(r["t_ms_median"], 4), _number(r["gbps"]), _number(r["tflops"])]
         for r in ceilings],
    )  # fmt: skip
    if timed:
        text += [
            "",
            f"## Targets, on {environment['device']}",
            "",
            *_table(["target", "bound", "measured", ""], targets(timed)),
        ]
        text += ["", "## Kernels", "", *_kernel_table(timed)]
    models = [row for row in rows if row["kind"] == "reward" and row["status"] == "ok"]
    if models:
        text += ["", "## Reward models", "", *_models(models)]
    phases = [row for row in rows if row["kind"] in ("phase", "iteration")]
    if phases:
        text += ["", "## One iteration at reduced depth", "", *_iterations(phases)]
    stages = [row for row in rows if row["kind"] == "stage"]
    if stages:
        text += ["", "## Stages", "", *_table(["stage", "", ""], [[r["name"], r["status"], r["note"]] for r in stages])]
    broken = [row for row in rows[1:] if row.get("status") == "failed" and row["kind"] != "stage"]
    text += ["", "## Failed", ""]
    text += [f"- {_title(r)}: {r['note']}" for r in broken] or ["nothing"]
    text += ["", "## Predictions missed by more than 25 %", ""]
    missed = [
        r
        for r in timed + models + phases
        if r["predicted_ms"] and abs(r["t_ms_median"] / r["predicted_ms"] - 1.0) > MISS
    ]
    text += [
        f"- {_title(r)}: {r['t_ms_median'] / r['predicted_ms']:.2f} of the prediction" for r in missed
    ] or ["none"]  # fmt: skip
    absent = sorted({(r["impl"], r["name"], r["direction"], r["note"]) for r in kernels if r["status"] == "not run"})
    text += ["", "## Not run", ""]
    text += [f"- {impl}, {name} {direction}: {note}" for impl, name, direction, note in absent]
    tests = [row for row in rows if row["kind"] == "test" and row["status"] == "not run"]
    reasons = sorted({row["note"] for row in tests})
    text += [f"- {sum(row['note'] == reason for row in tests)} tests: {reason}" for reason in reasons]
    if text[-1] == "":
        text.append("nothing")
    return "\n".join(text) + "\n"


def quotable(row: Row, environment: Row) -> bool:
    """Whether the ceilings around a row were steady: those of its stage, where the run had stages."""
    return bool(row.get("steady", environment["steady"]))


def unsteady(rows: list[Row]) -> list[str]:
    """What is not to be quoted; an empty line where everything is."""
    why = "a ceiling moved by more than 3 %, or is missing"
    stages = [row["name"] for row in rows if row["kind"] == "stage" and "steady" in row and not row["steady"]]
    if stages:
        return [f"\n**Unsteady: {', '.join(stages)} ({why}). Do not quote their rows.**"]
    return [""] if rows[0]["steady"] else [f"\n**Unsteady: {why}. Do not quote.**"]


def _title(row: Row) -> str:
    parts = (row["name"], row.get("variant"), row.get("direction"), _shape(row))
    return " ".join(filter(None, parts)) + (f", {row['impl']}" if row.get("impl") else "")


def _kernel_table(timed: list[Row]) -> list[str]:
    """Every timed row; the last column divides by our own row, or by the plain product where there is none."""
    ours = {_of(r): r["t_ms_median"] for r in timed if r["impl"] == "ours"}
    plain = {(r["name"], tuple(r["shape"])): r["t_ms_median"] for r in timed if r["variant"] == "plain"}
    header = ["op", "direction", "shape", "implementation", "ms", "p20-p80", "GB/s", "% copy", "TFLOP/s", "% matmul",
              "rel. error", "launches", "registers", "predicted ms", "time over ours or plain", "version",
              "level"]  # fmt: skip
    lines = []
    for r in timed:
        base = ours.get(_of(r)) or plain.get((r["name"], tuple(r["shape"])))
        lines.append([
            f"{r['name']} {r['variant']}".strip(), r["direction"], _shape(r), r["impl"], _number(r["t_ms_median"], 4),
            f"{_number(r['t_ms_p20'], 4)}-{_number(r['t_ms_p80'], 4)}", _number(r["gbps"]), _number(r["pct_copy"]),
            _number(r["tflops"]), _number(r["pct_matmul"]), "-" if r["rel_l2"] is None else f"{r['rel_l2']:.1e}",
            _number(r["launches"]), _number(r["regs"]), _number(r["predicted_ms"], 4),
            "-" if base is None else f"{r['t_ms_median'] / base:.2f}", r.get("version") or "-", r.get("level") or "-",
        ])  # fmt: skip
    return _table(header, lines)


def targets(timed: list[Row]) -> list[list[str]]:
    """(what, bound, measured, verdict) of the bounds that the kernels were built to, at 65,520 tokens."""
    at = {(r["name"], r["variant"], r["direction"], r["impl"]): r for r in timed if r["shape"][0] == TOKENS}
    lines = []

    def line(what: str, bound: float, value: float | None, *, below: bool = False) -> None:
        met = value is not None and (value <= bound if below else value >= bound)
        verdict = "not measured" if value is None else "met" if met else "missed"
        lines.append([what, f"{'<=' if below else '>='} {bound:g}", _number(value), verdict])

    def ratio(other: str, own: str, name: str = "attention") -> float | None:
        """Time of `other` over that of `own`."""
        rows = at.get((name, "", "fwd", other)), at.get((name, "", "fwd", own))
        return rows[0]["t_ms_median"] / rows[1]["t_ms_median"] if rows[0] and rows[1] else None

    for name, variant, direction, impl in at:
        if impl == "ours":
            what = f"{name} {variant}".strip() + f" {direction}, % of the copy ceiling"
            line(what, 85.0, at[name, variant, direction, impl]["pct_copy"])
    line("qk_norm_rotary over the published formulation", 8.0, ratio("eager", "ours", "qk_norm_rotary"))
    line("qk_norm_rotary over the compiled rewrite", 1.3, ratio("compiled", "ours", "qk_norm_rotary"))
    best = min((core for core in CORES if ("attention", "", "fwd", core) in at), default=CORES[0],
               key=lambda core: at["attention", "", "fwd", core]["t_ms_median"])  # fmt: skip
    for mode in ("int8", "int8_fp8"):
        named = f"{mode} attention over the best exact core" + (f" ({best})" if ratio(best, mode) else "")
        line(named, INT8_WORTH, ratio(best, mode))
    quantised = at.get(("attention", "", "fwd", "int8"))
    line("int8 attention, relative error", 2e-2, quantised["rel_l2"] if quantised else None, below=True)
    line("exact Triton attention, time over SDPA-flash", 1.15, ratio("triton", "sdpa_flash"), below=True)
    return lines


def _iterations(rows: list[Row]) -> list[str]:
    """Every phase in a line, the runs side by side; then what was said of extrapolated times and gradients."""
    runs = list(dict.fromkeys((r["impl"], r["variant"]) for r in rows if r["impl"] != "line" and r["t_ms_median"]))
    at = {(r["name"], r["impl"], r["variant"]): r for r in rows}
    lines = []
    for name in dict.fromkeys(row["name"] for row in rows if row["name"] != "gradient"):
        found = [at.get((name, *run)) for run in runs]
        lines.append([name, *("" if r is None else _number(r["t_ms_median"], 4) for r in found)])
    peaks = [at.get(("iteration", *run)) for run in runs]
    lines.append(["peak memory, GB", *("" if r is None else _number(1e-9 * r["peak_mem_bytes"]) for r in peaks)])
    said = [
        f"- {r['name']}, {r['variant']}: {_number(r['t_ms_median'], 4)} ms; {r['note']}"
        for r in rows
        if r["impl"] == "line"
    ]
    said += [f"- gradient: relative error {r['rel_l2']:.1e}, {r['note']}" for r in rows if r["name"] == "gradient"]
    return [*_table(["ms", *(f"{impl}, {variant}" for impl, variant in runs)], lines), "", *said]


def _models(rows: list[Row]) -> list[str]:
    """Reward models by shape: eager and graph, size, time, memory, and whether a replay equals eager bit for bit."""
    header = ["model", "input", "run as", "parameters", "ms", "p20-p80", "predicted ms", "TFLOP/s", "% matmul",
              "weights GB", "peak GB", "launches", "bitwise equal"]  # fmt: skip
    lines = []
    for r in rows:
        lines.append([
            r["name"], _shape(r), r["impl"], f"{r['parameters']:,}" if r.get("parameters") else "-",
            _number(r["t_ms_median"], 4), f"{_number(r['t_ms_p20'], 4)}-{_number(r['t_ms_p80'], 4)}",
            _number(r["predicted_ms"], 4), _number(r["tflops"]), _number(r["pct_matmul"]),
            _number(1e-9 * r["weight_bytes"]), _number(1e-9 * r["peak_mem_bytes"] if r["peak_mem_bytes"] else None),
            _number(r["launches"]), "yes" if r["bitwise_equal"] else "**no**",
        ])  # fmt: skip
    return _table(header, lines)


def roofline(rows: list[Row]) -> str:
    """SVG: achieved GFLOP/s or GB/s-equivalents over arithmetic intensity under the two ceilings of the run.

    Streaming ops carry no FLOP count: they stand at the left edge as a share of the copy ceiling. Empty where the file
    ends before its ceilings.
    """
    first = {row["name"]: row for row in reversed(rows) if row["kind"] == "ceiling" and row["impl"] == "first"}
    if not {"copy", "matmul"} <= set(first):
        return ""
    copy, matmul = first["copy"]["gbps"], 1e3 * first["matmul"]["tflops"]
    points = []
    for row in rows:
        if row["kind"] != "kernel" or row["status"] != "ok" or not (row["bytes_min"] and row["gbps"]):
            continue
        intensity = row["flops"] / row["bytes_min"] if row["flops"] else 1.0
        points.append((intensity, intensity * row["gbps"], row))
    xs = [x for x, _, _ in points] + [0.5, 4.0 * matmul / copy]
    ys = [y for _, y, _ in points] + [matmul, 0.5 * copy]
    x_low, x_high = math.log10(min(xs)), math.log10(max(xs) * 1.5)
    y_low, y_high = math.log10(max(min(ys), 1e-9) * 0.7), math.log10(max(ys) * 1.5)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - x_low) / (x_high - x_low)
        up = (math.log10(max(y, 1e-9)) - y_low) / (y_high - y_low)
        return MARGIN + across * (WIDTH - 2 * MARGIN), HEIGHT - MARGIN - up * (HEIGHT - 2 * MARGIN)

    roof = [(10**x_low, copy * 10**x_low), (matmul / copy, matmul), (10**x_high, matmul)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*p) for p in roof))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="11"><rect width="100%" height="100%" fill="white"/>',
        f'<polyline points="{path}" fill="none" stroke="#0f172a" stroke-width="1.5"/>',
        f'<text x="{MARGIN}" y="20">{_escape(rows[0]["device"])}: copy {copy:.3g} GB/s, matrix product '
        f"{matmul / 1e3:.3g} TFLOP/s (this run)</text>",
        f'<text x="{WIDTH / 2:.0f}" y="{HEIGHT - 15}" text-anchor="middle">FLOP per byte that must move '
        "(streaming ops at 1)</text>",
        f'<text x="15" y="{HEIGHT / 2:.0f}" text-anchor="middle" transform="rotate(-90 15 {HEIGHT / 2:.0f})">'
        "GFLOP/s</text>",
    ]
    for x, y, row in points:
        cx, cy = place(x, y)
        title = f"{_title(row)}: {row['t_ms_median']:.4g} ms"
        colour = COLOURS.get(row["impl"], OTHER)
        parts.append(
            f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="4" fill="{colour}"><title>{_escape(title)}</title></circle>'
        )
    for place_in_legend, (name, colour) in enumerate({**COLOURS, "other": OTHER}.items()):
        y = 40 + 15 * place_in_legend
        parts.append(f'<circle cx="{MARGIN + 8}" cy="{y}" r="4" fill="{colour}"/><text x="{MARGIN + 18}" y="{y + 4}">')
        parts.append(f"{name}</text>")
    return "\n".join([*parts, "</svg>"]) + "\n"


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def main() -> int:
    """Entry point; 2 if the file is not a result file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, help="folder of the report (default: that of the results)")
    options = parser.parse_args()
    try:
        rows = load(options.results)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    folder = options.out or options.results.parent
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / f"{options.results.stem}.md", markdown(rows))
    drawing = roofline(rows)
    if drawing:
        _write(folder / f"{options.results.stem}.svg", drawing)
    print(
        f"wrote {folder / options.results.stem}.md" + (" and .svg" if drawing else "; no ceilings, hence no roofline")
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""One table of a trace: spans, the kernels under them, launches, gaps, and all of it against the cost model.

    python profiling/trace.py TRACE.json[.gz] [--work FILE.work.json]        of `geoalign train --profile N`
    python profiling/trace.py REPORT.sqlite   [--work FILE.work.json]        nsys export --type sqlite REPORT.nsys-rep

Any machine; a trace of a CPU run shows operators in place of kernels. A kernel belongs to the innermost span that was
open on its thread when it was launched, or, launched by the autograd engine's thread, on any thread. `busy` is the time
in which some kernel of the span ran, `gaps` the idle time between them. `--work` (default: beside the trace) holds what
the cost model expects of every phase. Traced FLOPs are those of the products and attentions whose shapes the trace has:
a graph's replay has none, and then MFU is that of the expected ones, in brackets. Traced bytes are those of copies and
fills alone, because a trace does not say what a kernel moved.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import re
import sqlite3
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

DOMAIN = "geoalign"
ROOTS = ("data", "rollout", "reward", "scoring", "advantage", "update", "sync", "eval")
"""First parts of the names of our spans."""
PUSH_POP, DOMAIN_CREATE = 59, 75
"""Event types of NVTX_EVENTS in an nsys export."""
WORST = 10


class Span(NamedTuple):
    """A named stretch of one thread, in microseconds."""

    name: str
    start: float
    end: float
    thread: Any


class Kernel(NamedTuple):
    """A piece of work, in microseconds; `launched` is when its thread asked for it."""

    name: str
    start: float
    end: float
    launched: float
    thread: Any
    flops: float = 0.0
    copied: float = 0.0


@dataclass
class Node:
    """What belongs to all spans of one name, the spans inside them included."""

    calls: int = 0
    wall: float = 0.0
    kernels: list[Kernel] = field(default_factory=list)
    names: Counter[str] = field(default_factory=Counter)


def load(path: Path) -> tuple[list[Span], list[Kernel]]:
    """Spans and kernels of a torch trace or an nsys export.

    Raises:
        ValueError: it is neither.
    """
    head = path.read_bytes()[:16]
    if head.startswith(b"SQLite format 3"):
        return from_nsys(path)
    try:
        text = gzip.decompress(path.read_bytes()) if head.startswith(b"\x1f\x8b") else path.read_bytes()
        events = json.loads(text)["traceEvents"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{path}: neither a torch trace nor an nsys export (nsys export --type sqlite)") from error
    return from_torch(events)


def from_torch(events: Iterable[Mapping[str, Any]]) -> tuple[list[Span], list[Kernel]]:
    """Of the events of a torch-profiler trace; leaf operators stand for kernels where no device ran any."""
    complete = [event for event in events if event.get("ph") == "X" and "ts" in event]
    spans, device, launches, operators = [], [], {}, []
    for event in complete:
        kind, start = event.get("cat", ""), float(event["ts"])
        end, arguments = start + float(event.get("dur", 0.0)), event.get("args", {})
        if kind == "user_annotation" and event["name"].partition("/")[0] in ROOTS:
            spans.append(Span(event["name"], start, end, event["tid"]))
        elif kind in ("kernel", "gpu_memcpy", "gpu_memset"):
            copied = 0.0 if kind == "kernel" else float(arguments.get("bytes", 0.0))
            device.append((event["name"], start, end, arguments.get("correlation"), copied))
        elif kind in ("cuda_runtime", "cuda_driver"):
            launches[arguments.get("correlation")] = (start, event["tid"])
        elif kind == "cpu_op":
            operators.append(Kernel(event["name"], start, end, start, event["tid"], flops_of(event["name"], arguments)))
    if not device:
        return spans, leaves(operators)
    kernels = [
        Kernel(name, start, end, *launches.get(key, (start, None)), copied=copied)
        for name, start, end, key, copied in device
    ]
    # FLOPs are known of operators only: they count where the operator ran, as work of no duration.
    kernels += [k._replace(end=k.start) for k in leaves(operators) if k.flops]
    return spans, kernels


def leaves(operators: Iterable[Kernel]) -> list[Kernel]:
    """Operators that are not inside another counted one: attention is one operator, whatever it calls."""
    found: list[Kernel] = []
    inside: dict[Any, list[Kernel]] = defaultdict(list)
    for operator in sorted(operators, key=lambda k: (k.start, -k.end)):
        stack = inside[operator.thread]
        while stack and stack[-1].end <= operator.start:
            found.append(stack.pop())
        if stack and stack[-1].flops:
            continue  # part of an operator whose work is known
        if stack:
            stack.pop()  # its parts are listed in its place
        stack.append(operator)
    return found + [operator for stack in inside.values() for operator in stack]


def flops_of(name: str, arguments: Mapping[str, Any]) -> float:
    """FLOPs of a product or an attention by the shapes of its inputs; 0 for everything else."""
    dims = [shape for shape in arguments.get("Input Dims", []) if shape]
    plain = name.rpartition("::")[2]
    if plain in ("mm", "addmm", "bmm", "baddbmm", "_addmm_activation", "_int_mm") and len(dims) >= 2:
        left, right = dims[-2:] if plain in ("addmm", "baddbmm", "_addmm_activation") and len(dims) > 2 else dims[:2]
        return 2.0 * math.prod(left) * right[-1]
    ours = name.startswith("geoalign::attention")  # [B, N, H, hd]; torch's, which reads the text, has [B, H, N, hd]
    if (ours or "scaled_dot_product" in plain) and len(dims) >= 3:
        q, k = dims[1:3] if plain.endswith("_backward") else dims[:2]
        forward = 4.0 * math.prod(q) * k[1 if ours else 2]
        return 2.5 * forward if plain.endswith("_backward") else forward
    return 0.0


def from_nsys(path: Path) -> tuple[list[Span], list[Kernel]]:
    """Of the sqlite file that `nsys export` writes: ranges of our NVTX domain, kernels and copies by their launch."""
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as base:
        tables = {row[0] for row in base.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        strings = dict(base.execute("SELECT id, value FROM StringIds"))
        spans: list[Span] = []
        if "NVTX_EVENTS" in tables:
            events = base.execute("SELECT start, end, eventType, text, textId, globalTid, domainId FROM NVTX_EVENTS")
            rows = [(*row[:3], row[3] or strings.get(row[4], ""), *row[5:]) for row in events]
            ours = {domain for _, _, kind, text, _, domain in rows if kind == DOMAIN_CREATE and text == DOMAIN}
            spans = [Span(text, start / 1e3, end / 1e3, thread) for start, end, kind, text, thread, domain in rows
                     if kind == PUSH_POP and domain in ours and end is not None]  # fmt: skip
        launches: dict[int, tuple[float, Any]] = {}
        if "CUPTI_ACTIVITY_KIND_RUNTIME" in tables:
            query = "SELECT correlationId, start, globalTid FROM CUPTI_ACTIVITY_KIND_RUNTIME"
            launches = {key: (start / 1e3, thread) for key, start, thread in base.execute(query)}
        kernels: list[Kernel] = []

        def add(name: str, start: int, end: int, key: int, copied: float = 0.0) -> None:
            launched = launches.get(key, (start / 1e3, None))
            kernels.append(Kernel(name, start / 1e3, end / 1e3, *launched, copied=copied))

        if "CUPTI_ACTIVITY_KIND_KERNEL" in tables:
            query = "SELECT shortName, start, end, correlationId FROM CUPTI_ACTIVITY_KIND_KERNEL"
            for key, *times in base.execute(query):
                add(strings.get(key, str(key)), *times)
        for kind in ("MEMCPY", "MEMSET"):
            if f"CUPTI_ACTIVITY_KIND_{kind}" in tables:
                for row in base.execute(f"SELECT start, end, correlationId, bytes FROM CUPTI_ACTIVITY_KIND_{kind}"):
                    add(kind.lower(), *row)
    return spans, kernels


def tree(spans: list[Span], kernels: list[Kernel]) -> dict[str, Node]:
    """What belongs to every span name, in the order of their first start; kernels outside of all under ``(none)``."""
    nodes: dict[str, Node] = {}
    for span in sorted(spans, key=lambda s: (s.start, -s.end)):
        node = nodes.setdefault(span.name, Node())
        node.calls += 1
        node.wall += span.end - span.start
    waiting, now_open = sorted(spans, key=lambda s: -s.start), list[Span]()
    for kernel in sorted(kernels, key=lambda k: k.launched):
        while waiting and waiting[-1].start <= kernel.launched:
            now_open.append(waiting.pop())
        now_open = [s for s in now_open if s.end >= kernel.launched]
        mine = [s for s in now_open if s.thread == kernel.thread] or now_open
        for name in dict.fromkeys(s.name for s in mine) or ["(none)"]:
            node = nodes.setdefault(name, Node())
            node.kernels.append(kernel)
            node.names[short(kernel.name)] += int(kernel.end > kernel.start)
    return nodes


def short(name: str) -> str:
    """A kernel's name without its template and argument lists."""
    plain = re.sub(r"^void ", "", name)
    return re.split(r"[<(]", plain)[0][:60] or plain[:60]


def busy_and_gaps(kernels: list[Kernel]) -> tuple[float, float]:
    """(microseconds in which something ran, idle ones between the first start and the last end)."""
    intervals = sorted((k.start, k.end) for k in kernels if k.end > k.start)
    if not intervals:
        return 0.0, 0.0
    busy, reach = 0.0, intervals[0][0]
    for start, end in intervals:
        busy += max(0.0, end - max(start, reach))
        reach = max(reach, end)
    return busy, reach - intervals[0][0] - busy


def rows(nodes: Mapping[str, Node], work: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per span name: seconds, launches, gaps, and FLOPs, bytes and seconds as traced and as predicted.

    MFU is that of the traced FLOPs; where the trace has none, ``mfu_predicted`` is that of the predicted ones.
    """
    expected, peak = work.get("phases", {}), work.get("peak_flops")
    found = []
    for name, node in nodes.items():
        busy, gaps = busy_and_gaps(node.kernels)
        phase = expected.get(name, {})
        flops, expects = sum(k.flops for k in node.kernels), phase.get("flops")
        seconds, full = 1e-6 * busy, 1e-6 * busy * (peak or 0.0)
        time_by: Counter[str] = Counter()
        for kernel in node.kernels:
            time_by[short(kernel.name)] += kernel.end - kernel.start
        found.append({
            "span": name, "calls": node.calls, "wall_s": 1e-6 * node.wall, "busy_s": seconds, "gaps_s": 1e-6 * gaps,
            "launches": sum(node.names.values()), "tflop": flops / 1e12 if flops else None,
            "predicted_tflop": expects / 1e12 if expects else None,
            "copied_gb": sum(k.copied for k in node.kernels) / 1e9, "predicted_gb": phase.get("bytes", 0.0) / 1e9,
            "mfu": flops / full if full and flops else None,
            "mfu_predicted": expects / full if full and expects and not flops else None,
            "predicted_s": phase.get("seconds"), "top": time_by.most_common(3),
        })  # fmt: skip
    return found


def disagreements(found: list[dict[str, Any]]) -> list[tuple[str, float, float, str]]:
    """(span, found over predicted, predicted, unit) of the seconds and FLOPs furthest off, by the factor either way."""
    pairs = (("busy_s", "predicted_s", "s"), ("tflop", "predicted_tflop", "TFLOP"))
    known = [(row["span"], row[own] / row[wanted], row[wanted], unit)
             for row in found for own, wanted, unit in pairs if row[own] and row[wanted]]  # fmt: skip
    return sorted(known, key=lambda item: -abs(math.log(item[1])))[:WORST]


def markdown(found: list[dict[str, Any]], work: Mapping[str, Any]) -> str:
    """The report."""
    text = [f"# Trace on {work.get('device', 'an unnamed device')}, attention core {work.get('core', 'not known')}", ""]
    header = [
        "span",
        "calls",
        "wall s",
        "busy s",
        "gaps s",
        "launches",
        "predicted s",
        "TFLOP",
        "predicted TFLOP",
        "MFU",
        "copied GB",
        "predicted GB of passes",
        "most time in",
    ]
    text += [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header))]
    for row in found:
        label = "&nbsp;&nbsp;" * row["span"].count("/") + row["span"]
        top = ", ".join(f"{name} {1e-6 * spent:.3g} s" for name, spent in row["top"])
        mfu = "-" if row["mfu"] is None else f"{100 * row['mfu']:.0f} %"
        mfu = f"({100 * row['mfu_predicted']:.0f} %)" if row["mfu_predicted"] is not None else mfu
        cells = [label, str(row["calls"]), *(_number(row[key]) for key in ("wall_s", "busy_s", "gaps_s")),
                 str(row["launches"]), *(_number(row[key]) for key in ("predicted_s", "tflop", "predicted_tflop")),
                 mfu, _number(row["copied_gb"]), _number(row["predicted_gb"]), top]  # fmt: skip
        text.append(f"| {' | '.join(cells)} |")
    text += ["", "## Furthest from the prediction", ""]
    far = disagreements(found)
    text += [f"- {span}: {ratio:.2f} of the predicted {_number(value)} {unit}" for span, ratio, value, unit in far]
    if not far:
        text.append("nothing was predicted")
    return "\n".join(text) + "\n"


def _number(value: float | None) -> str:
    return "-" if not value else f"{value:.3g}"


def main() -> int:
    """Entry point; 2 for a file that is no trace."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("--work", type=Path, help="what the cost model expects (default: beside the trace)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    beside = options.trace.with_name(options.trace.name.partition(".")[0] + ".work.json")
    path = options.work or beside
    try:
        work = json.loads(path.read_text()) if options.work or path.exists() else {}
        found = rows(tree(*load(options.trace)), work)
    except (OSError, ValueError, sqlite3.Error) as error:
        print(error, file=sys.stderr)
        return 2
    print(markdown(found, work), end="")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

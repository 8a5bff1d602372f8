"""What one iteration of a kernel's main loop costs a multiprocessor, read from its machine code.

Four units work beside one another, and the busiest one bounds the kernel: tensor cores, shared memory, the schedulers'
issue slots, the exponential unit. On sm_90 a product runs while its warp goes on, but a warp that waits for it before
its softmax adds the two up: ``hidden`` cycles of softmax are those between a product's issue and the wait for it. A
kernel without products streams rows: its issue slots stand against its bytes.
Not modelled: latencies, bank conflicts, barriers between warps, L2, the first and last blocks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import NamedTuple

from geoalign_kernels.static.rates import EXPONENTIALS, RATES, SCHEDULERS, SHARED_BYTES

_INSTRUCTION = re.compile(r"^\s+(?:/\*[0-9a-f]+\*/)?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]+)\s*([^;]*)")
_GLOBAL = re.compile(r"(LDG|STG)\b")
_LABEL = re.compile(r"^(\.L\w+):")
_PRODUCT = re.compile(r"(HMMA|IMMA|HGMMA|IGMMA|QGMMA)\.(?:SP\.)?(\d+)x?(\d*)x?(\d*)")
LANES = 32


class Instruction(NamedTuple):
    """One line of a listing."""

    opcode: str
    operands: str


@dataclass(frozen=True, slots=True)
class Iteration:
    """Cycles of one multiprocessor for one iteration of every warp of one block.

    Attributes:
        tensor, shared, issue, exponential: of each unit.
        memory: of this multiprocessor's share of the card's memory bandwidth.
        hidden: of the softmax, while products run (see the module).
        asynchronous: whether products run beside their own warp.
    """

    tensor: float
    shared: float
    issue: float
    exponential: float
    memory: float
    hidden: float
    asynchronous: bool

    @property
    def bound(self) -> float:
        """Cycles that no schedule goes below."""
        return max(self.tensor, self.shared, self.issue, self.exponential)

    @property
    def modelled(self) -> float:
        """The bound, or where warps wait for products the sum of products and softmax that is not hidden."""
        serial = self.tensor + max(self.issue, self.exponential) - self.hidden
        return max(self.bound, serial if self.asynchronous else 0.0)


def main_loop(listing: str) -> list[Instruction]:
    """Instructions of the innermost loop that does most of the work; without a loop, all of the kernel.

    Work is counted in tensor-core instructions, in a kernel without them in accesses to global memory.
    """
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    loops: list[list[Instruction]] = []
    for line in listing.splitlines():
        label = _LABEL.match(line.strip())
        if label:
            labels[label[1]] = len(code)
            continue
        found = _INSTRUCTION.match(line)
        if not found:
            continue
        code.append(Instruction(found[1], found[2]))
        target = re.search(r"`\((\.L\w+)\)", found[2]) if found[1].startswith("BRA") else None
        if target and target[1] in labels:
            loops.append(code[labels[target[1]] :])
    work = _PRODUCT if any(_PRODUCT.match(instruction.opcode) for instruction in code) else _GLOBAL

    def weight(body: list[Instruction]) -> int:
        return sum(1 for instruction in body if work.match(instruction.opcode))

    best = max(loops, key=weight, default=code)
    return best if weight(best) else code


def iteration(body: list[Instruction], target: int, warps: int) -> Iteration:
    """Cycles of one iteration of a main loop on one multiprocessor.

    Args:
        body: see ``main_loop``.
        target: 80 or 90.
        warps: of a block.
    """
    rates, slots = RATES[target], warps / SCHEDULERS
    moved = sum(_width(opcode) for opcode, _ in body if _GLOBAL.match(opcode)) * warps * LANES
    share = rates.bandwidth / rates.multiprocessors / rates.clock_hz
    return Iteration(
        tensor=sum(_tensor_cycles(opcode, target, warps) for opcode, _ in body),
        shared=sum(_shared_bytes(*instruction, warps) for instruction in body) / SHARED_BYTES,
        issue=len(body) * slots,
        exponential=sum(opcode.startswith("MUFU.EX2") for opcode, _ in body) * warps * LANES / EXPONENTIALS,
        memory=moved / share,
        hidden=_hidden(body, target, warps) if rates.asynchronous else 0.0,
        asynchronous=rates.asynchronous,
    )


def _hidden(body: list[Instruction], target: int, warps: int) -> float:
    """Cycles of softmax between products and the wait for them."""
    hidden, flying, began = 0.0, 0.0, 0
    for position, (opcode, _) in enumerate(body):
        cycles = _tensor_cycles(opcode, target, warps)
        began = position if cycles and not flying else began
        flying += cycles
        if opcode.startswith("WARPGROUP.DEPBAR"):
            between = [other for other, _ in body[began:position] if not _PRODUCT.match(other)]
            if any(other.startswith("MUFU.EX2") for other in between):
                hidden += min(flying, len(between) * warps / SCHEDULERS)
            flying = 0.0
    return hidden


def columns(listing: str, target: int, warps: int, flops: float) -> dict[str, float]:
    """The columns of the static table: cycles of the main loop, and what they mean for ``flops`` of one iteration.

    The low end of what is expected has no softmax hidden behind products.
    """
    found = iteration(main_loop(listing), target, warps)
    per_cycle = RATES[target].multiprocessors * RATES[target].clock_hz * flops / 1e12
    achieved = RATES[target].achieved
    return {
        "tensor_cycles": round(found.tensor),
        "shared_cycles": round(found.shared),
        "issue_cycles": round(found.issue),
        "exp_cycles": round(found.exponential),
        "memory_cycles": round(found.memory),
        "bound_tflops": round(per_cycle / found.bound),
        "low_tflops": round(achieved.low * per_cycle / replace(found, hidden=0.0).modelled),
        "expected_tflops": round(achieved.expected * per_cycle / found.modelled),
        "high_tflops": round(achieved.high * per_cycle / found.modelled),
    }


def _tensor_cycles(opcode: str, target: int, warps: int) -> float:
    found = _PRODUCT.match(opcode)
    if not found:
        return 0.0
    kind, *sizes = found.groups()
    if kind in ("HMMA", "IMMA"):  # 16816: m16 n8 k16; one a warp
        digits = re.fullmatch(r"(16|8)(8|16)(4|8|16|32|64)", "".join(sizes))
        assert digits is not None, opcode
        m, n, k = (int(part) for part in digits.groups())
        issues = warps
    else:  # 64 x n x k; one a group of four warps
        m, n, k = (int(part) for part in sizes)
        issues = warps // 4
    rate = RATES[target].products16 if kind in ("HMMA", "HGMMA") else RATES[target].products8
    return issues * m * n * k / rate


def _shared_bytes(opcode: str, operands: str, warps: int) -> int:
    """Bytes that all warps of a block move through shared memory by one instruction."""
    if opcode.startswith("LDSM"):
        return warps * 128 * int((re.search(r"\.([124])$", opcode) or [0, 1])[1])
    if opcode.startswith(("LDS", "STS", "LDGSTS")):
        return warps * LANES * _width(opcode)
    found = _PRODUCT.match(opcode)
    if found and found[1] in ("HGMMA", "IGMMA", "QGMMA"):
        m, n, k = (int(part) for part in found.groups()[1:])
        size = 2 if found[1] == "HGMMA" else 1
        sources = operands.split(",")[1:2]
        first = m * k * size if sources and "gdesc" in sources[0] else 0
        return warps // 4 * (first + n * k * size)
    return 0


def _width(opcode: str) -> int:
    """Bytes a lane of a load or store."""
    found = re.search(r"\.[US]?(8|16|32|64|128)\b", opcode)
    return int(found[1]) // 8 if found else 4

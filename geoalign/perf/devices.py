"""Rates of accelerators, each with where it comes from: measured here, published for that kernel, modelled, assumed.

Rates of our own attention kernels are read from the static table of ``geoalign_kernels``, which models them from their
machine code; a result file of ``make gpu`` replaces what it measured (``DeviceProfile.measured``).
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

Kind = Literal["measured here", "published", "modelled", "assumed"]
CERTAINTY: tuple[Kind, ...] = ("measured here", "published", "modelled", "assumed")
"""From the best to the least founded."""
INT8_WORTH = 1.15
"""An approximate attention has to be this much faster than the exact one to be used."""
_TERA, _GIGA = 1e12, 1e9
_TOKENS = 65_520
"""Length at which a measured attention replaces a rate."""


class Expected(NamedTuple):
    """FLOP/s that a kernel of ours is expected at, and the ends of the range around it."""

    rate: float
    low: float
    high: float


class CoreRate(NamedTuple):
    """FLOP/s of an exact attention core at head dimension 128, long sequences, not causal."""

    forward: float
    backward: float
    kind: Kind
    expected: Expected | None = None


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """Achieved rates of one accelerator: FLOP/s unless said otherwise.

    Attributes:
        target: of the compiler, 80 or 90.
        core: the exact attention core whose rates these are.
        peak: dense bf16, data sheet.
        attention, attention_backward: of that core.
        attention_int8, attention_int8_fp8: quantised modes, equivalent FLOP/s; None where the mode does not exist.
        matmul, matmul_int8: large products, bf16 and W8A8 including the quantisation of activations.
        convolution: causal 3-D convolutions of the video autoencoder.
        reward: transformers of the reward models.
        bandwidth: streaming, bytes per second.
        kinds: where each rate comes from.
        ranges: rate -> its range, where it is modelled from a kernel of ours.
    """

    name: str
    target: int
    core: str
    peak: float
    attention: float
    attention_backward: float
    attention_int8: float
    attention_int8_fp8: float | None
    matmul: float
    matmul_int8: float
    convolution: float
    reward: float
    bandwidth: float
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    ranges: Mapping[str, Expected] = field(default_factory=dict)

    def with_core(self, core: str) -> Self:
        """The same card with another exact attention core; ``reference`` and unknown cores keep the rates they had."""
        rate = core_rates(self.target).get(core)
        if rate is None:
            return self
        kinds = {**self.kinds, "attention": rate.kind, "attention_backward": rate.kind}
        ranges = {name: expected for name, expected in self.ranges.items() if name != "attention"}
        ranges |= {"attention": rate.expected} if rate.expected else {}
        return replace(
            self, core=core, attention=rate.forward, attention_backward=rate.backward, kinds=kinds, ranges=ranges
        )

    def measured(self, rows: Iterable[Mapping[str, Any]]) -> Self:
        """The same card with what the rows of a result file measured, core by core.

        Quantised rates are taken with a measured core only: beside a published one they would be compared with another
        machine. Raises ValueError for a rate that is none; rows of another form raise whatever Python does.
        """
        timed = _timed(rows)
        found: dict[str, float] = {}

        def median(name: str, values: list[float]) -> None:
            if values:
                found[name] = statistics.median(values)
                if not 0 < found[name] < math.inf:
                    raise ValueError(f"{name} is {found[name]}")

        streaming = [row["gbps"] * _GIGA for row in timed if row["kind"] == "kernel" and row["impl"] == "ours"
                     and row["gbps"] and row["shape"][0] == _TOKENS]  # fmt: skip
        median("bandwidth", streaming)
        products = [row for row in timed if row["kind"] == "ceiling" and row["name"] == "matmul"]
        median("matmul", [row["tflops"] * _TERA for row in products if row["shape"][0] == _TOKENS])
        for name, impl, direction in (
            ("attention", self.core, "fwd"), ("attention_backward", self.core, "bwd"),
            ("attention_int8", "int8", "fwd"), ("attention_int8_fp8", "int8_fp8", "fwd"),
        ):  # fmt: skip
            if impl == self.core or "attention" in found:
                median(name, [row["tflops"] * _TERA for row in _attention(timed, impl, direction)])
        here: Kind = "measured here"
        kinds = {**self.kinds, **dict.fromkeys(found, here)}
        ranges = {name: expected for name, expected in self.ranges.items() if name not in found}
        return replace(self, kinds=kinds, ranges=ranges, **found)

    def rate_of(self, mode: str) -> float | None:
        """FLOP/s of an attention mode, ``exact`` or a quantised one; None where the mode does not exist."""
        return self.attention if mode == "exact" else getattr(self, f"attention_{mode}")

    def low_of(self, mode: str) -> float | None:
        """The low end of :meth:`rate_of`: the rate itself where it has no range."""
        name = "attention" if mode == "exact" else f"attention_{mode}"
        return self.ranges[name].low if name in self.ranges else self.rate_of(mode)

    def at_low_end(self) -> Self:
        """The same card with every rate at the low end of its range."""
        return replace(self, ranges={}, **{name: expected.low for name, expected in self.ranges.items()})

    def pays(self, mode: str) -> bool:
        """Whether a quantised attention beats the exact core by enough at the low end of its rate."""
        low = self.low_of(mode)
        return low is not None and low >= INT8_WORTH * self.attention

    def gain(self, mode: str) -> str:
        """What :meth:`pays` goes by, in words."""
        rate, low = self.rate_of(mode), self.low_of(mode)
        if rate is None or low is None:
            return f"it does not exist on {self.name}"
        told = f"{rate / self.attention:.2f} times the rate of {self.core}"
        return told if low == rate else f"{told} expected, {low / self.attention:.2f} at the low end"


def cores_measured(rows: Iterable[Mapping[str, Any]], target: int) -> list[str]:
    """Exact cores whose forward the rows of a result file timed; those with their backward alone, if there are any.

    Rows of another form raise whatever Python does.
    """
    timed, known = _timed(rows), core_rates(target)
    forwards = {row["impl"] for row in _attention(timed, None, "fwd")}
    # Only exact cores have a backward: quantised modes and other people's kernels are timed forward.
    both = forwards & {row["impl"] for row in _attention(timed, None, "bwd")}
    return sorted(both or forwards & known.keys())


def _timed(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in rows if row.get("t_ms_median") and row.get("status", "ok") == "ok"]


def _attention(timed: Iterable[Mapping[str, Any]], impl: str | None, direction: str) -> list[Mapping[str, Any]]:
    """Self-attention rows of all tokens, of one implementation or of any."""
    return [row for row in timed if row["name"] == "attention" and impl in (None, row["impl"])
            and row["direction"] == direction and row["shape"][0] == _TOKENS]  # fmt: skip


@cache
def own_rate(label: str, target: int) -> Expected:
    """Expected FLOP/s of our attention kernel ``label``, from the static table; compiles and imports nothing."""
    spec = importlib.util.find_spec("geoalign_kernels")
    assert spec is not None and spec.origin is not None
    table = json.loads(Path(spec.origin).with_name("static").joinpath("expectations.json").read_text())
    row = table["rows"][f"attention.attention / {label} / sm_{target}"]
    return Expected(*(row[f"{end}_tflops"] * _TERA for end in ("expected", "low", "high")))


@cache
def core_rates(target: int) -> dict[str, CoreRate]:
    """Exact cores of a target.

    sm_80: SageAttention's chart for the A800; backward by the FlashAttention-2 paper's ratio on an A100. sm_90: the
    FlashAttention-3 paper at 16,384 tokens, rounded down (648 and 561). Torch's flash operator is FlashAttention-2.
    """
    flash2 = CoreRate(188 * _TERA, 165 * _TERA, "published") if target == 80 else CoreRate(
        370 * _TERA, 322 * _TERA, "published"
    )  # fmt: skip
    exact = own_rate("exact bf16", target)
    own = CoreRate(exact.rate, flash2.backward, "modelled", exact)  # its backward is the flash one
    found = {"flash2": flash2, "sdpa_flash": flash2, "triton": own}
    if target == 90:
        found |= {
            "flash3": CoreRate(600 * _TERA, 530 * _TERA, "published"),
            "sdpa_cudnn": CoreRate(595 * _TERA, 516 * _TERA, "published"),
        }
    return found


def _profile(name: str, target: int, core: str, **rates: float) -> DeviceProfile:
    exact = core_rates(target)[core]
    own = {"attention_int8": own_rate("int8 scores, bf16 values", target)}
    if target == 90:
        own["attention_int8_fp8"] = own_rate("int8 scores, fp8 values", 90)
    kinds: dict[str, Kind] = {
        "attention": exact.kind, "attention_backward": exact.kind, "attention_int8": "modelled",
        "attention_int8_fp8": "modelled", "bandwidth": "modelled", "matmul": "assumed", "matmul_int8": "assumed",
        "convolution": "assumed", "reward": "assumed",
    }  # fmt: skip
    return DeviceProfile(
        name, target, core, attention=exact.forward, attention_backward=exact.backward,
        attention_int8=own["attention_int8"].rate,
        attention_int8_fp8=own["attention_int8_fp8"].rate if target == 90 else None,
        kinds=kinds, ranges=own, **rates,
    )  # fmt: skip


_SM80 = {"peak": 312 * _TERA, "matmul": 225 * _TERA, "matmul_int8": 330 * _TERA, "convolution": 80 * _TERA,
         "reward": 140 * _TERA}  # fmt: skip
_SM90 = {"peak": 989 * _TERA, "matmul": 700 * _TERA, "matmul_int8": 1100 * _TERA, "convolution": 240 * _TERA,
         "reward": 380 * _TERA}  # fmt: skip

# Bandwidth: 80 % of the data sheet's (A800, H100 SXM), 90 % of the copy that an H200 reaches. Products, convolutions
# and reward models: assumed shares of the peak; the H100 is assumed to have the H200's, whose chip it is.
DEVICES: dict[str, DeviceProfile] = {
    "a800": _profile("A800 80 GB", 80, "flash2", bandwidth=0.80 * 2039 * _GIGA, **_SM80),
    "h200": _profile("H200 141 GB", 90, "flash3", bandwidth=0.90 * 4300 * _GIGA, **_SM90),
    "h100": _profile("H100 80 GB", 90, "flash3", bandwidth=0.80 * 3350 * _GIGA, **_SM90),
}


_NAMES = (
    (re.compile(r"A[18]00-SXM4?-80GB"), "a800"),
    (re.compile(r"H[18]00(?: 80GB HBM3)?"), "h100"),
    (re.compile(r"H200"), "h200"),
)
"""Whole names of the boards that are meant: others of the family have other clocks, memory or power."""
_PEAKS = ((re.compile(r"A[18]00\b"), 312 * _TERA), (re.compile(r"GH200\b"), 989 * _TERA))
"""Beginnings of the names of further boards, and their peaks."""


def profile_of(name: str) -> DeviceProfile | None:
    """Profile of a CUDA device by the name its driver gives; None for devices that no profile covers.

    So for boards with other clocks or memory ("PCIe", "NVL", "40GB", "GH200") and slices of a card ("MIG").
    """
    board = name.removeprefix("NVIDIA ")
    return next((DEVICES[known] for pattern, known in _NAMES if pattern.fullmatch(board)), None)


def peak_flops(name: str) -> float | None:
    """Dense bf16 peak of a CUDA device by the name its driver gives; None for devices whose peak is not known here."""
    known = profile_of(name)
    if known is not None:
        return known.peak
    if "MIG" in name:
        return None
    return next((peak for pattern, peak in _PEAKS if pattern.match(name.removeprefix("NVIDIA "))), None)

"""The shipped kernel configurations at production shapes, as ``check`` compiles them.

Production: 65,520 tokens, 12 heads of 128, 42 camera phases per head, all of them bfloat16 but the residual stream and
the modulation, which are float32. Tiles and warps come from the launchers' own constants.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from geoalign_kernels.ops.attention import triton_impl as attention
from geoalign_kernels.ops.flow_step import triton_impl as flow
from geoalign_kernels.ops.qk_norm_rotary import triton_impl as prologue
from geoalign_kernels.ops.rms_norm import triton_impl as rms
from geoalign_kernels.static.types import DENSE, PHASE, KernelConfig, Narrow, Spill, Type, each
from geoalign_kernels.triton_rows import plan_rows

WIDTH, HEAD, PAIRS = 1536, 128, 42
ROW = {name: value for name, value in plan_rows(WIDTH, HEAD).constants.items() if name != "num_warps"}
ROW_WARPS = {"num_warps": plan_rows(WIDTH, HEAD).warps}
HEADS = {"HEAD": HEAD, "VECTOR": 2}
NO_PHASE = {"HEAD": WIDTH, "PAIRS": 1, "VECTOR": 2}
"""What a launch without a phase passes: cross-attention's residual sum with the norm behind it."""
FLOW = {"num_warps": flow.WARPS, "enable_fp_fusion": False}
PHASES = "42 phases a head put every other head off a 16-byte boundary"
STREAMS: tuple[tuple[str, str, str], ...] = (
    ("float32 stream, bf16 branch and norm", "*fp32", "*bf16"),
    ("bf16", "*bf16", "*bf16"),
)
"""(label, residual stream, branch and norm) of the ops on the residual stream."""


def _prologue() -> Iterator[KernelConfig]:
    path = "qk_norm_rotary.triton_impl:"
    forward: dict[str, Type] = {
        **each("*bf16", "Q", "K", "V", "QOut", "KOut", "VOut", "WeightQ", "WeightK", "PhaseQK", "PhaseVO"),
        "Position": "*fp32",
        **each(DENSE, "q_strides", "k_strides", "v_strides", "q_out_strides", "k_out_strides", "v_out_strides"),
        **each(PHASE, "qk_phase_strides", "vo_phase_strides"),
        **each("i32/16", "tokens_q", "tokens"),
        "eps": "fp32",
    }
    rotated = {**ROW, **HEADS, "PAIRS_QK": PAIRS, "PAIRS_VO": PAIRS}
    yield KernelConfig(
        f"{path}forward_kernel", "bf16, position + phases", forward, rotated, ROW_WARPS, narrow=(Narrow(PHASES, 12),)
    )
    backward: dict[str, Type] = {
        **each("*bf16", "DQOut", "DKOut", "Q", "K", "DQ", "DK", "WeightQ", "WeightK", "PhaseQK", "DPhaseQK"),
        **each("*fp32", "Position", "DWeightQ", "DWeightK"),
        **each(DENSE, "dq_strides", "dk_strides", "q_strides", "k_strides", "q_in_strides", "k_in_strides"),
        "qk_phase_strides": PHASE,
        **each("i32/16", "tokens_q", "tokens"),
        "eps": "fp32",
    }
    steps = {**ROW, **HEADS, "PAIRS_QK": PAIRS, "STEPS": prologue.STEPS_BACKWARD}
    both = (Narrow(PHASES, 6, 6),)
    yield KernelConfig(f"{path}backward_kernel", "bf16, all gradients", backward, steps, ROW_WARPS, narrow=both)
    frozen = {**backward, **each(None, "DWeightQ", "DWeightK", "DPhaseQK")}
    yield KernelConfig(
        f"{path}backward_kernel", "bf16, frozen weights and phases", frozen, steps, ROW_WARPS,
        narrow=(Narrow(PHASES, 6),),
    )  # fmt: skip
    value: dict[str, Type] = {
        **each("*bf16", "DVOut", "V", "DV", "PhaseVO", "DPhaseVO"),
        **each(DENSE, "dv_strides", "v_strides", "v_in_strides"),
        "vo_phase_strides": PHASE,
        "tokens": "i32/16",
    }
    rotated = {**ROW, **HEADS, "PAIRS_VO": PAIRS}
    yield KernelConfig(f"{path}value_backward_kernel", "bf16, phase gradients", value, rotated, ROW_WARPS, narrow=both)


def _epilogue() -> Iterator[KernelConfig]:
    path, rotated = "unrotate_gate_norm.triton_impl:", {**ROW, **HEADS, "PAIRS": PAIRS}
    for label, stream, branch in STREAMS:
        forward: dict[str, Type] = {
            **each(stream, "X", "Stream"),
            **each(branch, "Y", "Normed"),
            "Phase": "*bf16",
            **each("*fp32", "Gate", "Scale", "Shift"),
            **each(DENSE, "y_strides", "x_strides"),
            "phase_strides": PHASE,
            **each("i32/16", "gate_stride", "scale_stride", "shift_stride", "tokens"),
            "eps": "fp32",
        }
        yield KernelConfig(
            f"{path}forward_kernel", label, forward, rotated, ROW_WARPS, narrow=(Narrow(PHASES, 6),)
        )  # fmt: skip
        plain = {**forward, "Phase": None, "phase_strides": ("i32", "i32", "i32")}
        yield KernelConfig(f"{path}forward_kernel", f"{label}; no phase", plain, {**rotated, **NO_PHASE}, ROW_WARPS)
        backward: dict[str, Type] = {
            **each(stream, "DStream", "Stream", "DX"),
            **each(branch, "DNormed", "Y", "DY"),
            **each("*bf16", "Phase", "DPhase"),
            **each("*fp32", "Gate", "Scale"),
            **each(DENSE, "dstream_strides", "dnormed_strides", "y_strides"),
            "phase_strides": PHASE,
            **each("i32/16", "gate_stride", "scale_stride", "tokens"),
            "eps": "fp32",
        }
        yield KernelConfig(
            f"{path}backward_kernel", f"{label}; all gradients", backward, rotated, ROW_WARPS,
            narrow=(Narrow(PHASES, 6, 6),),
        )  # fmt: skip
        plain = {**backward, **each(None, "Y", "Phase", "DPhase")}
        yield KernelConfig(
            f"{path}backward_kernel", f"{label}; no phase", plain, {**rotated, **NO_PHASE}, ROW_WARPS
        )  # fmt: skip
        yield KernelConfig(
            f"{path}backward_kernel", f"{label}; frozen phase", {**backward, **each(None, "Y", "DPhase")}, rotated,
            ROW_WARPS, narrow=(Narrow(PHASES, 6),),
        )  # fmt: skip


def _norms() -> Iterator[KernelConfig]:
    modulation: dict[str, Type] = {
        **each("*fp32", "Scale", "Shift", "Gate"),
        **each(DENSE, "x_strides", "y_strides", "grad_strides"),
        **each("i32/16", "scale_stride", "shift_stride", "gate_stride", "tokens"),
        "eps": "fp32",
    }
    for label, stream, branch in STREAMS:
        path, gate = "modulated_norm.triton_impl:", "gated_residual.triton_impl:gate_kernel"
        norm: dict[str, Type] = {**modulation, **each(stream, "X", "DX"), **each(branch, "Out", "Grad")}
        yield KernelConfig(f"{path}forward_kernel", label, norm, ROW, ROW_WARPS)
        yield KernelConfig(f"{path}backward_kernel", label, norm, ROW, ROW_WARPS)
        residual: dict[str, Type] = {**modulation, **each(stream, "X", "Out"), "Y": branch}
        yield KernelConfig(gate, f"{label}; forward", residual, ROW, ROW_WARPS)
        yield KernelConfig(
            gate, f"{label}; backward", {**residual, "X": None, "Y": stream, "Out": branch}, ROW, ROW_WARPS
        )
    rows: dict[str, Type] = {
        **each("*bf16", "X", "Weight", "Out", "Grad", "DX"),
        "DWeight": None,
        **each(DENSE, "x_strides", "grad_strides"),
        "tokens": "i32/16",
        "eps": "fp32",
    }
    path = "rms_norm.triton_impl:"
    yield KernelConfig(f"{path}forward_kernel", "bf16", rows, ROW, ROW_WARPS)
    yield KernelConfig(f"{path}backward_kernel", "bf16, frozen weight", rows, {**ROW, "STEPS": 1}, ROW_WARPS)
    trained = {**rows, "DWeight": "*fp32"}
    yield KernelConfig(f"{path}backward_kernel", "bf16, all gradients", trained, {**ROW, "STEPS": rms.STEPS}, ROW_WARPS)


def _flow() -> Iterator[KernelConfig]:
    path, block = "flow_step.triton_impl:", {"BLOCK": flow.BLOCK}
    state: dict[str, Type] = {
        **each("*fp32", "X", "XNext", "Table", "Out", "Partial", "Grad"),
        **each("*bf16", "Velocity", "DVelocity"),
        **each(None, "Uncond", "Previous", "Noise", "Group", "Sample", "DUncond"),
        **each("i32", "table_stride", "key0", "key1", "step", "blocks"),
        "count": "i32/16",
        "guidance": "fp32",
    }
    counter = {**state, **each("*i64", "Group", "Sample")}
    scalars = "coefficients and ids of the sample: scalars"
    yield KernelConfig(f"{path}step_kernel", "SDE, counter noise", counter, block, FLOW, narrow=(Narrow(scalars, 5),))
    guided = {**state, "Uncond": "*bf16"}
    yield KernelConfig(f"{path}step_kernel", "ODE, guidance", guided, block, FLOW, narrow=(Narrow(scalars, 2),))
    partial = "one partial sum per block"
    yield KernelConfig(
        f"{path}log_prob_kernel", "bf16 velocity", state, block, FLOW,
        narrow=(Narrow(scalars, 2), Narrow(partial, 0, 1)),
    )  # fmt: skip
    finish = {**block, "PRECISION": flow.PRECISION, "CONSTANT": flow.CONSTANT}
    yield KernelConfig(
        f"{path}log_prob_finish_kernel", "second stage", state, finish, FLOW,
        narrow=(Narrow("rows of partial sums of any length", 8), Narrow(scalars, 2, 1)),
    )  # fmt: skip
    yield KernelConfig(
        f"{path}log_prob_backward_kernel", "bf16 velocity", state, {**block, "SLOPE": flow.SLOPE}, FLOW,
        narrow=(Narrow(scalars, 4),),
    )  # fmt: skip
    yield KernelConfig(
        f"{path}log_prob_backward_kernel", "bf16 velocity, guidance, both gradients",
        {**guided, "DUncond": "*bf16"}, {**block, "SLOPE": flow.SLOPE}, FLOW, narrow=(Narrow(scalars, 4),),
    )  # fmt: skip


def _attention() -> Iterator[KernelConfig]:
    path = "attention.triton_impl:"
    exact: dict[str, Type] = {
        **each("*bf16", "Q", "K", "V", "Out"),
        "Lse": "*fp32",
        **each(None, "QScale", "KScale", "VScale", "VMean", "v_strides"),
        **each(DENSE, "q_strides", "k_strides"),
        **each("i32/16", "tokens_q", "tokens_k"),
        "scale_log2": "fp32",
        "heads": "i32",
    }
    tile = {"HEAD": HEAD, "BM": attention.QUERY_BLOCK}
    options = {"num_stages": attention.STAGES}
    tiles: dict[str, Any] = {
        "by_target": {target: {"BN": of.keys, "AHEAD": of.ahead} for target, of in attention.TILES.items()},
        "options_by_target": {target: {"num_warps": of.warps} for target, of in attention.TILES.items()},
    }
    yield KernelConfig(
        f"{path}attention_kernel", "exact bf16", exact, tile, options, {"sm_80": "HMMA", "sm_90": "HGMMA"},
        (Narrow("log-sum-exp, one number a query", 0, 1),), **tiles,
        spills={"sm_80": Spill("32 rows a warp halve the reads of shared memory, which bound the kernel", 64)},
    )  # fmt: skip
    int8 = {**exact, **each("*i8", "Q", "K"), "Lse": None, **each("*fp32", "QScale", "KScale")}
    scale, ahead = Narrow("scale of the queries", 1), "scales of key blocks before the loop"
    yield KernelConfig(
        f"{path}attention_kernel", "int8 scores, bf16 values", int8, tile, options,
        {"sm_80": "HMMA+IMMA", "sm_90": "HGMMA+IGMMA"}, (scale,), **tiles,
        narrow_by_target={80: (Narrow(ahead, 1),), 90: (Narrow(ahead, 3),)},
    )  # fmt: skip
    fp8 = {**int8, "V": "*fp8e4nv", **each("*fp32", "VScale", "VMean"), "v_strides": DENSE}
    yield KernelConfig(
        f"{path}attention_kernel", "int8 scores, fp8 values", fp8,
        {**tile, "BN": attention.FP8_TILE.keys, "AHEAD": attention.FP8_TILE.ahead},
        {**options, "num_warps": attention.FP8_TILE.warps}, {"sm_90": "IGMMA+QGMMA"},
        (scale, Narrow(ahead, 1), Narrow("scale and mean of the value channels, once a program", 32)),
        not_applicable={80: "no fp8 tensor cores and no e4m3 conversion; the mode is refused there"},
    )  # fmt: skip
    tokens: dict[str, Type] = {
        "X": "*bf16", **each("*fp32", "Mean", "Scale"), "Out": "*i8", "strides": DENSE,
        **each("i32/16", "tokens", "padded"), "heads": "i32",
    }  # fmt: skip
    block, warps = {"HEAD": HEAD, "BLOCK": attention.SCALE_BLOCK}, {"num_warps": attention.QUANTISE_WARPS}
    one, path = (Narrow("one scale a block", 0, 1),), f"{path}quantise_kernel"
    yield KernelConfig(path, "queries", {**tokens, "Mean": None}, block, warps, narrow=one)
    yield KernelConfig(path, "keys, mean removed", tokens, block, warps, narrow=one)
    yield KernelConfig(
        "attention.triton_impl:quantise_values_kernel", "fp8, channels first", {**tokens, "Out": "*fp8e4nv"},
        {"HEAD": HEAD, "BLOCK": attention.VALUE_BLOCK}, warps,
        not_applicable={80: "its consumer, attention with fp8 values, is refused there"},
    )  # fmt: skip


CONFIGS = (*_prologue(), *_epilogue(), *_norms(), *_flow(), *_attention())

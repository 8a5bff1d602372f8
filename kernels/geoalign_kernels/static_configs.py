"""The shipped kernel configurations at production shapes, as `static_check` compiles them.

Types: `*bf16` is a 16-byte aligned pointer, `i32/16` an integer divisible by 16 (Triton finds both out by itself at a
launch), `None` an absent operand. Production shapes: 65,520 tokens, 12 heads of 128, 42 camera phases per head.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Type = str | None | tuple[str, ...]
DENSE = ("i32/16", "i32/16")  # batch and token strides of [B, S, 1536]
PHASE = ("i32", "i32", "i32")  # batch, token and head strides of [B, S, 12, 42]


@dataclass(frozen=True)
class KernelConfig:
    """One kernel with the argument types, constants and launch options of a production launch."""

    path: str
    """`module:kernel` below geoalign_kernels.ops"""
    label: str
    arguments: Mapping[str, Type]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]
    mma: Mapping[str, str] = field(default_factory=dict)
    """Tensor-core opcodes that must appear, per target, joined by +."""
    targets: tuple[int, ...] = (80, 90)

    @property
    def kernel_name(self) -> str:
        """`op.kernel`, e.g. `qk_norm_rotary.forward`."""
        module, _, kernel = self.path.partition(":")
        return f"{module.partition('.')[0]}.{kernel.removesuffix('_kernel')}"

    def kernel(self) -> Any:
        """The jitted function."""
        module, _, kernel = self.path.partition(":")
        return getattr(importlib.import_module(f"geoalign_kernels.ops.{module}"), kernel)

    def source_arguments(self) -> tuple[dict[str, Any], dict[Any, Any], dict[Any, Any]]:
        """(signature, constants, attributes) as `triton.compiler.ASTSource` wants them, in the kernel's order."""
        signature: dict[str, Any] = {}
        constants: dict[Any, Any] = {}
        attributes: dict[Any, Any] = {}
        for index, name in enumerate(self.kernel().arg_names):
            kind = None if name in self.constants else self.arguments[name]
            if kind is None:
                signature[name] = "constexpr"
                constants[(index,)] = self.constants.get(name)
                continue
            parts = kind if isinstance(kind, tuple) else (kind,)
            plain = tuple(part.removesuffix("/16") for part in parts)
            signature[name] = plain if isinstance(kind, tuple) else plain[0]
            for place, part in enumerate(parts):
                if part.startswith("*") or part.endswith("/16"):
                    path = (index, place) if isinstance(kind, tuple) else (index,)
                    attributes[path] = [["tt.divisibility", 16]]
        return signature, constants, attributes


def _each(kind: Type, *names: str) -> dict[str, Type]:
    return dict.fromkeys(names, kind)


_ROTARY_SHAPE = {
    "WIDTH": 1536, "HEAD": 128, "PAIRS_QK": 42, "PAIRS_VO": 42, "ROWS": 2, "CHUNK": 512, "CHUNKS": 3, "VECTOR": 2,
}  # fmt: skip
_INT8_MMA = {"sm_80": "HMMA+IMMA", "sm_90": "HGMMA+IGMMA"}
_NO_FUSION = {"num_warps": 4, "enable_fp_fusion": False}
_NORM_SHAPE = {"WIDTH": 1536, "ROWS": 4, "CHUNK": 512, "CHUNKS": 3}
_EPILOGUE_SHAPE = {"WIDTH": 1536, "HEAD": 128, "PAIRS": 42, "ROWS": 2, "CHUNK": 512, "CHUNKS": 3, "VECTOR": 2}

CONFIGS: tuple[KernelConfig, ...] = (
    KernelConfig(
        "qk_norm_rotary.triton_impl:forward_kernel",
        "bf16, position + phases",
        {
            **_each("*bf16", "Q", "K", "V", "QOut", "KOut", "VOut", "WeightQ", "WeightK"),
            **_each("*fp32", "Position", "PhaseQK", "PhaseVO"),
            **_each(DENSE, "q_strides", "k_strides", "v_strides", "q_out_strides", "k_out_strides", "v_out_strides"),
            **_each(PHASE, "qk_phase_strides", "vo_phase_strides"),
            **_each("i32/16", "tokens_q", "tokens"),
            "eps": "fp32",
        },
        _ROTARY_SHAPE,
        {"num_warps": 4},
    ),
    KernelConfig(
        "qk_norm_rotary.triton_impl:backward_kernel",
        "bf16, position + phases, weight and phase gradients",
        {
            **_each("*bf16", "DQOut", "DKOut", "Q", "K", "DQ", "DK", "WeightQ", "WeightK"),
            **_each("*fp32", "Position", "PhaseQK", "DWeight", "DPhaseQK"),
            **_each(DENSE, "dq_strides", "dk_strides", "q_strides", "k_strides", "q_in_strides", "k_in_strides"),
            "qk_phase_strides": PHASE,
            **_each("i32/16", "tokens_q", "tokens"),
            "eps": "fp32",
        },
        {**_ROTARY_SHAPE, "STEPS": 16},
        {"num_warps": 4},
    ),
    KernelConfig(
        "qk_norm_rotary.triton_impl:value_backward_kernel",
        "bf16, phase gradients",
        {
            **_each("*bf16", "DVOut", "V", "DV"),
            **_each("*fp32", "PhaseVO", "DPhaseVO"),
            **_each(DENSE, "dv_strides", "v_strides", "v_in_strides"),
            "vo_phase_strides": PHASE,
            "tokens": "i32/16",
        },
        _ROTARY_SHAPE,
        {"num_warps": 4},
    ),
    KernelConfig(
        "unrotate_gate_norm.triton_impl:forward_kernel",
        "bf16, camera phase",
        {
            **_each("*bf16", "Y", "X", "Stream", "Normed"),
            **_each("*fp32", "Gate", "Scale", "Shift", "Phase"),
            **_each(DENSE, "y_strides", "x_strides"),
            "phase_strides": PHASE,
            **_each("i32/16", "gate_stride", "scale_stride", "shift_stride", "tokens"),
            "eps": "fp32",
        },
        _EPILOGUE_SHAPE,
        {"num_warps": 4},
    ),
    KernelConfig(
        "unrotate_gate_norm.triton_impl:backward_kernel",
        "bf16, camera phase and its gradient",
        {
            **_each("*bf16", "DStream", "DNormed", "Y", "Stream", "DX", "DY"),
            **_each("*fp32", "Gate", "Scale", "Phase", "DPhase"),
            **_each(DENSE, "dstream_strides", "dnormed_strides", "y_strides"),
            "phase_strides": PHASE,
            **_each("i32/16", "gate_stride", "scale_stride", "tokens"),
            "eps": "fp32",
        },
        _EPILOGUE_SHAPE,
        {"num_warps": 4},
    ),
    KernelConfig(
        "modulated_norm.triton_impl:forward_kernel",
        "bf16, fp32 modulation",
        {
            **_each("*bf16", "X", "Out"),
            **_each("*fp32", "Scale", "Shift"),
            "x_strides": DENSE,
            **_each("i32/16", "scale_stride", "shift_stride", "tokens"),
            "eps": "fp32",
        },
        _NORM_SHAPE,
        {"num_warps": 8},
    ),
    KernelConfig(
        "modulated_norm.triton_impl:backward_kernel",
        "bf16, fp32 modulation",
        {
            **_each("*bf16", "Grad", "X", "DX"),
            "Scale": "*fp32",
            **_each(DENSE, "grad_strides", "x_strides"),
            **_each("i32/16", "scale_stride", "tokens"),
            "eps": "fp32",
        },
        _NORM_SHAPE,
        {"num_warps": 8},
    ),
    *(
        KernelConfig(
            "gated_residual.triton_impl:gate_kernel",
            label,
            {
                **_each("*bf16", "Y", "Out"),
                "X": residual,
                "Gate": "*fp32",
                **_each(DENSE, "x_strides", "y_strides"),
                **_each("i32/16", "gate_stride", "tokens"),
            },
            _NORM_SHAPE,
            {"num_warps": 8},
        )
        for label, residual in (("bf16 forward", "*bf16"), ("bf16 backward", None))
    ),
    *(
        KernelConfig(
            "flow_step.triton_impl:step_kernel",
            label,
            {
                **_each("*fp32", "X", "Table", "Out"),
                "Velocity": "*bf16",
                "Uncond": uncond,
                "Previous": None,
                "Noise": None,
                **_each(ids, "Group", "Sample"),
                **_each("i32", "table_stride", "key0", "key1", "step"),
                "count": "i32/16",
                "guidance": "fp32",
            },
            {"BLOCK": 1024},
            _NO_FUSION,
        )
        for label, uncond, ids in (("SDE, counter noise", None, "*i64"), ("ODE, guidance", "*bf16", None))
    ),
    KernelConfig(
        "flow_step.triton_impl:log_prob_kernel",
        "bf16 velocity",
        {
            **_each("*fp32", "X", "XNext", "Table", "Partial"),
            "Velocity": "*bf16",
            "Uncond": None,
            "table_stride": "i32",
            "count": "i32/16",
            "guidance": "fp32",
        },
        {"BLOCK": 1024},
        _NO_FUSION,
    ),
    KernelConfig(
        "flow_step.triton_impl:log_prob_finish_kernel",
        "second stage",
        {**_each("*fp32", "Partial", "Table", "Out"), **_each("i32", "table_stride", "blocks")},
        {"BLOCK": 1024, "PRECISION": 4, "CONSTANT": 5},
        _NO_FUSION,
    ),
    KernelConfig(
        "flow_step.triton_impl:log_prob_backward_kernel",
        "bf16 velocity",
        {
            **_each("*fp32", "Grad", "X", "XNext", "Table", "Out"),
            "Velocity": "*bf16",
            "Uncond": None,
            "table_stride": "i32",
            "count": "i32/16",
            "guidance": "fp32",
        },
        {"BLOCK": 1024, "SLOPE": 6},
        _NO_FUSION,
    ),
    *(
        KernelConfig(
            "attention.triton_impl:attention_kernel",
            label,
            {
                **_each(query, "Q", "K"),
                **_each("*bf16", "V", "Out"),
                "Lse": lse,
                **_each(scales, "QScale", "KScale"),
                **_each(DENSE, "q_strides", "k_strides", "v_strides"),
                **_each("i32/16", "tokens_q", "tokens_k"),
                "scale_log2": "fp32",
                "heads": "i32",
            },
            {"HEAD": 128, "BM": 128, "BN": keys},
            {"num_warps": 8, "num_stages": 3},
            mma,
            targets,
        )
        for label, query, lse, scales, keys, mma, targets in (
            ("exact bf16", "*bf16", "*fp32", None, 32, {"sm_80": "HMMA"}, (80,)),
            ("exact bf16", "*bf16", "*fp32", None, 64, {"sm_90": "HGMMA"}, (90,)),
            ("int8 scores, bf16 values", "*i8", None, "*fp32", 64, _INT8_MMA, (80, 90)),
        )
    ),
    *(
        KernelConfig(
            "attention.triton_impl:quantise_kernel",
            label,
            {
                "X": "*bf16",
                "Mean": mean,
                "Out": "*i8",
                "Scale": "*fp32",
                "strides": DENSE,
                "tokens": "i32/16",
                "heads": "i32",
            },
            {"HEAD": 128, "BLOCK": block},
            {"num_warps": 4},
        )
        for label, mean, block in (("queries", None, 128), ("keys, mean removed", "*fp32", 64))
    ),
)

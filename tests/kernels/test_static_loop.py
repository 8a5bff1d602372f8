"""Cycles of a main loop: listings in nvdisasm's form whose cost is known by hand."""

from __future__ import annotations

import json

import pytest

from geoalign_kernels.static import check
from geoalign_kernels.static.loop import columns, iteration, main_loop


def listing(*body: str, before: tuple[str, ...] = (), after: tuple[str, ...] = ()) -> str:
    def lines(instructions: tuple[str, ...]) -> list[str]:
        return [f"        /*{16 * n:04x}*/                   {text} ;" for n, text in enumerate(instructions)]

    loop = [".L_x_0:", *lines(body), "        /*0ff0*/              @!P0 BRA `(.L_x_0) ;"]
    end = [".L_x_9:", "        /*1000*/                   BRA `(.L_x_9);"]
    return "\n".join([*lines(before), *loop, *lines(after), *end])


def test_an_sm80_iteration_is_that_of_the_published_figures() -> None:
    """FlashAttention's tile of 128 queries and 64 keys of 128 channels on eight warps: 2048 cycles of the tensor cores
    at 1024 multiply-adds a cycle; 72 fragments of 512 bytes and 8 asynchronous copies of 512 a warp, at 128 bytes."""
    body = (
        *["HMMA.16816.F32.BF16 R4, R8, R12, R4"] * 128,
        *["LDSM.16.M88.4 R8, [R3]"] * 68, *["LDSM.16.MT88.4 R8, [R3]"] * 4,
        *["LDGSTS.E.BYPASS.128 [R3], [R4.64]"] * 8, *["MUFU.EX2 R3, R3"] * 34, "@P1 FADD R1, R2, R3",
    )  # fmt: skip
    code = listing(*body, before=("HMMA.16816.F32.BF16 R4, R8, R12, R4", "LDG.E.128 R4, [R2.64]"))
    found = iteration(main_loop(code), 80, 8)
    assert found.tensor == 2 * 128 * 64 * 128 / 1024 == 2048
    assert found.shared == 8 * (72 * 512 + 8 * 512) / 128 == 2560
    assert found.exponential == 34 * 8 * 32 / 16 == 544
    assert found.issue == (len(body) + 1) * 8 / 4 and found.hidden == 0
    row = columns(code, 80, 8, 4.0 * 128 * 64 * 128)
    assert row["bound_tflops"] == 249 and (row["tensor_cycles"], row["shared_cycles"]) == (2048, 2560)


@pytest.mark.parametrize("wait_first", [True, False])
def test_softmax_before_the_wait_is_hidden_behind_the_product(wait_first: bool) -> None:
    """Two groups of 64 rows, 64 keys: 512 cycles for a product of 128 channels; the softmax of 100 instructions a
    warp takes 200 issue slots, all of them beside the product unless the wait comes first."""
    product = ["HGMMA.64x64x16.F32.BF16 R24, gdesc[UR36], R24, gsb0"] * 8
    softmax, wait = ["MUFU.EX2 R3, R3"] * 10 + ["FADD R3, R3, R4"] * 90, ["WARPGROUP.DEPBAR.LE gsb0, 0x0"]
    body = product + (wait + softmax if wait_first else softmax + wait)
    found = iteration(main_loop(listing(*body)), 90, 8)
    assert found.tensor == 2 * 8 * 64 * 64 * 16 / 2048
    assert found.hidden == (0 if wait_first else 200)
    assert found.modelled == max(found.bound, found.tensor + found.issue - found.hidden)
    # No published kernel has calibrated that credit: the low end does without it.
    row, full = columns(listing(*body), 90, 8, 1e6), 132 * 1.755e9 * 1e6 / 1e12
    assert row["low_tflops"] == round(0.75 * full / (found.tensor + found.issue))
    assert row["high_tflops"] == round(0.97 * full / found.modelled) >= row["expected_tflops"]
    # both operands of each product come from shared memory
    assert found.shared == 2 * 8 * (64 * 16 + 64 * 16) * 2 / 128


def test_eight_bit_products_and_operands_in_registers() -> None:
    body = main_loop(
        listing("QGMMA.64x128x32.F32.E4M3.E4M3 R24, R4, gdesc[UR4], R24", "IGMMA.64x128x32.S8.S8 R1, gdesc[UR2], R1")
    )
    found = iteration(body, 90, 4)
    assert found.tensor == 2 * 64 * 128 * 32 / 4096
    assert found.shared == (128 * 32 + (64 + 128) * 32) / 128


def test_a_kernel_of_rows_sets_issue_slots_against_bytes() -> None:
    code = listing(*["FADD R1, R1, R2"] * 5, before=("LDG.E.128 R4, [R2.64]",), after=("STG.E.64 [R2.64], R4", "EXIT"))
    found = iteration(main_loop(code), 80, 4)
    assert found.issue == 10 and found.tensor == 0  # four of them the two branches, the load, the store and the exit
    assert found.memory == pytest.approx((16 + 8) * 4 * 32 * 108 * 1.41e9 / (0.8 * 2039e9))


def test_the_table_holds_what_the_cost_model_reads() -> None:
    rows = json.loads(check.EXPECTATIONS.read_text())["rows"]
    attention = {key: row for key, row in rows.items() if key.startswith("attention.attention")}
    assert len(attention) == 5
    for key, row in attention.items():
        assert 0 < row["low_tflops"] < row["expected_tflops"] < row["high_tflops"] < row["bound_tflops"], key
        assert row["tensor_cycles"] and row["exp_cycles"], key
        assert not key.endswith("sm_80") or row["shared_cycles"] <= row["tensor_cycles"], key
    streaming = [row for key, row in rows.items() if "norm" in key.partition(" ")[0]]
    assert streaming and all(row["issue_cycles"] < row["memory_cycles"] for row in streaming)

"""Cost model: FLOPs against a counter on the real network, closed forms, published run times, and the lever ladder."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from geoalign.config.model import ModelConfig
from geoalign.perf.budget import LEVERS, PassCount, Plan, RunCost, Walk, climb, count_passes
from geoalign.perf.cost import Speedups, TransformerCost, video_cost
from geoalign.perf.devices import DEVICES, core_rates, cores_measured, own_rate, peak_flops, profile_of
from geoalign.perf.phases import phase_work

A800, H200 = DEVICES["a800"], DEVICES["h200"]
FASTEST = Speedups(kernels="fused", cached=True, pruned=True)
PAPER_SCORERS = ("mapanything", "hpsv3", "videoalign")


def redirector() -> ModelConfig:
    return ModelConfig(in_channels=32, image_dim=1280, source="frames", camera="learned", pluecker_adapter=True)


def paper_run(updates: int = 1, tail: int = 19) -> RunCost:
    return RunCost(
        transformer=TransformerCost(),
        video=video_cost(81, 480, 832, PAPER_SCORERS),
        walks={Walk(2, 4, tail): 140},
        conditions=64,
        group_size=12,
        updates=updates,
    )


@pytest.mark.parametrize(
    ("name", "profile", "tera"),
    [
        ("NVIDIA A800-SXM4-80GB", "a800", 312.0), ("NVIDIA A100-SXM4-80GB", "a800", 312.0),
        ("A100-SXM-80GB", "a800", 312.0), ("NVIDIA H100 80GB HBM3", "h100", 989.0), ("NVIDIA H800", "h100", 989.0),
        ("NVIDIA H200", "h200", 989.0), ("NVIDIA H100 PCIe", None, None), ("NVIDIA H200 NVL", None, None),
        # Boards of the family with other memory, clocks or power: their tensor cores alone are known.
        ("NVIDIA A100-SXM4-40GB", None, 312.0), ("NVIDIA A100-PCIE-40GB", None, 312.0), ("A100-PCIE-40GB", None, 312.0),
        ("NVIDIA A100 80GB PCIe", None, 312.0), ("NVIDIA A800 80GB PCIe", None, 312.0),
        ("NVIDIA A800 40GB Active", None, 312.0), ("NVIDIA GH200 480GB", None, 989.0),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", None, None), ("NVIDIA H200 MIG 1g.18gb", None, None),
        ("NVIDIA H20", None, None), ("NVIDIA GB200", None, None), ("NVIDIA L40S", None, None),
    ],
)  # fmt: skip
def test_a_device_is_known_by_its_name(name: str, profile: str | None, tera: float | None) -> None:
    """Whole names: a part of one is not enough. Dense bf16 by the data sheets; an H100 has 3.35 TB/s of memory."""
    assert profile_of(name) is (None if profile is None else DEVICES[profile])
    assert peak_flops(name) == (None if tera is None else tera * 1e12)
    assert DEVICES["h100"].bandwidth < 3.35e12 < DEVICES["h200"].bandwidth


def test_sizes_follow_from_the_configuration() -> None:
    assert TransformerCost.of(redirector(), 81, 480, 832) == TransformerCost()
    text_only = TransformerCost.of(ModelConfig(), 81, 480, 832)
    assert (text_only.tokens, text_only.context_tokens, text_only.phase_channels) == (32760, 512, 0)
    assert text_only.adapter_flops() == 0.0


def test_block_flops_equal_a_counter_on_the_real_network() -> None:
    """FlopCounterMode over the transformer on the meta device, at the published size (two of thirty blocks)."""
    from torch.utils.flop_counter import FlopCounterMode

    from geoalign.models.conditioning import Conditioning
    from geoalign.models.dit import RetakeDiT

    config = ModelConfig(layers=2, source="frames")
    with torch.device("meta"):
        model = RetakeDiT(config).requires_grad_(False)
        latents = torch.empty(1, 16, 21, 60, 104)
        cond = Conditioning(source_latents=latents, context=torch.empty(1, 512, 4096))
        cache = model.precompute(cond)
        model.execution.prune_source = False
        with FlopCounterMode(display=False) as counter:
            model(latents, torch.empty(1), cond, cache)
    counted = counter.get_flop_counts()["RetakeDiT.blocks.0"]
    cost = TransformerCost.of(config, 81, 480, 832)
    part = cost.block_flops()
    # Keys and values of the text are made once per condition, outside the block.
    context = 4.0 * cost.context_tokens * cost.dim**2
    assert sum(counted.values()) == sum(part.values()) - context


def test_forward_flops_of_the_published_model() -> None:
    """977.5 TFLOP, independently counted as 977.55 on meta tensors of the published implementation."""
    assert TransformerCost().forward_flops() / 1e12 == pytest.approx(977.55, rel=1e-3)


@pytest.mark.parametrize(
    ("cost", "device", "published_s"),
    [
        # TeaCache's README: Wan2.1-1.3B, 480p, one A800.
        (TransformerCost(source_tokens=0, context_tokens=512, phase_channels=0, adapter=False), A800, 175.0),
        # Wan2.1's README: 14B, 720p, A800 class.
        (
            TransformerCost(
                dim=5120, heads=40, ffn_dim=13824, layers=40, target_tokens=21 * 45 * 80, source_tokens=0,
                context_tokens=512, phase_channels=0, adapter=False,
            ),
            A800,
            3342.6,
        ),
        # The same on H100 with FlashAttention-2 rates.
        (
            TransformerCost(
                dim=5120, heads=40, ffn_dim=13824, layers=40, target_tokens=21 * 45 * 80, source_tokens=0,
                context_tokens=512, phase_channels=0, adapter=False,
            ),
            replace(H200, attention=370e12, matmul=650e12, bandwidth=0.8 * 3350e9),
            1837.9,
        ),
    ],
)  # fmt: skip
def test_predictions_are_near_published_run_times(cost: TransformerCost, device, published_s: float) -> None:  # type: ignore[no-untyped-def]
    """Fifty guided steps of text-to-video; no rate was fitted to these numbers."""
    assert 100 * cost.forward(device, Speedups()).total == pytest.approx(published_s, rel=0.08)


def test_seconds_add_up_from_flops_and_rates() -> None:
    cost = TransformerCost()
    part, eager = cost.block_flops(), cost.forward(A800, Speedups())
    assert eager.attention == pytest.approx(30 * part["self_attention"] / 188e12)
    assert eager.elementwise == pytest.approx(cost.traffic_bytes("eager") / A800.bandwidth)
    assert eager.total == pytest.approx(eager.attention + eager.matmul + eager.elementwise + eager.adapter)
    quantised = cost.forward(A800, Speedups(), attention="int8")
    rate = own_rate("int8 scores, bf16 values", 80).rate
    assert quantised.attention == pytest.approx(30 * part["self_attention"] / rate)
    fp8 = cost.forward(H200, Speedups(), attention="int8_fp8").attention
    assert fp8 == pytest.approx(30 * part["self_attention"] / own_rate("int8 scores, fp8 values", 90).rate)
    # An epilogue saves the GELU's hidden layer, read and written, a residual in the next norm a read of the stream.
    apart, inside = (cost.traffic_bytes("fused", no_gradient=flag) for flag in (False, True))
    assert apart - inside == pytest.approx(30 * 2 * 65_520 * 8960 * 2 + 29 * 65_520 * 1536 * 4)
    assert cost.forward(A800, Speedups(int8_linear=True)).matmul < eager.matmul
    assert cost.backward(A800, Speedups()).attention == pytest.approx(2.5 * 30 * part["self_attention"] / 165e12)


@pytest.mark.parametrize("device", [A800, H200])
def test_every_speedup_saves_time(device) -> None:  # type: ignore[no-untyped-def]
    cost = TransformerCost()
    eager = cost.forward(device, Speedups()).total
    for lever in ({"kernels": "compiled"}, {"kernels": "fused"}, {"cached": True}, {"pruned": True}):
        assert cost.forward(device, Speedups(**lever)).total < eager
    assert cost.traffic_bytes("fused") < cost.traffic_bytes("compiled") < cost.traffic_bytes("eager")
    assert cost.backward(device, FASTEST).total < cost.backward(device, Speedups()).total


def test_fused_traffic_is_that_of_the_blocks_arithmetic() -> None:
    """Counted by hand from models/layers.py at 1.3B, in bf16 tensors; the float32 residual stream counts twice: norm 3,
    q and k 4, v 2, epilogue 6, cross-attention 7, its residual with the norm behind it 6, the last residual 5, GELU."""
    cost = TransformerCost()
    phases = 504 / 1536
    tensors = 3 + 4 + 2 + 6 + 7 + 6 + 5 + 3 * phases + 2 * 8960 / 1536
    assert cost.traffic_bytes("fused") == pytest.approx(30 * tensors * 65_520 * 1536 * 2)


def test_a_core_brings_its_rates_and_a_measurement_replaces_them() -> None:
    flash2 = H200.with_core("sdpa_flash")
    assert (flash2.attention, flash2.attention_backward) == (370e12, 322e12)
    assert flash2.kinds["attention"] == "published" and H200.with_core("triton").kinds["attention"] == "modelled"
    assert set(core_rates(80)) == {"flash2", "sdpa_flash", "triton"} and H200.with_core("reference") is H200
    assert not H200.pays("int8") and flash2.pays("int8") and A800.pays("int8") and not A800.pays("exact")
    rows = [row("attention", "flash3", "fwd", 655.0), row("attention", "int8", "fwd", 801.0),
            row("attention", "flash3", "fwd", 1.0, tokens=16_384), row("attention", "sdpa_flash", "fwd", 2.0),
            {"kind": "kernel", "status": "failed", "t_ms_median": None}]  # fmt: skip
    found = H200.measured(rows)
    assert (found.attention, found.attention_int8) == (655e12, 801e12) and found.pays("int8")
    assert "attention_int8" not in found.ranges and "attention_int8_fp8" in found.ranges
    assert found.kinds["attention"] == "measured here" and found.kinds["attention_backward"] == "published"
    assert found.attention_backward == H200.attention_backward and found.matmul == H200.matmul


def row(name: str, impl: str, direction: str, tflops: float, tokens: int = 65_520) -> dict[str, object]:
    return {"kind": "kernel", "name": name, "impl": impl, "direction": direction, "tflops": tflops, "gbps": None,
            "shape": [tokens], "t_ms_median": 1.0, "status": "ok"}  # fmt: skip


def test_a_mode_is_judged_by_its_own_rate_at_the_low_end() -> None:
    """An H200's fp8 values are expected at 1.3 times FlashAttention 3, and at 1.09 where the range begins."""
    cudnn = H200.with_core("sdpa_cudnn")
    for profile in (H200, cudnn):
        assert profile.rate_of("int8_fp8") >= 1.15 * profile.attention > profile.low_of("int8_fp8")  # type: ignore[operator]
        assert not profile.pays("int8_fp8") and "at the low end" in profile.gain("int8_fp8")
    assert H200.with_core("flash2").pays("int8_fp8") and H200.at_low_end().rate_of("int8") == H200.low_of("int8")
    assert A800.rate_of("int8_fp8") is None and not A800.pays("int8_fp8") and "not exist" in A800.gain("int8_fp8")
    # A measurement of the very mode decides, whatever the other one does.
    rows = [row("attention", "flash3", "fwd", 600.0), row("attention", "int8", "fwd", 640.0)]
    both = H200.measured([*rows, row("attention", "int8_fp8", "fwd", 700.0)])
    assert both.pays("int8_fp8") and not both.pays("int8") and both.gain("int8_fp8") == "1.17 times the rate of flash3"
    # Our own exact core is modelled by the same means and has a range of its own, another core has none.
    triton = H200.with_core("triton")
    assert triton.low_of("exact") == own_rate("exact bf16", 90).low < triton.attention
    assert triton.with_core("flash3").low_of("exact") == 600e12


def test_a_measured_mode_is_never_set_against_a_published_core() -> None:
    rows = [row("attention", "sdpa_flash", "fwd", 370.0), row("attention", "sdpa_flash", "bwd", 300.0),
            row("attention", "triton", "fwd", 400.0), row("attention", "int8", "fwd", 500.0),
            row("attention", "flashinfer", "fwd", 900.0),
            row("attention", "flash2", "bwd", 1.0, tokens=16_384)]  # fmt: skip
    found = H200.measured(rows)  # flash3, of which there is no row
    assert found.kinds["attention"] == "published" and found.kinds["attention_int8"] == "modelled"
    assert found.attention_int8 == H200.attention_int8 and "attention_int8" in found.ranges
    assert cores_measured(rows, 90) == ["sdpa_flash"]  # both directions; nobody else's kernel
    assert cores_measured(rows[2:], 90) == ["triton"] and cores_measured(rows[3:], 90) == []


def test_hours_say_what_they_rest_on() -> None:
    ladder = climb(paper_run(), A800, 64)
    kinds = {rung.lever.name: (rung.alone_kind, rung.cumulative_kind) for rung in ladder.rungs}
    assert kinds["shared prefix and first window forward"][0] == "published"
    assert kinds["fused norm, rotary, gate and GELU kernels"] == ("modelled", "modelled")
    assert ladder.rungs[-1].cumulative_kind == "assumed"  # a sum is no better founded than its worst part


def test_pass_counts_by_hand() -> None:
    """12 members, 12 steps, window of 4 at step 3."""
    walk = Walk(3, 4, 5)
    plain = count_passes(walk, 1, 12, 1, Plan())
    assert plain == PassCount(prefix=36, window=48, tail=60, replay=48, recompute=48, backward=48)
    assert (plain.rollout, plain.forwards, plain.forward_equivalents) == (144, 240, 336)
    assert count_passes(walk, 1, 12, 1, Plan(share_prefix=True)).rollout == 100
    merged = Plan(merge_first=True)
    assert count_passes(walk, 1, 12, 1, merged).backward == 1 + 36
    assert count_passes(walk, 1, 12, 4, merged).backward == 4 + 36
    streamed = count_passes(walk, 2, 12, 1, Plan(share_prefix=True, merge_first=True, stream_backward=True))
    assert streamed == PassCount(prefix=6, window=74, tail=120, replay=0, recompute=74, backward=74)
    kept = count_passes(walk, 1, 12, 1, Plan(checkpoint=False))
    assert (kept.recompute, kept.replay) == (0, 48)
    assert count_passes(walk, 1, 12, 1, Plan(guidance=2)).forwards == 2 * plain.forwards


def test_8_bits_make_the_steps_after_the_window_cheaper_and_no_others() -> None:
    exact = Plan(speedups=FASTEST, share_prefix=True)
    int8 = exact.after_window(attention="int8", linears=True)
    assert int8.with_exact_steps() == exact
    for walk, cheaper in ((Walk(9, 4, 0), False), (Walk(0, 4, 9), True)):
        run = replace(paper_run(), walks={walk: 1})
        assert (run.seconds(A800, int8).rollout < run.seconds(A800, exact).rollout) == cheaper
    prefix, tail = (
        [
            phase_work(TransformerCost(), plan, Walk(9, 4, 9), 1, 12, 1, A800)[f"rollout/{name}"]
            for plan in (exact, int8)
        ]
        for name in ("prefix", "tail")
    )
    assert prefix[0] == prefix[1] and tail[1].seconds < tail[0].seconds


@pytest.mark.parametrize("share", [True, False])
def test_rollout_counts_equal_what_the_sampler_spends(share: bool) -> None:
    from conditions import Cond

    from geoalign.config.flow import FlowConfig
    from geoalign.flow.sampler import FlowSampler
    from geoalign.flow.table import StepWindow, build_step_table

    table = build_step_table(FlowConfig(steps=11, tail_ratio=0.5), StepWindow(2, 5))
    cond, noise, groups = Cond(torch.zeros(3)), torch.zeros(3, 2), torch.arange(3)
    sampler = FlowSampler(table, 4, share_prefix=share)
    run = sampler.rollout(lambda x, timestep, cond: 0 * x, cond, noise, seed=0, iteration=0, group_ids=groups)
    spent = run.forwards
    predicted = count_passes(Walk(2, 3, table.num_steps - 5), 3, 4, 1, Plan(share_prefix=share))
    assert (spent.prefix, spent.window, spent.tail) == (predicted.prefix, predicted.window, predicted.tail)


def test_the_unshared_run_costs_what_the_paper_reports() -> None:
    """About 130 h on 64 A800: 396 forwards and 48 backwards per condition. A plausibility check, not a fit."""
    run = paper_run()
    (count,) = run.passes(Plan()).values()
    assert (count.forwards, count.backward) == (64 * 396, 64 * 48)
    hours = run.hours(A800, Plan(), 64)
    assert hours == pytest.approx(130, rel=0.05)
    assert run.hours(A800, Plan(), 32) == pytest.approx(2 * hours)
    # 64 conditions on 48 devices: some carry two, the others wait.
    assert run.hours(A800, Plan(), 48) == pytest.approx(2 * hours)


@pytest.mark.parametrize("updates", [1, 4])
def test_the_ladder_only_descends(updates: int) -> None:
    ladder = climb(paper_run(updates), A800, 64)
    reached = [ladder.reference_hours, *(rung.cumulative_hours for rung in ladder.rungs)]
    assert reached == sorted(reached, reverse=True) and ladder.total == reached[-1]
    assert all(rung.alone_hours < ladder.reference_hours for rung in ladder.rungs)
    streamed = [rung for rung in ladder.rungs if rung.lever.one_update]
    assert bool(streamed) == (updates == 1)


def test_levers_leave_the_samples_alone() -> None:
    """A lever of the ladder is EXACT: it may touch neither precision nor what is learned from."""
    changing = {"attention", "int8_linears", "guidance", "learned_steps", "learned_members"}
    assert not any({*lever.plan, *lever.speedups} & changing for lever in LEVERS)

"""The loop on a CUDA device: bitwise ratios, levers that change nothing, resume, and a whole run. Needs one GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import LONG_S
from training_cases import Brightness, gradient_of, smoke, trainer_of

from geoalign.files.atomic import read_jsonl
from geoalign.jobs.train import run_training
from geoalign.training.trainer import Trainer

pytestmark = pytest.mark.gpu
WINDOW = {"kind": "fixed", "start": 1, "size": 2, "max_start": None}
# Heads of 32 channels: every attention core and the Triton kernels take them.
SETTINGS: dict[str, Any] = {"window": WINDOW, "advantage": {"weights": {}}, "model": {"heads": 3}}


def on_gpu(**changes: dict[str, Any]) -> Trainer:
    run = {"device": "cuda"} | changes.pop("run", {})
    return trainer_of(smoke(**SETTINGS | changes, run=run), rewards={"b": Brightness()})


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


LEVERS: list[Any] = [
    {},
    {"groups": {"rows_per_forward": 1}},
    {"levers": {"recompute": "keep_attention"}},
    {"levers": {"recompute": "full"}},
    {"levers": {"streaming": "graphs"}},
    {"levers": {"streaming": "device", "recompute": "keep_attention"}, "groups": {"rows_per_forward": 1}},
    {"levers": {"streaming": "host", "recompute": "keep_attention"}, "groups": {"rows_per_forward": 1}},
    pytest.param(
        {"run": {"compile": True}, "levers": {"recompute": "keep_attention"}}, marks=pytest.mark.timeout(LONG_S)
    ),
    {"ode": {"attention": "int8", "int8_threshold": 0.5}},
    {"scoring": {"chunk": 3, "beside_decode": True}},
]


@pytest.mark.parametrize("changes", LEVERS, ids=lambda c: str(c) if c else "default")
def test_ratio_is_one_bitwise_in_bfloat16(changes: dict[str, Any]) -> None:
    trainer = on_gpu(**changes)
    assert trainer.policy.dtype == torch.bfloat16 and trainer.policy.device.type == "cuda"
    for _ in range(2):
        metrics = trainer.step()
        assert metrics["parity/log_prob_diff_max"] == 0.0
        assert metrics["policy/ratio_min"] == metrics["policy/ratio_max"] == 1.0
        assert metrics["perf/forward_equivalents"] == metrics["perf/predicted_forward_equivalents"]
        assert metrics["policy/grad_norm"] > 0 and metrics["perf/peak_memory_gb"] > 0
    assert all(torch.isfinite(p).all() for p in trainer.engine.trained.values())


@pytest.mark.parametrize("streaming", ["device", "host"])
def test_streamed_gradients_equal_the_replayed_ones(streaming: str) -> None:
    """A replayed backward carries the advantage through bfloat16, a streamed one is scaled afterwards: every summand is
    rounded apart by up to 2^-8 (4e-3 seen on a CPU), four times that allowed."""
    serial = {"rows_per_forward": 1}
    replayed, streamed = on_gpu(groups=serial), on_gpu(groups=serial, levers={"streaming": streaming})
    replayed.step()
    streamed.step()
    found, expected = (
        torch.cat([v.grad.flatten() for v in t.engine._masters.values.values()])  # type: ignore[attr-defined, union-attr]
        for t in (streamed, replayed)
    )
    assert relative(found, expected) < 2**-6


def test_float32_on_the_gpu_agrees_with_the_cpu() -> None:
    """Same noise to 2e-6, other kernels: a whole iteration agrees to float32 rounding times its depth."""
    cpu = trainer_of(smoke(**SETTINGS, run={"device": "cpu"}), rewards={"b": Brightness()})
    gpu = on_gpu(run={"dtype": "float32"})
    expected, found = cpu.step(), gpu.step()
    assert found["reward/bright"] == pytest.approx(expected["reward/bright"], abs=1e-4)
    assert relative(gradient_of(gpu), gradient_of(cpu)) < 1e-2


def test_two_runs_and_a_resumed_one_are_equal_bit_for_bit() -> None:
    straight, again = on_gpu(), on_gpu()
    norms = [straight.step()["policy/grad_norm"] for _ in range(4)]
    assert [again.step()["policy/grad_norm"] for _ in range(2)] == norms[:2]
    resumed = on_gpu()
    resumed.load(again.state())
    assert [resumed.step()["policy/grad_norm"] for _ in range(2)] == norms[2:]


@pytest.mark.timeout(LONG_S)
def test_a_whole_run_with_the_tracker(tmp_path: Path) -> None:
    config = smoke(run={"device": "cuda", "dir": tmp_path / "run"}, data={"root": tmp_path / "data"})
    run_training(config)
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 2 and all(row["reward/invalid_fraction"] == 0 for row in rows)
    assert (tmp_path / "run" / "summary.json").exists()


def test_the_gelu_in_the_product_is_that_of_the_module() -> None:
    """cuBLASLt's tanh against torch's: both within a rounding of bfloat16 of float64."""
    block = on_gpu().policy.model.blocks[0].bfloat16()
    u = torch.randn(2, 64, block.config.dim, device="cuda").bfloat16()
    with torch.no_grad():
        inside, apart = block._feed_forward(u), block.ffn(u)
    assert relative(inside.double(), apart.double()) <= 2.0**-7


@pytest.fixture
def torch_as_before() -> Iterator[None]:
    """`run.deterministic` sets switches of the whole process."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.enable_mem_efficient_sdp(True)
    torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.usefixtures("torch_as_before")
@pytest.mark.parametrize("streaming", ["off", "graphs"])
def test_a_deterministic_run_repeats_bit_for_bit(streaming: str) -> None:
    """Backwards included: two trainers, two iterations; attention longer than a block of keys: tests/kernels."""
    first, second = (on_gpu(run={"deterministic": True}, levers={"streaming": streaming}) for _ in range(2))
    for _ in range(2):
        a, b = first.step(), second.step()
        assert a["policy/grad_norm"] == b["policy/grad_norm"] and a["policy/loss"] == b["policy/loss"]

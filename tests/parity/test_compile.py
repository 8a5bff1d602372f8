"""Compiled blocks: rollout and learner run one graph, hence a ratio of 1 bit for bit; another graph is caught (R2).

Two tests, because each compiles for half a minute on a cold cache.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from training_cases import Brightness, Conditions, lively_policy, smoke

from geoalign.errors import RunError
from geoalign.models import layers
from geoalign.training.trainer import Trainer
from geoalign.types import Encodings, RetakeBatch
from geoalign_kernels.ops.modulated_norm import reference


class Texts(Conditions):
    """Conditions with a text, so that the cross-attention is more than a constant."""

    def batch(self, iteration: int, group_ids: list[int]) -> RetakeBatch:
        batch, generator = super().batch(iteration, group_ids), torch.Generator().manual_seed(5)
        return replace(batch, encodings=Encodings(context=torch.randn(len(batch), 8, 16, generator=generator)))


def compiled(dtype: str, recompute: str) -> Trainer:
    """One condition, rows one by one (one batch shape): a grad graph of the first block, one of the others, one without
    gradients."""
    config = smoke(
        run={"dtype": dtype, "compile": True},
        model={"text_length": 8},
        window={"kind": "fixed", "start": 3, "size": 2, "max_start": None},  # late steps are the sensitive ones
        groups={"conditions": 1, "size": 2, "rows_per_forward": 1},
        levers={"prune_source": False, "recompute": recompute},
        advantage={"weights": {}},
        train={"max_log_prob_diff": 0.0},
    )
    return Trainer(config, lively_policy(config), Texts(config), {"b": Brightness()})


def assert_exact(metrics: dict[str, float]) -> None:
    assert metrics["parity/log_prob_diff_max"] == 0.0
    assert metrics["policy/ratio_min"] == metrics["policy/ratio_max"] == 1.0
    assert metrics["policy/grad_norm"] > 0


def test_ratio_is_one_under_compile_in_float32_with_attention_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph keeps attention's output: the core runs once per block and replayed row, not again in the backward."""
    from geoalign_kernels.ops.attention import cores

    trainer, calls = compiled("float32", "keep_attention"), []
    original = cores.forward
    monkeypatch.setattr(cores, "forward", lambda *args: calls.append(1) or original(*args))
    metrics = trainer.step()
    assert_exact(metrics)
    forwards = metrics["perf/forwards_rollout"] + metrics["perf/forwards_learner"]
    assert len(calls) == forwards * len(trainer.policy.model.blocks)
    assert metrics["perf/forwards_recomputed"] == metrics["perf/backwards"] > 0


def rounding_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float, *, dtype: torch.dtype | None = None) -> Tensor:
    """A block's first norm that rounds once more without gradients, as a compiler may that fuses another graph.

    What the compiler itself does with plain operations differs between its versions and graphs; some agree by luck.
    """
    if not torch.is_grad_enabled():
        x = x.to(torch.bfloat16)
    return reference.modulated_norm(x.float(), scale, shift, eps, dtype)


def test_ratio_under_compile_in_bfloat16_and_a_rollout_by_another_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients the compiler fuses and rounds plain operations differently; the check must see it.

    The project's own epilogue is one opaque operator: both graphs call it, so they agree even then.
    """
    trainer = compiled("bfloat16", "none")
    assert_exact(trainer.step())
    monkeypatch.setattr(layers, "modulated_norm", rounding_norm)
    trainer = compiled("bfloat16", "none")
    assert_exact(trainer.step())
    sampler = trainer.sampler
    monkeypatch.setattr(trainer, "sampler", lambda *given: replace(sampler(*given), window_grad=False))
    with pytest.raises(RunError, match=r"do not run the same artefact .*compiled graph"):
        trainer.step()

"""The learner's parts one by one: masters, average, 8-bit states, checkpoint writer."""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from patience import PATIENCE_S
from torch import Tensor, nn
from training_cases import Brightness, Conditions, lively_policy, paper_like_trainer, smoke, trainer_of

from geoalign.config.training import OptimConfig, RunConfig, TrainConfig
from geoalign.errors import CheckpointError, ConfigError
from geoalign.jobs.metrics_file import MetricsWriter
from geoalign.training import checkpoint as checkpoints
from geoalign.training.engines.masters import MasterWeights, MovingAverage
from geoalign.training.engines.optim import freeze_all_but, set_learning_rate
from geoalign.training.engines.replicated import ReplicatedEngine
from geoalign.training.engines.snapshot import Snapshot
from geoalign.training.processes.ranks import LocalRanks
from geoalign.training.trainer import Trainer

WINDOW = {"kind": "fixed", "start": 1, "size": 2, "max_start": None}


class TestMasters:
    def test_gradients_of_low_precision_parameters_are_summed_in_float32(self) -> None:
        """256 + 1 is 256 in bfloat16: a sum over 65 backwards of gradient 1 after one of 256 must be 321."""
        weight = nn.Parameter(torch.tensor([1.0]))
        masters = MasterWeights({"w": weight}, torch.bfloat16)
        weight.data = weight.data.bfloat16()
        for factor in (256.0, *[1.0] * 65):
            (weight * factor).sum().backward()
        assert masters.gradients()[0].tolist() == [321.0] and weight.grad is None

    def test_masters_keep_what_rounding_takes(self) -> None:
        """Updates below half a bfloat16 step add up in the master until they reach the parameter."""
        weight = nn.Parameter(torch.tensor([1.0]))
        masters = MasterWeights({"w": weight}, torch.bfloat16)
        weight.data = weight.data.bfloat16()
        seen = []
        for _ in range(4):
            with torch.no_grad():
                masters.values["w"] += 0.0015  # bfloat16 has steps of 2^-7 = 0.0078 above 1
            masters.publish()
            seen.append(weight.item())
        assert seen == [1.0, 1.0, 1.0078125, 1.0078125]

    def test_masters_are_taken_before_the_cast(self) -> None:
        value = torch.tensor([1.0 + 2**-12])
        weight = nn.Parameter(value.clone())
        masters = MasterWeights({"w": weight}, torch.bfloat16)
        weight.data = weight.data.bfloat16()
        assert torch.equal(masters.values["w"].detach(), value) and weight.item() == 1.0

    def test_float32_parameters_are_their_own_masters(self) -> None:
        weight = nn.Parameter(torch.ones(3))
        assert MasterWeights({"w": weight}, torch.float32).values["w"] is weight
        assert MasterWeights({"w": weight}, torch.float32, separate=True).values["w"] is not weight

    def test_the_average_follows_its_recurrence_and_swaps_in_place(self) -> None:
        value = torch.tensor([0.0])
        average = MovingAverage({"w": value}, 0.9)
        for number in (1.0, 2.0):
            value.fill_(number)
            average.update()
        expected = 0.9 * (0.9 * 0.0 + 0.1 * 1.0) + 0.1 * 2.0
        assert average.state()["w"].item() == pytest.approx(expected, rel=1e-6)
        average.swap()
        assert value.item() == pytest.approx(expected, rel=1e-6) and average.state()["w"].item() == 2.0
        assert MovingAverage({"w": value}, 0.0).state()["w"] is not None


class TestOptimizer:
    def engine(self, states: str = "int8") -> ReplicatedEngine:
        torch.manual_seed(0)
        # torchao keeps tensors below 4096 elements in float32: one of either kind.
        trained = {"large": nn.Parameter(torch.randn(64, 64)), "small": nn.Parameter(torch.randn(5))}
        config = OptimConfig(lr=1e-2, states=states, grad_clip=1e9, weight_decay=0.0, schedule="linear", warmup=2)  # type: ignore[arg-type]
        return ReplicatedEngine(trained, config, LocalRanks(), torch.float32)

    def run(self, engine: ReplicatedEngine, steps: range) -> Tensor:
        config = OptimConfig(lr=1e-2, schedule="linear", warmup=2)
        for step in steps:
            engine.begin()
            set_learning_rate(engine.optimizer, config, step, 10)
            generator = torch.Generator().manual_seed(step)
            gradients = {n: torch.randn(p.shape, generator=generator) for n, p in engine.trained.items()}
            engine.accumulate(gradients)
            with torch.compiler.set_stance("force_eager"):  # torchao compiles its step, which costs a minute here
                engine.step()
        return torch.cat([p.detach().flatten() for p in engine.trained.values()])

    def test_8_bit_states_follow_float32_states(self) -> None:
        """Block-wise 8-bit moments are off by at most 1/127 of a block's largest: updates agree to a few per cent."""
        start = self.run(self.engine(), range(0))
        eight, full = self.run(self.engine(), range(6)), self.run(self.engine("float32"), range(6))
        assert float((eight - full).norm() / (full - start).norm()) < 0.05
        assert not torch.equal(eight, full)

    def test_8_bit_states_resume_bit_for_bit(self) -> None:
        straight, first = self.engine(), self.engine()
        expected = self.run(straight, range(6))
        self.run(first, range(3))
        snapshot = first.snapshot()
        assert {"exp_avg.codes", "exp_avg.scale"} <= set(snapshot.optimizer["large"])
        second = self.engine()
        second.restore(snapshot)
        assert torch.equal(self.run(second, range(3, 6)), expected)
        with pytest.raises(CheckpointError, match=r"quantised; resume with optim\.states=int8"):
            self.engine("float32").restore(snapshot)

    def test_a_missing_package_names_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torchao.optim", None)
        with pytest.raises(ConfigError, match=r"pip install '\.\[gpu\]' in a clone of geoalign"):
            self.engine()

    def test_parameters_behind_a_kept_condition_cannot_be_trained(self) -> None:
        model = lively_policy(smoke()).model
        assert freeze_all_but(model, r"\.ffn\.")
        for pattern in (r"cross_attn\.k\.", "text_embedding", "patch_embedding"):
            with pytest.raises(ConfigError, match="kept with the condition"):
                freeze_all_but(model, pattern)

    def test_parameters_of_a_text_that_is_not_there_cannot_be_trained(self) -> None:
        """Over one token the cross-attention is a constant of the condition, whoever asks for its gradient."""
        for pattern in (r"cross_attn\.o\.", r"norm3"):
            with pytest.raises(ConfigError, match="kept with the condition"):
                freeze_all_but(lively_policy(smoke()).model, pattern)
        config = smoke(model={"text_length": 8}, optim={"trainable": r"cross_attn\.o\.", "groups": ()})
        with pytest.raises(ConfigError, match="no prepared text"):
            Trainer(config, lively_policy(config), Conditions(config), {"b": Brightness()}).step()

    @pytest.mark.parametrize("kept", [True, False])
    @pytest.mark.parametrize(
        "pattern",
        [
            r"self_attn\.",
            r"rope_phase_vo",
            r"self_attn\.q|rope_phase_qk",
            r"blocks\.[1-3]\.self_attn",
            r"cross_attn\.o",
        ],
    )
    def test_no_gradient_is_lost_behind_a_kept_condition(self, pattern: str, kept: bool) -> None:
        optim = {"trainable": pattern, "groups": (), "grad_clip": 1e9}
        groups = {"conditions": 1, "size": 2, "rows_per_forward": None}
        trainer = paper_like_trainer(window=WINDOW, optim=optim, groups=groups, levers={"cache_phases": kept})
        trainer.step()
        assert not [name for name, p in trainer.engine.trained.items() if p.grad is None or not p.grad.norm() > 0]

    @pytest.mark.parametrize("pattern", [r"camera_gain", r"blocks\.[1-3]\.self_attn"])
    def test_no_gradient_of_geometric_phases_is_lost(self, pattern: str) -> None:
        config = smoke(window=WINDOW, optim={"trainable": pattern, "groups": ()}, advantage={"weights": {}})
        trainer = trainer_of(config, rewards={"b": Brightness()})
        trainer.step()
        assert not [name for name, p in trainer.engine.trained.items() if p.grad is None or not p.grad.norm() > 0]

    def test_an_update_that_is_not_finite_is_left_out(self) -> None:
        engine = self.engine("float32")
        before = self.run(engine, range(0))
        engine.begin()
        engine.accumulate({"small": torch.full((5,), float("nan"))})
        assert engine.step() != engine.step()  # NaN
        assert torch.equal(self.run(engine, range(0)), before)


class TestCheckpointWriter:
    state = checkpoints.TrainState(3, Snapshot({"w": torch.ones(2)}, {"w": torch.ones(2)}, {}), {})

    def test_training_goes_on_while_a_checkpoint_is_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gate, order = threading.Event(), []
        original = checkpoints.save_sealed

        def slow(*args: Any, **options: Any) -> str:
            assert gate.wait(PATIENCE_S)
            return original(*args, **options)

        monkeypatch.setattr(checkpoints, "save_sealed", slow)
        with checkpoints.CheckpointWriter(tmp_path, checkpoints.RunSettings("x", {}), TrainConfig()) as writer:
            writer.save(self.state)
            order.append("training")  # reached although nothing is written yet
            assert checkpoints.list_checkpoints(tmp_path) == []
            gate.set()
        assert order == ["training"] and [p.name for p in checkpoints.list_checkpoints(tmp_path)] == ["step_000003"]

    @pytest.mark.parametrize("asynchronous", [False, True])
    def test_a_full_disk_is_reported_and_leaves_older_checkpoints_alone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
    ) -> None:
        settings = TrainConfig(async_checkpoints=asynchronous)
        with checkpoints.CheckpointWriter(tmp_path, checkpoints.RunSettings("x", {}), settings) as writer:
            writer.save(self.state)

        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(checkpoints, "save_sealed", full)
        with (
            pytest.raises(CheckpointError, match=r"No space left on device\); free disk space, then --resume auto"),
            checkpoints.CheckpointWriter(tmp_path, checkpoints.RunSettings("x", {}), settings) as writer,
        ):
            writer.save(replace(self.state, iteration=4))
        assert [p.name for p in tmp_path.iterdir()] == ["step_000003"]
        assert (
            checkpoints.load_checkpoint(tmp_path / "step_000003", config=checkpoints.RunSettings("x", {})).iteration
            == 3
        )


def test_weights_and_biases_gets_every_row_and_continues_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in with the calls that are used: init(project, name, dir, id, resume), log(row, step), finish."""
    runs: list[Any] = []

    def init(**options: Any) -> Any:
        run = SimpleNamespace(options=options, rows=[], code=None)
        run.log = lambda row, step: run.rows.append((step, row))
        run.finish = lambda exit_code: setattr(run, "code", exit_code)
        runs.append(run)
        return run

    settings = RunConfig(name="n", wandb="project")
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for first in (0, 1):
        with MetricsWriter(tmp_path, settings, first) as writer:
            writer.write(first, {"reward/trans": -1.0})
    assert [run.rows for run in runs] == [[(0, {"reward/trans": -1.0})], [(1, {"reward/trans": -1.0})]]
    assert runs[0].options == runs[1].options
    assert runs[0].options["project"] == "project" and runs[0].options["resume"] == "allow" and runs[0].code == 0
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[wandb\]' in a clone of geoalign"):
        MetricsWriter(tmp_path, settings)

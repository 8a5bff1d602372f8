"""Steps that take no log-probability, or two passes: the 8-bit twin and classifier-free guidance."""

from __future__ import annotations

import collections
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from training_cases import Brightness, Conditions, lively_policy, smoke, trainer_of

from geoalign.errors import ConfigError, UsageError
from geoalign.flow.rollout import Rollout
from geoalign.flow.sampler import FlowSampler
from geoalign.flow.table import StepWindow
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.models.conditioning import Conditioning
from geoalign.models.dit import RetakeDiT
from geoalign.models.fast import attention_modes, fast_twin, set_attention_modes
from geoalign.training.processes.ranks import LocalRanks, Operation
from geoalign.training.trainer import Trainer
from geoalign.types import Encodings, RetakeBatch
from geoalign_kernels import ProbedInt8Attention

WINDOW = {"kind": "fixed", "start": 1, "size": 2, "max_start": None}


class Operators(TorchDispatchMode):
    """Counts the operators that run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


class TestFastTwin:
    @pytest.mark.parametrize("mode", ["int8", "int8_fp8"])
    def test_ode_steps_run_8_bit_and_the_ratio_stays_one(self, mode: str) -> None:
        """The twin shares the trained parameters, the window does not see it, and the videos differ by its rounding."""
        ode = {"attention": mode, "linears": "int8", "int8_threshold": 0.5}
        exact = trainer_of(smoke(window=WINDOW, advantage={"weights": {}}), rewards={"b": Brightness()})
        fast = trainer_of(smoke(window=WINDOW, advantage={"weights": {}}, ode=ode), rewards={"b": Brightness()})
        twin = fast.policy.fast
        assert twin is not None
        assert twin.blocks[0].self_attn.q.weight is fast.policy.model.blocks[0].self_attn.q.weight
        assert type(twin.blocks[0].ffn[0].weight) is not nn.Parameter
        reference, operators = exact.step(), Operators()
        with operators:
            metrics = fast.step()
        assert operators.names[f"geoalign::attention_{mode}"] > 0
        assert {block.self_attn.mode for block in twin.blocks} == {mode}
        assert metrics["parity/log_prob_diff_max"] == 0.0 and metrics["policy/ratio_max"] == 1.0
        assert metrics["reward/bright"] != reference["reward/bright"]
        assert metrics["reward/bright"] == pytest.approx(reference["reward/bright"], abs=0.05)

    @pytest.mark.parametrize("share", [True, False])
    def test_the_window_begins_where_exact_steps_lead(self, share: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """Bit for bit the states that are trained without approximations; what follows the window differs."""
        found: list[Rollout] = []
        original = FlowSampler.rollout

        def kept(self: FlowSampler, *args: Any, **settings: Any) -> Rollout:
            found.append(original(self, *args, **settings))
            return found[-1]

        monkeypatch.setattr(FlowSampler, "rollout", kept)
        levers = {"share_prefix": share, "merge_first_step": share}
        for ode in ({}, {"attention": "int8", "linears": "int8", "int8_threshold": 0.5}):
            config = smoke(window=WINDOW, advantage={"weights": {}}, levers=levers, ode=ode)
            trainer_of(config, rewards={"b": Brightness()}).step()
        exact, fast = found
        assert exact.forwards.prefix == fast.forwards.prefix == (2 if share else 8)
        for name in ("x_start", "x_next", "log_prob"):
            assert torch.equal(getattr(exact, name), getattr(fast, name)), name
        assert not torch.equal(exact.final, fast.final)

    def test_layers_are_settled_once_a_tail_went_through_all_noise_of_the_run(self) -> None:
        """With random windows the first one may leave a tail of low noise alone, which says nothing of the others."""
        window = {"kind": "random", "size": 1, "max_start": 4}
        config = smoke(window=window, advantage={"weights": {}}, ode={"attention": "int8", "int8_threshold": 0.5})
        trainer = trainer_of(config, rewards={"b": Brightness()})
        for start, settled in ((4, False), (0, True)):
            trainer.schedule = lambda _, start=start: StepWindow(start, start + 1)  # type: ignore[assignment]
            trainer.step()
            assert ("ode_modes" in trainer.notes) == settled

    def test_a_resumed_run_keeps_the_modes_that_were_measured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without a second measurement, whose other inputs could choose otherwise; bit for bit."""
        config = smoke(
            window=WINDOW,
            advantage={"weights": {}},
            ode={"attention": "int8", "linears": "exact", "int8_threshold": 0.5},
        )
        whole = trainer_of(config, rewards={"b": Brightness()})
        whole.step()
        state, expected = whole.state(), whole.step()
        assert state.notes["ode_modes"] == ["int8"] * config.model.layers
        monkeypatch.setattr(ProbedInt8Attention, "_choose", None)
        resumed = trainer_of(config, rewards={"b": Brightness()})
        resumed.load(state)
        assert resumed.step()["policy/grad_norm"] == expected["policy/grad_norm"]

    def test_ranks_that_measured_differently_keep_the_more_exact_mode(self) -> None:
        class BesideAnExactFirstLayer(LocalRanks):
            def collective(self, tensor: Tensor, operation: Operation) -> Tensor:
                if operation == "max" and tensor.shape == (layers,) and not tensor.is_floating_point():
                    return torch.maximum(tensor, torch.tensor([1] + [0] * (layers - 1)))
                return tensor

        config = smoke(window=WINDOW, advantage={"weights": {}}, ode={"attention": "int8", "int8_threshold": 0.5})
        layers = config.model.layers
        trainer = trainer_of(config, BesideAnExactFirstLayer(), rewards={"b": Brightness()})
        trainer.step()
        assert trainer.policy.fast is not None
        assert attention_modes(trainer.policy.fast) == ["exact"] + ["int8"] * (layers - 1)
        assert not set_attention_modes(trainer.policy.fast, ["int8_fp8"] * layers)  # of another configuration

    def test_layers_that_int8_spoils_stay_exact(self) -> None:
        policy = lively_policy(smoke())
        policy.model.requires_grad_(False)
        twin = fast_twin(policy.model, attention=("int8_fp8", "int8"), threshold=1e-9, linears=False)
        batch = Conditions(smoke()).batch(0, [0])
        precomputed = policy.precompute(policy.condition(batch))
        x, time = torch.randn(1, *policy.latent_shape(batch)), torch.tensor([500.0])
        with torch.no_grad():
            expected = policy.model(x, time, precomputed.conditioning, precomputed.cache)
            for _ in range(2):  # the measuring call and the next
                assert torch.equal(twin(x, time, precomputed.conditioning, precomputed.cache), expected)
        assert {block.self_attn.mode for block in twin.blocks} == {"exact"}


class TestGuidance:
    def test_both_passes_share_what_comes_before_the_text(self) -> None:
        """Against two separate forwards in float64; block 0 attends once, the others twice as many rows."""
        torch.manual_seed(0)
        config = smoke(model={"text_length": 6}).model
        model = RetakeDiT(config).double().requires_grad_(False)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.2)
        camera = CameraTrajectory.build(torch.eye(4).repeat(2, 5, 1, 1), (0.8, 1.1, 0.5, 0.5)).to(dtype=torch.float64)
        plane = torch.tensor([[0.0, 0.0, 1.0, 8.0]], dtype=torch.float64).repeat(2, 1)
        text, other = torch.randn(2, 2, 6, 16).double()
        latents, x = torch.randn(2, 81, 5, 3, 4).double(), torch.randn(2, 81, 4, 3, 4).double()
        cond = Conditioning(latents, camera, camera, plane, text, None, other)
        rows: list[int] = []
        for block in model.blocks:
            block.self_attn.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
        time = torch.tensor([900.0, 200.0]).double()
        both = model(x, time, cond)
        assert rows == [2, 4, 4, 4]
        expected = [model(x, time, replace(cond, context=c, negative=None)) for c in (text, other)]
        torch.testing.assert_close(both, torch.cat(expected), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("streaming", ["off", "graphs", "host"])
    def test_a_guided_run_keeps_the_ratio_and_counts_both_passes(self, streaming: str) -> None:
        class Texts(Conditions):
            def batch(self, iteration: int, group_ids: list[int]) -> RetakeBatch:
                batch, generator = super().batch(iteration, group_ids), torch.Generator().manual_seed(5)
                context, negative = torch.randn(2, len(batch), 8, 16, generator=generator)
                return replace(batch, encodings=Encodings(context=context, negative=negative))

        changes = {
            "window": WINDOW, "advantage": {"weights": {}}, "groups": {"rows_per_forward": 1},
            "levers": {"streaming": streaming},
        }  # fmt: skip
        config, plain_config = smoke(**changes, model={"text_length": 8}, flow={"guidance": 5.0}), smoke(**changes)
        metrics = Trainer(config, lively_policy(config), Texts(config), {"b": Brightness()}).step()
        assert metrics["parity/log_prob_diff_max"] == 0.0 and metrics["policy/ratio_max"] == 1.0
        assert metrics["perf/forward_equivalents"] == metrics["perf/predicted_forward_equivalents"]
        plain = trainer_of(plain_config, rewards={"b": Brightness()}).step()
        assert metrics["perf/forward_equivalents"] == 2 * plain["perf/forward_equivalents"]

        class OneText(Texts):
            def batch(self, iteration: int, group_ids: list[int]) -> RetakeBatch:
                batch = super().batch(iteration, group_ids)
                assert batch.encodings is not None
                return replace(batch, encodings=replace(batch.encodings, negative=None))

        for conditions, refusal, said in (
            (OneText, ConfigError, "needs the embedding of a negative prompt"),
            (Conditions, UsageError, "this model reads text, and there is none"),
        ):
            with pytest.raises(refusal, match=said):
                Trainer(config, lively_policy(config), conditions(config), {"b": Brightness()}).step()

"""The attention core of a run: by the card, by name, or by a measurement that all ranks share and checkpoints keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from training_cases import Brightness, smoke, trainer_of

from geoalign.errors import ConfigError
from geoalign.training import attention_choice
from geoalign.training.attention_choice import choose
from geoalign.training.processes.ranks import LocalRanks, Operation
from geoalign_kernels.ops.attention import cores

CUDA, BF16 = torch.device("cuda"), torch.bfloat16


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A CUDA card that is not there: its name, capability, and the cores that run on it."""

    def pretend(name: str, capability: tuple[int, int], *there: str) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(cores, "why_not", lambda core, device, dtype: "" if core in there else "not here")

    return pretend


def test_auto_takes_the_fastest_core_of_the_card(card: Callable[..., None]) -> None:
    config, everything = smoke(), ("flash3", "sdpa_cudnn", "flash2", "sdpa_flash", "triton", "reference")
    for name, capability, there, expected in (
        ("NVIDIA H200", (9, 0), everything, "flash3"), ("NVIDIA H200", (9, 0), everything[1:], "sdpa_cudnn"),
        ("NVIDIA H200", (9, 0), everything[2:], "flash2"), ("NVIDIA H200", (9, 0), everything[3:], "sdpa_flash"),
        ("NVIDIA A800-SXM4-80GB", (8, 0), everything, "flash2"),
        ("NVIDIA A800-SXM4-80GB", (8, 0), everything[3:], "sdpa_flash"),
        ("NVIDIA A800-SXM4-80GB", (8, 0), (), "reference"),
    ):  # fmt: skip
        card(name, capability, *there)
        assert choose(config, CUDA, BF16, LocalRanks()).core == expected
    card("NVIDIA H200", (9, 0), *everything)
    repeatable = smoke(run={"deterministic": True})
    assert choose(repeatable, CUDA, BF16, LocalRanks()).core == "flash2"


def test_int8_is_used_where_it_is_expected_to_pay(card: Callable[..., None]) -> None:
    config = smoke(ode={"attention": "int8"})
    card("NVIDIA A800-SXM4-80GB", (8, 0), "flash2")
    assert choose(config, CUDA, BF16, LocalRanks()).quantised
    card("NVIDIA H200", (9, 0), "flash3")
    choice = choose(config, CUDA, BF16, LocalRanks())
    assert not choice.quantised and "ode.attention=int8 is not used" in choice.why
    card("NVIDIA H200", (9, 0), "sdpa_flash")
    assert choose(config, CUDA, BF16, LocalRanks()).quantised
    assert "expected, 1.32 at the low end" in choose(config, CUDA, BF16, LocalRanks()).why
    fp8 = smoke(ode={"attention": "int8_fp8"})
    assert choose(fp8, CUDA, BF16, LocalRanks()).quantised
    card("NVIDIA H200", (9, 0), "sdpa_cudnn")  # by its own rate, not by int8's, and by the low end of it
    choice = choose(fp8, CUDA, BF16, LocalRanks())
    assert (
        not choice.quantised and "int8_fp8 is not used: 1.32 times the rate of sdpa_cudnn expected, 1.10" in choice.why
    )
    card("NVIDIA A800-SXM4-80GB", (8, 0), "flash2")  # which has no fp8: refused where the network is made
    assert choose(fp8, CUDA, BF16, LocalRanks()).quantised
    card("NVIDIA L40S", (8, 9), "sdpa_flash")  # no rates are known: as configured
    assert choose(config, CUDA, BF16, LocalRanks()).quantised
    assert choose(config, torch.device("cpu"), torch.float32, LocalRanks()).quantised


def test_a_named_core_that_cannot_run_or_repeat_is_refused(card: Callable[..., None]) -> None:
    card("NVIDIA H200", (9, 0), "sdpa_cudnn", "flash2")
    assert choose(smoke(run={"attention": "sdpa_cudnn"}), CUDA, BF16, LocalRanks()).core == "sdpa_cudnn"
    with pytest.raises(ConfigError, match=r"run.attention=flash3: not here; use run.attention=auto"):
        choose(smoke(run={"attention": "flash3"}), CUDA, BF16, LocalRanks())
    with pytest.raises(ConfigError, match="does not repeat"):
        choose(smoke(run={"attention": "sdpa_cudnn", "deterministic": True}), CUDA, BF16, LocalRanks())


class Two(LocalRanks):
    """This rank and another one, whose times are given."""

    size = 2

    def __init__(self, other: Tensor) -> None:
        self.other = other

    def collective(self, tensor: Tensor, operation: Operation) -> Tensor:
        assert operation == "sum"
        return tensor + self.other


def test_a_measurement_is_joined_over_ranks_and_weighed_by_the_passes_of_the_run(card: Callable[..., None]) -> None:
    card("NVIDIA L40S", (8, 9), "flash2", "sdpa_flash", "triton", "sdpa_cudnn")
    # seconds of (forward, forward and backward)
    table: dict[str, tuple[float, float]] = {
        "flash2": (1.0, 3.5), "sdpa_flash": (1.2, 3.0), "triton": (0.9, 9.0), "int8": (0.8, 0.0),
    }  # fmt: skip

    def timer(core: str, both: bool) -> float:
        if core == "sdpa_cudnn":
            raise RuntimeError("no execution plan")
        return table[core][both]

    config = smoke(run={"attention": "measured"}, ode={"attention": "int8"})
    weight = attention_choice._forwards_per_backward(config)
    totals = {core: weight * one + both for core, (one, both) in table.items() if core != "int8"}
    choice = choose(config, CUDA, BF16, LocalRanks(), timer=timer)
    assert choice.core == min(totals, key=lambda core: totals[core])
    assert choice.quantised == (table[choice.core][0] / 0.8 >= 1.15) and "measured" in choice.why
    # the other rank finds this core slow: both take the next one
    place = cores.CORES.index(choice.core)
    other = torch.zeros(len(cores.CORES) + 1, 2, dtype=torch.float64)
    other[place] = 100.0
    joined = choose(config, CUDA, BF16, Two(other), timer=timer).core
    del totals[choice.core]
    assert joined == min(totals, key=lambda core: totals[core])
    # a slow int8 is left out, with a line that says it
    table["int8"] = (0.95, 0.0)
    left_out = choose(config, CUDA, BF16, LocalRanks(), timer=timer)
    assert left_out.quantised == (table[left_out.core][0] / 0.95 >= 1.15)
    assert ("not used" in left_out.why) == (not left_out.quantised)


def test_a_run_measures_once_and_its_checkpoint_remembers(monkeypatch: pytest.MonkeyPatch) -> None:
    """On this CPU, with times that change their minds."""
    fastest = ["reference"]

    def seconds(config: Any, device: Any, core: str, both: bool) -> float:
        return 1.0 if core == fastest[0] else 2.0

    # The plain reference is no candidate of a measurement: the two cores here are torch's and ours, as if interpreted.
    monkeypatch.setattr(cores, "why_not", lambda core, *_: "" if core in ("sdpa_flash", "sdpa_cudnn") else "no")
    monkeypatch.setattr("geoalign.training.kept_choice.why_not", lambda core, *_: "" if core == "sdpa_flash" else "no")
    monkeypatch.setattr(attention_choice, "_seconds", seconds)
    config = smoke(run={"attention": "measured"}, advantage={"weights": {}})
    fastest[0] = "sdpa_flash"
    first = trainer_of(config, rewards={"b": Brightness()})
    assert first.policy.model.execution.core == "sdpa_flash"
    state = first.state()
    assert state.notes["attention_core"] == "sdpa_flash"
    fastest[0] = "sdpa_cudnn"
    resumed = trainer_of(config, rewards={"b": Brightness()})
    assert resumed.policy.model.execution.core == "sdpa_cudnn"
    resumed.load(state)
    assert resumed.policy.model.execution.core == "sdpa_flash" == resumed.notes["attention_core"]
    # a core that is not here any more is replaced
    other = trainer_of(config, rewards={"b": Brightness()})
    monkeypatch.setattr("geoalign.training.kept_choice.why_not", lambda *_: "gone")
    other.load(state)
    assert other.policy.model.execution.core == "sdpa_cudnn" == other.notes["attention_core"]


def test_a_checkpoint_remembers_whether_8_bit_attention_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gain near the bound flips from start to start, and would change the videos of one seed."""
    there = ["sdpa_flash", "sdpa_cudnn"]
    seconds = {"sdpa_flash": 1.0, "sdpa_cudnn": 2.0, "int8": 0.8, "int8_fp8": 0.5}
    monkeypatch.setattr(cores, "why_not", lambda core, *_: "" if core in ("sdpa_flash", "sdpa_cudnn") else "no")
    monkeypatch.setattr("geoalign.training.kept_choice.why_not", lambda core, *_: "" if core in there else "gone")
    monkeypatch.setattr(attention_choice, "_seconds", lambda config, device, core, both: seconds[core])

    def started(mode: str = "int8", attention: str = "measured") -> Any:
        config = smoke(run={"attention": attention}, advantage={"weights": {}}, ode={"attention": mode})
        return trainer_of(config, rewards={"b": Brightness()})

    with_int8 = started().state()
    assert with_int8.notes["ode_quantised"] is True
    seconds["int8"] = 0.9
    without = started().state()
    assert without.notes["ode_quantised"] is False
    # Slower now, used before: used.
    trainer = started()
    assert trainer.policy.fast is None
    trainer.load(with_int8)
    fast = trainer.policy.fast
    assert fast is not None and fast.execution.probe is not None and fast.execution.core == "sdpa_flash"
    assert all(own is shared for own, shared in zip(fast.parameters(), trainer.policy.model.parameters(), strict=True))
    assert trainer.notes["ode_quantised"] is True and trainer.state().notes["ode_quantised"] is True
    # Faster now, left out before: left out.
    seconds["int8"] = 0.5
    trainer = started()
    assert trainer.policy.fast is not None
    trainer.load(without)
    assert trainer.policy.fast is None and trainer.notes["ode_quantised"] is False
    # What was found for another mode, or beside a core that is gone, is found anew.
    trainer = started("int8_fp8")
    trainer.load(without)
    assert trainer.policy.fast is not None and trainer.notes["ode_quantised"] is True
    seconds["sdpa_cudnn"] = 0.9  # the fastest now, and 1.8 times int8; sdpa_flash is gone
    there.remove("sdpa_flash")
    trainer = started()
    trainer.load(without)
    assert trainer.notes["attention_core"] == "sdpa_cudnn" and trainer.policy.fast is not None
    # Without a measurement nothing is remembered.
    trainer = started(attention="auto")
    trainer.load(without)
    assert trainer.policy.fast is not None and trainer.notes["ode_quantised"] is True


def test_the_measurement_itself_runs_here() -> None:
    choice = choose(smoke(run={"attention": "measured"}, ode={"attention": "int8"}), torch.device("cpu"), torch.float32,
                    LocalRanks())  # fmt: skip
    assert choice.core == "sdpa_flash" and "ms" in choice.why and "ode.attention=int8" in choice.why


def test_a_deterministic_run_turns_off_what_does_not_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on: asked.update(deterministic=on))
    for name in ("enable_mem_efficient_sdp", "enable_cudnn_sdp"):
        monkeypatch.setattr(torch.backends.cuda, name, lambda on, name=name: asked.update({name: on}))
    trainer_of(smoke(run={"deterministic": True}, advantage={"weights": {}}), rewards={"b": Brightness()})
    assert asked == {"deterministic": True, "enable_mem_efficient_sdp": False, "enable_cudnn_sdp": False}

"""Options that would do nothing, or not what they promise, are refused where the configuration is read."""

from __future__ import annotations

import inspect
import math
import re
from typing import Any

import pytest
from pydantic import ValidationError

from geoalign.config import schema
from geoalign.config.load import load_config
from geoalign.config.schema import Config
from geoalign.errors import ConfigError
from geoalign.rewards.geometry import GeometryReward
from geoalign.rewards.registry import build_rewards


@pytest.mark.parametrize(
    ("sections", "text"),
    [
        ({"flow": {"sde": "dance"}}, "longcat does not even out the steps of flow.sde dance; set .* exact_inverse"),
        ({"flow": {"sde": "cps"}, "objective": {"loss_weight": "longcat"}}, "steps of flow.sde cps"),
        ({"flow": {"sde": "linear"}}, "steps of flow.sde linear"),
        ({"flow": {"noise_cap": 0.3}}, "noise_cap 0.3 is read by sde: longcat_truncated only, not by flow"),
        ({"flow": {"sde": "dance", "noise_cap": 0.3}, "objective": {"loss_weight": "none"}}, "not by dance"),
    ],
)
def test_what_the_sampler_does_not_read_or_even_out_is_refused(sections: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        Config.model_validate(sections)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"flow": {"sde": "longcat_truncated", "noise_cap": 0.3}},
        {"flow": {"sde": "dance"}, "objective": {"loss_weight": "exact_inverse"}},
        {"flow": {"sde": "cps"}, "objective": {"loss_weight": "guard"}},
        {"flow": {"sde": "linear"}, "objective": {"loss_weight": "exact_inverse"}},
    ],
)
def test_what_acts_is_taken_and_so_is_its_resolved_form(sections: dict[str, Any]) -> None:
    config = Config.model_validate(sections)
    assert Config.model_validate(config.model_dump()) == config


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "path",
    [
        "advantage.weights.trans", "advantage.floors.trans", "advantage.floor", "advantage.clip", "objective.clip",
        "objective.kl_weight", "flow.eta", "optim.lr", "train.max_log_prob_diff", "pretrain.lr",
    ],
)  # fmt: skip
def test_settings_that_are_no_finite_number_are_refused(path: str, value: float) -> None:
    section: Any = value
    for name in reversed(path.split(".")):
        section = {name: section}
    with pytest.raises(ValidationError, match=r"finite number|greater than"):
        Config.model_validate(section)
    with pytest.raises(ConfigError, match=rf"{path}.*(finite number|greater than)"):
        load_config(Config, "smoke", [f"{path}={str(value).replace('inf', '.inf').replace('nan', '.nan')}"])


SERIAL = "groups.rows_per_forward=1"
REFUSED: list[tuple[str, str]] = [
    ("window.start=5", "window.start=2"),
    ("window.max_start=9", "window.max_start=2"),
    ("flow.sde=dance objective.loss_weight=longcat", "objective.loss_weight=exact_inverse"),
    ("flow.guidance=5", "flow.guidance=1"),
    ("flow.guidance=5", "model.text_length=16"),
    ("optim.updates_per_rollout=3", "optim.updates_per_rollout=2"),
    ("optim.updates_per_rollout=2 groups.rows_per_forward=4", "groups.rows_per_forward=2"),
    ("levers.share_prefix=false", "levers.merge_first_step=false"),
    ("levers.streaming=graphs optim.updates_per_rollout=2", "optim.updates_per_rollout=1"),
    ("levers.streaming=graphs optim.updates_per_rollout=2", "levers.streaming=off"),
    ("levers.streaming=graphs objective.kl_weight=0.1", "objective.kl_weight=0"),
    ("levers.streaming=graphs objective.kl_weight=0.1", "levers.streaming=off"),
    ("levers.streaming=graphs levers.merge_first_step=false", "levers.merge_first_step=true"),
    ("levers.streaming=graphs levers.merge_first_step=false", "levers.streaming=off"),
    ("levers.streaming=device", SERIAL),
    ("levers.streaming=device", "levers.streaming=graphs"),
    (f"levers.streaming=host parallel.engine=fsdp {SERIAL}", "levers.streaming=graphs"),
    (f"levers.streaming=host parallel.engine=fsdp {SERIAL}", "levers.streaming=off"),
    ("learn.window_steps=9", "learn.window_steps=1"),
    ("learn.window_steps=9", "learn.window_steps=null"),
    (f"learn.members=9 {SERIAL}", "learn.members=4"),
    (f"learn.members=9 {SERIAL}", "learn.members=null"),
    (f"learn.members=2 levers.streaming=graphs {SERIAL}", "levers.streaming=off"),
    (f"learn.members=2 optim.updates_per_rollout=2 {SERIAL}", "optim.updates_per_rollout=1"),
    ("learn.members=2", SERIAL),
    ("learn.short_frames=3", "learn.short_iterations=1"),
    ("learn.short_iterations=1", "learn.short_frames=3"),
    ("learn.short_frames=81 learn.short_iterations=1", "learn.short_frames=3"),
    ("learn.short_frames=81 learn.short_iterations=1", "learn.short_frames=null learn.short_iterations=0"),
    ("ode.audit_every=1", "ode.audit_every=0"),
    ("parallel.sequence=3", "parallel.sequence=2"),
    ("parallel.sequence=4 data.width=48", "data.width=64"),
    ("parallel.engine=fsdp ode.linears=int8", "ode.linears=exact"),
    ("parallel.engine=fsdp optim.states=int8", "optim.states=float32"),
]
"""Settings that cannot be combined, and what their error advises."""


def refusal(wrong: str) -> str:
    """What is said of settings on a command line, without their place."""
    with pytest.raises(ConfigError) as refused:
        load_config(Config, "smoke", wrong.split())
    return re.sub(r"^command line \([^)]*\): ", "", str(refused.value))


@pytest.mark.parametrize(("wrong", "fix"), REFUSED)
def test_every_refusal_names_what_to_set_and_that_helps(wrong: str, fix: str) -> None:
    said = refusal(wrong)
    for setting in fix.split():
        name, _, value = setting.partition("=")
        assert name in said or f"settings of {name.split('.')[0]}" in said
        words = ("off", "graphs", "null", "exact_inverse", "0", "1")
        assert value not in words or re.search(rf"\b{value}\b", said) or "neither" in said
    load_config(Config, "smoke", wrong.split() + fix.split())


def test_every_refusal_of_a_combination_is_tried() -> None:
    said = {re.sub(r"\d+|=(device|host)\b", "", refusal(wrong)) for wrong, _ in REFUSED}
    refusals = inspect.getsource(schema).count("raise ValueError(")
    assert len(said) == refusals - 1 + 1  # the name of a reward is tried below; a window has two ways not to fit


def test_a_reward_that_no_override_reaches_is_refused() -> None:
    with pytest.raises(
        ValidationError, match=r"rewards\.a\.b: no setting section\.key=value reaches a name with a dot"
    ):
        Config.model_validate({"rewards": {"a.b": {"kind": "hpsv3"}}})


def test_an_option_of_a_reward_may_be_infinite() -> None:
    config = load_config(Config, "smoke", ["rewards.geometry.options.translation_bound=.inf"])
    assert config.rewards["geometry"].options["translation_bound"] == math.inf
    reward = build_rewards(config.rewards)["geometry"]
    assert isinstance(reward, GeometryReward) and reward.translation_bound == math.inf

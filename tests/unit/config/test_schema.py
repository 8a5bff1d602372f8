"""Options that would do nothing, or not what they promise, are refused where the configuration is read."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError

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

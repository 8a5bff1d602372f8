"""Options that would do nothing, or not what they promise, are refused where the configuration is read."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from geoalign.config.schema import Config


@pytest.mark.parametrize(
    ("sections", "text"),
    [
        ({"flow": {"sde": "dance"}}, "longcat does not even out the steps of flow.sde dance; set .* exact_inverse"),
        ({"flow": {"sde": "cps"}, "objective": {"loss_weight": "longcat"}}, "steps of flow.sde cps"),
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
    ],
)
def test_what_acts_is_taken_and_so_is_its_resolved_form(sections: dict[str, Any]) -> None:
    config = Config.model_validate(sections)
    assert Config.model_validate(config.model_dump()) == config

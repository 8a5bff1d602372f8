"""The committed result file of the evaluators is what docs/evaluators.md claims of it."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_metres_scale_rest_moving_things_and_noise_are_read_as_claimed() -> None:
    result = json.loads((ROOT / "docs" / "results" / "evaluators.json").read_text())
    for rows in result["behaviour"].values():
        assert abs(rows["raw render"]["read_over_asked"] - 1) < 0.05
        assert abs(rows["half the motion"]["read_over_asked"] - 0.5) < 0.05
        assert rows["pure rotation"]["read_over_asked"] < 0.05
        assert rows["moving foreground"]["translation_median_m"] < 0.1
        assert rows["noise alone"]["tracked"] < 0.05

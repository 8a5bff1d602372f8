"""The search for factors on the request, on bases whose best factors are known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.usefixtures("studies")
BEST = torch.tensor([1.3, 0.6, 1.5, 1.25])


class Known:
    """A base that travels ``1 / BEST`` times what is asked, and whose errors are smallest a little below that."""

    def __init__(self, shrink: float = 1.0) -> None:
        self.best = BEST * shrink
        self.config = SimpleNamespace(world=SimpleNamespace(frames=5), pretrain=SimpleNamespace(bias_growth=(0.4, 0.8)))
        self.plain = self(1.0)

    def __call__(self, factor: float | torch.Tensor) -> dict[str, Any]:
        factors = torch.tensor([factor, factor, factor, 1.0]) if isinstance(factor, float) else factor
        gap = (factors / self.best).log().square()
        gain = factors / BEST
        gains = gain if gain.dim() == 1 else gain.mean(0)
        by_frame = gain.expand(5, 4)[1:]
        return {
            "position": float(0.1 + gap[..., :3].sum(-1).mean()),
            "rotation": float(0.5 + gap[..., 3].mean()),
            "gains": gains,
            "by_frame": by_frame,
        }

    def cost(self, answer: dict[str, Any]) -> float:
        return answer["position"] / self.plain["position"] + answer["rotation"] / self.plain["rotation"]


def test_the_single_factor_is_the_geometric_mean_of_the_best_ones() -> None:
    import oracles

    wanted = float(BEST[:3].log().mean().exp())  # of squared log errors; 1.05
    assert oracles.best_single(Known()) == pytest.approx(wanted, abs=0.02)


@pytest.mark.parametrize("shrink", [1.0, 0.9])
def test_the_factors_per_axis_are_found(shrink: float) -> None:
    """Also where the errors are smallest at other factors than those that make the gains 1."""
    import oracles

    found = oracles.best_per_axis(Known(shrink))
    assert torch.allclose(found, BEST * shrink, rtol=0.01)


def test_factors_per_frame_are_kept_only_where_they_are_better() -> None:
    """A base that errs alike in all frames is mended by the factors per axis; one that errs late is not."""
    import oracles

    same = oracles.best_per_axis_and_frame(Known(), BEST)
    assert torch.equal(same, BEST.expand(5, 4))
    growing = Known()
    growing.best = BEST ** (torch.tensor([0.4, 0.6, 0.8, 1.0, 1.2])[:, None])
    found = oracles.best_per_axis_and_frame(growing, BEST)
    assert growing.cost(growing(found)) < growing.cost(growing(BEST)) and (found[-1] > found[1]).tolist() == [
        True,
        False,
        True,
        True,
    ]


def test_errors_by_frame_are_those_of_that_frame() -> None:
    import oracles

    wanted = torch.eye(4).repeat(3, 3, 1, 1)
    estimated = wanted.clone()
    estimated[:, 1, 0, 3] = 1.0
    estimated[:, 2, 1, 3] = torch.tensor([2.0, 4.0, 0.0])
    estimated[2] = torch.nan  # a camera that could not be read
    found = oracles.mean_by_frame(estimated, wanted)
    assert found["translation_error_m"] == pytest.approx([1.0, 3.0]) and found["rotation_error_deg"] == [0, 0]

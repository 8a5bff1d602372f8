"""Train from Python with a reward of your own beside the geometry reward.

    python examples/train_own_reward.py [PRESET] [section.key=value ...]

A reward has a name, keys and a call; its options are the keyword arguments of `__init__`, checked against their types
when they come from a configuration. Higher is better; scores are normalised within each group of retakes.
"""

import sys

import torch

from geoalign import RewardOutput, train


class SteadyLight:
    """Minus the change of mean brightness from frame to frame: flicker costs."""

    name, keys = "steady_light", ("steady",)

    def __init__(self, power: float = 1.0) -> None:
        self.power = power

    def __call__(self, videos: torch.Tensor, batch) -> RewardOutput:  # videos: [B, F, 3, H, W] in [-1, 1]
        brightness = videos.float().mean(dim=(2, 3, 4))
        change = brightness.diff(dim=1).abs().pow(self.power).mean(1)  # [B]
        return RewardOutput(scores={"steady": -change}, valid=torch.isfinite(change), parts={"flicker": change})


def main(preset: str = "smoke", *overrides: str) -> None:
    own = [
        "rewards.light.kind=train_own_reward:SteadyLight",  # module:Class, imported where the run trains
        "rewards.light.options.power=0.5",
        "advantage.weights.steady=0.25",
    ]
    folder = train(preset, "run.name=own_reward", *own, *overrides)
    print(f"trained with rewards/light: {folder}")


if __name__ == "__main__":
    main(*sys.argv[1:])

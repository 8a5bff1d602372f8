"""Training runs that need no file: rendered conditions, a lively policy, a linear reward, simulated ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from patience import PATIENCE_S
from torch import Tensor

from geoalign.config.load import load_config
from geoalign.config.schema import Config
from geoalign.models.parallel import SequenceParallel
from geoalign.policy.files import new_policy
from geoalign.policy.policy import RetakePolicy
from geoalign.rewards.base import Reward, RewardOutput
from geoalign.rewards.registry import build_rewards
from geoalign.training.processes.ranks import Operation, Ranks
from geoalign.training.trainer import Trainer
from geoalign.types import Encodings, RetakeBatch, SourceClip
from geoalign.world.pairs import paired_videos

_SEEDING = threading.Lock()  # fake ranks are threads, and torch's generator is shared


class Conditions:
    """A pure function of (iteration, group id), as the data set is."""

    def __init__(self, config: Config, dtype: torch.dtype = torch.float32) -> None:
        assert config.world is not None
        self.world, self.dtype = config.world, dtype

    def batch(self, iteration: int, group_ids: list[int]) -> RetakeBatch:
        generator = torch.Generator().manual_seed(1000 + iteration)
        batch = paired_videos(self.world, 8, generator, style="real").batch.select(group_ids)
        if self.dtype == torch.float32:
            return batch
        source = batch.source
        assert source.ground_plane is not None
        wide = SourceClip(
            source.video.to(self.dtype),
            source.camera.to(dtype=self.dtype),
            source.ground_plane.to(self.dtype),
            source.clip_ids,
        )
        return replace(batch, source=wide, target_camera=batch.target_camera.to(dtype=self.dtype))


# The paper's kind of model, small: adapter, learned phases, text and image branch, latents of the video autoencoder.
PAPER_LIKE = {
    "model": {
        "in_channels": 32, "out_channels": 16, "patch": (1, 2, 2), "text_length": 8, "image_dim": 12,
        "camera": "learned", "pluecker_adapter": True, "time_stride": 4, "space_stride": 8, "first_frame_given": False,
        "data_variance": None, "timestep_dtype": "bfloat16", "rope_theta": (1e4, 1e4), "rope_scale": (1.0, 1.0),
    },
    "codec": {"kind": "wan_vae"},
}  # fmt: skip


class Encoded(Conditions):
    """Conditions that come with everything `geoalign prepare` stores, as random numbers."""

    def batch(self, iteration: int, group_ids: list[int]) -> RetakeBatch:
        batch = super().batch(iteration, group_ids)
        latents, context, image, negative = (
            torch.stack([_normal(shape, iteration, group) for group in group_ids])
            for shape in ((16, 2, 6, 8), (8, 16), (5, 12), (8, 16))
        )
        return replace(batch, encodings=Encodings(latents, context, image, negative))


class Shades:
    """Stands in for the video autoencoder: every video has the mean of its latents as its one grey."""

    def to(self, _: torch.device) -> Shades:
        return self

    def latent_shape(self, *_: int) -> tuple[int, int, int, int]:
        return 16, 2, 6, 8

    def decode(self, latents: Tensor) -> Tensor:
        return latents.mean((1, 2, 3, 4)).view(-1, 1, 1, 1, 1).expand(-1, 5, 3, 8, 8)


class Brightness:
    """Scores that are linear in the pixels: rounding of a video moves them by as much, not by what a tracker makes."""

    name, keys = "brightness", ("bright",)

    def __call__(self, videos: Tensor, batch: RetakeBatch) -> RewardOutput:
        score = videos.double().mean((1, 2, 3, 4))
        return RewardOutput({"bright": score}, torch.ones(len(videos), dtype=torch.bool, device=videos.device))


def smoke(preset: str = "smoke", **changes: dict[str, Any]) -> Config:
    """A preset with sections changed, validated again.

    Untrained policies make noise, in which no camera can be read. Without a bound none is lost, so that all teach.
    """
    config = load_config(Config, preset, ["rewards.geometry.options.min_tracked=0"])
    sections = {name: getattr(config, name).model_copy(update=update) for name, update in changes.items()}
    return Config.model_validate(config.model_copy(update=sections).model_dump())


def lively_policy(config: Config, dtype: torch.dtype = torch.float32) -> RetakePolicy:
    """A fresh policy without any zero-initialised part that could hide an error."""
    with _SEEDING:
        policy = new_policy(config.model, config.codec, seed=3)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            generator = torch.Generator().manual_seed(parameter.numel())
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    policy.model.to(dtype)
    return policy


def trainer_of(
    config: Config,
    ranks: Ranks | None = None,
    *,
    rewards: Mapping[str, Reward] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Trainer:
    """A trainer of a lively policy on rendered conditions."""
    scorers = build_rewards(config.rewards) if rewards is None else rewards
    return Trainer(config, lively_policy(config, dtype), Conditions(config, dtype), scorers, ranks)


def paper_like_trainer(ranks: Ranks | None = None, *, weights: torch.dtype = torch.float32, **changes: Any) -> Trainer:
    """A trainer of the paper's kind of model, whose files hold ``weights``."""
    config = smoke(**PAPER_LIKE | {"optim": {"groups": ()}, "advantage": {"weights": {}}} | changes)
    policy = replace(lively_policy(smoke(model=PAPER_LIKE["model"]), weights), codec=Shades())  # type: ignore[arg-type]
    return Trainer(config, policy, Encoded(config), {"b": Brightness()}, ranks)


def _normal(shape: tuple[int, ...], *key: int) -> Tensor:
    generator = torch.Generator().manual_seed(hash((len(shape), *shape, *key)) % (1 << 31))
    return torch.randn(shape, generator=generator)


def gradient_of(trainer: Trainer) -> Tensor:
    """The (summed, clipped) gradient of the last update as one vector, on the CPU."""
    return torch.cat([p.grad.detach().flatten().cpu() for p in trainer.engine.trained.values()])  # type: ignore[union-attr]


class FakeRanks(Ranks):
    """One of several ranks that live in threads of this process; collectives meet at a barrier."""

    def __init__(self, rank: int, size: int, board: list[Any], barrier: threading.Barrier, sequence: int = 1) -> None:
        self.rank, self.size, self.sequence = rank, size, sequence
        self._board, self._barrier = board, barrier

    def collective(self, tensor: Tensor, operation: Operation) -> Tensor:
        self._board[self.rank] = tensor.clone()
        self._barrier.wait()
        stacked = torch.stack(self._board)
        self._barrier.wait()
        return stacked.sum(0) if operation == "sum" else getattr(stacked, f"a{operation}")(0)

    def sequence_group(self) -> SequenceParallel | None:
        if self.sequence == 1:
            return None
        first = self.rank - self.sequence_rank

        def exchange(rows: Tensor) -> Tensor:
            self._board[self.rank] = rows.detach().clone()
            self._barrier.wait()
            received = torch.stack([self._board[first + r][self.sequence_rank] for r in range(self.sequence)])
            self._barrier.wait()
            return received

        return SequenceParallel.register(f"fake {self.rank}", self.sequence_rank, self.sequence, exchange)


def on_fake_ranks(size: int, work: Callable[[Ranks], Any], sequence: int = 1) -> list[Any]:
    """``work`` on every rank of ``size``, each in a thread; their results in order."""
    board: list[Any] = [None] * size
    barrier, results, failures = threading.Barrier(size, timeout=PATIENCE_S), [None] * size, []

    def run(rank: int) -> None:
        try:
            results[rank] = work(FakeRanks(rank, size, board, barrier, sequence))
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return results

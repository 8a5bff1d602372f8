"""``GroupRollout``: group sampling and replay for any velocity network, from plain tensors.

What ``FlowSampler`` does, without a condition class: prefix shared by a group, noise by counter, any grid and any set
of stochastic steps, log-probabilities whose replay is equal bit for bit while the policy is unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from geoalign.config.flow import SdeVariant
from geoalign.errors import UsageError
from geoalign.flow.policy import PhasedPolicy, Velocity, VelocityFn
from geoalign.flow.rollout import Rollout
from geoalign.flow.sampler import FlowSampler, ReplayStep, WindowObserver, initial_noise
from geoalign.flow.table import StepTable

Network = Callable[..., Tensor]
"""velocity [B, ...] = f(x [B, ...] float32, timestep [B], **tensors), each tensor [B, ...]; any floating dtype."""


@dataclass(frozen=True, slots=True, eq=False)
class NetworkInputs:
    """What the network is given beside state and time, for M conditions.

    Attributes:
        tensors: keyword arguments of the network, [M, ...] each.
        negative: those that the negative prompt replaces, [M, ...] each; empty: no classifier-free guidance.
    """

    tensors: Mapping[str, Tensor]
    negative: Mapping[str, Tensor]

    def repeat_interleave(self, count: int) -> NetworkInputs:
        """Each condition ``count`` times in a row."""
        return self._map(lambda tensor: tensor.repeat_interleave(count, 0))

    def select(self, index: Tensor | slice) -> NetworkInputs:
        """The conditions at int64 [N] or in a slice."""
        return self._map(lambda tensor: tensor[index if isinstance(index, slice) else index.to(tensor.device)])

    def _map(self, change: Callable[[Tensor], Tensor]) -> NetworkInputs:
        parts = ({name: change(tensor) for name, tensor in part.items()} for part in (self.tensors, self.negative))
        return NetworkInputs(*parts)


@dataclass(frozen=True, slots=True, eq=False)
class GroupSamples:
    """G trajectories for each of M conditions, with what their replay needs; row i belongs to condition i // G.

    Attributes:
        rollout: states, log-probabilities [M * G, K], final latents, counted network evaluations.
        inputs: of the M conditions.
    """

    rollout: Rollout
    inputs: NetworkInputs

    @property
    def latents(self) -> Tensor:
        """[M * G, ...] float32 at sigma = 0."""
        return self.rollout.final

    @property
    def log_prob(self) -> Tensor:
        """[M * G, K] float32: element means, one column per stochastic step."""
        return self.rollout.log_prob


class GroupRollout:
    """Samples groups with one network, and replays their stochastic steps for the learner.

    Args:
        network: the velocity; called the same way in rollout and replay, so that both run the same kernels: stochastic
            steps with gradients enabled in both, also under ``torch.no_grad``. Dropout must be off, and an autocast
            context that is on during the rollout must be on during the replay.
        table: steps (``StepTable.from_sigmas``).
        group_size: G.
        guidance: scale of classifier-free guidance; read where negative tensors are given. Each velocity then takes two
            passes, one after the other.
        rows_per_forward: largest batch of one forward; None: all rows at once. Rollout and replay use the same batches.
        share_prefix: compute once per condition what its members have in common; the numbers are the same without.
        fast: an approximate network for the deterministic steps after the first stochastic one (other kernels, 8-bit).
            It CHANGES the videos; the stochastic steps and those before them never use it.
        decode: latents [n, ...] to videos.
    """

    def __init__(
        self,
        network: Network,
        table: StepTable,
        group_size: int,
        *,
        guidance: float = 1.0,
        rows_per_forward: int | None = None,
        share_prefix: bool = True,
        fast: Network | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        exact = _velocity(network, guidance)
        cheap = exact if fast is None else _velocity(fast, guidance)
        self.table, self._decode = table, decode
        self._policy = PhasedPolicy(window=exact, tail=cheap)
        self._sampler = FlowSampler(table, group_size, share_prefix, rows_per_forward)

    @classmethod
    def from_pipeline(
        cls,
        pipeline: Any,
        steps: int,
        group_size: int,
        *,
        sde: SdeVariant = "flow",
        eta: float = 0.7,
        stochastic: Iterable[int] | None = None,
        **settings: Any,
    ) -> GroupRollout:
        """Over the transformer, scheduler and autoencoder of a diffusers Wan pipeline (one transformer).

        The network takes ``prompt_embeds`` [M, L, D] (and the same as negative) and, from image to video,
        ``image_embeds`` [M, 257, D] and ``condition`` [M, C, T, h, w], which follows the latents in the channels.

        Args:
            pipeline: diffusers' ``WanPipeline`` or ``WanImageToVideoPipeline``. Its scheduler is set to ``steps``
                steps; the grid is what the scheduler makes of them.
            steps: of the grid.
            group_size: G.
            sde, eta: form and level of the stochastic steps.
            stochastic: their indices; default all but the last.
            **settings: the other arguments of ``GroupRollout``.

        Raises:
            UsageError: a pipeline with two transformers or timesteps per token.
        """
        if getattr(pipeline, "transformer_2", None) is not None or pipeline.config.get("expand_timesteps"):
            raise UsageError(
                "GroupRollout.from_pipeline knows Wan pipelines with one transformer and one timestep per sample; "
                "write the velocity as a function and give it to GroupRollout"
            )
        pipeline.scheduler.set_timesteps(steps)
        noisy = range(steps - 1) if stochastic is None else stochastic
        grid = pipeline.scheduler.sigmas, pipeline.scheduler.timesteps
        table = StepTable.from_sigmas(*grid, sde=sde, eta=eta, stochastic=noisy)
        settings.setdefault("decode", decoder_of(pipeline))
        return cls(_wan_network(pipeline.transformer), table, group_size, **settings)

    def sample(
        self,
        tensors: Mapping[str, Tensor],
        *,
        negative: Mapping[str, Tensor] | None = None,
        shape: Sequence[int] | None = None,
        latents: Tensor | None = None,
        seed: int = 0,
        iteration: int = 0,
        group_ids: Tensor | None = None,
        member_ids: Tensor | None = None,
        observer: WindowObserver | None = None,
    ) -> GroupSamples:
        """G trajectories for each of M conditions.

        Args:
            tensors: keyword arguments of the network, [M, ...] each.
            negative: those that the negative prompt replaces, [M or 1, ...] each.
            shape: of one sample's latents; the groups' initial noise is then drawn by counter. Or
            latents: initial noise [M, ...], shared in each group ([M * G, ...] without a shared prefix).
            seed, iteration: name all noise together with the ids: equal numbers on any layout of ranks.
            group_ids: [M] int64, unique over all ranks of an iteration; default 0..M-1.
            member_ids: [G] int64, for groups that several ranks share; default 0..G-1.
            observer: see ``FlowSampler.rollout``.

        Raises:
            UsageError: sizes do not fit, neither or both of ``shape`` and ``latents``, a table without stochastic
                steps, or ``torch.inference_mode``.
        """
        inputs = _inputs(tensors, negative or {})
        group_ids, latents = _start(inputs, shape, latents, seed, iteration, group_ids)
        named = {"seed": seed, "iteration": iteration, "group_ids": group_ids, "member_ids": member_ids}
        rollout = self._sampler.rollout(self._policy, inputs, latents, **named, observer=observer)
        return GroupSamples(rollout, inputs)

    def sample_deterministic(
        self, tensors: Mapping[str, Tensor], latents: Tensor, *, negative: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """One trajectory per condition without noise, for evaluation: latents [M, ...] at sigma = 0.

        Euler steps on the same grid with the exact network, from initial noise [M, ...] (``initial_noise`` of
        ``geoalign.flow.sampler`` draws what ``sample`` draws). Tensors and errors as in ``sample``.
        """
        inputs = _inputs(tensors, negative or {})
        table = StepTable.from_sigmas(self.table.sigmas, self.table.timesteps)
        sampler = FlowSampler(table, rows_per_forward=self._sampler.rows_per_forward)
        return sampler.sample(self._policy.window, inputs, latents)

    def replay_batches(self, samples: GroupSamples, position: int) -> list[slice]:
        """Row batches of stochastic step ``position`` whose forwards have the shapes that the rollout had."""
        return self._sampler.replay_batches(samples.rollout, position)

    def replay(self, samples: GroupSamples, position: int, rows: slice | None = None) -> ReplayStep:
        """Log-probabilities of stochastic step ``position`` (0..K-1) under the network as it is now, with graph.

        Equal to ``samples.log_prob[rows, position]`` bit for bit while the network is unchanged and ``rows`` is one of
        ``replay_batches``. At the first position one forward serves all members of a group.
        """
        return self._sampler.replay(self._policy, samples.rollout, position, samples.inputs, rows)

    @torch.enable_grad()
    def log_prob_diff(self, samples: GroupSamples) -> float:
        """Largest |replayed - sampled| log-probability over all stochastic steps: 0 before the first update.

        Replays as the learner does, with gradients enabled whatever the caller's mode. Anything but 0 says that rollout
        and learner do not run the same artefact: other kernels, batch shape, dtype, compiled graph, dropout, autocast.
        It costs a forward per stored step.
        """
        worst = 0.0
        for position in range(samples.rollout.num_window_steps):
            for rows in self.replay_batches(samples, position):
                replayed = self.replay(samples, position, rows).log_prob.detach()
                worst = max(worst, float((replayed - samples.log_prob[rows, position]).abs().max()))
        return worst

    def videos(self, samples: GroupSamples, rows: slice | None = None) -> Tensor:
        """Decoded samples of ``rows`` (default all), see ``decoded``; from a pipeline [n, F, 3, H, W] in [-1, 1]."""
        return self.decoded(samples.latents if rows is None else samples.latents[rows])

    def decoded(self, latents: Tensor) -> Tensor:
        """Videos of latents [n, ...].

        Raises:
            UsageError: no decoder was given.
        """
        if self._decode is None:
            raise UsageError("this GroupRollout has no decoder: give decode= at construction, or use the latents")
        return self._decode(latents)


def _inputs(tensors: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> NetworkInputs:
    counts = {name: tensor.shape[0] for name, tensor in tensors.items()}
    if len(set(counts.values())) != 1:
        raise UsageError(f"tensors must hold one row per condition each, got {counts or 'none'}")
    count = next(iter(counts.values()))
    unfit = {name: t.shape[0] for name, t in negative.items() if name not in tensors or t.shape[0] not in (1, count)}
    if unfit:
        raise UsageError(f"negative tensors {unfit} must replace some of {sorted(counts)}, with 1 or {count} rows")
    spread = {name: tensor.expand(count, *tensor.shape[1:]) for name, tensor in negative.items()}
    return NetworkInputs(dict(tensors), spread)


def _start(
    inputs: NetworkInputs,
    shape: Sequence[int] | None,
    latents: Tensor | None,
    seed: int,
    iteration: int,
    group_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(group ids [M], initial latents)."""
    first = next(iter(inputs.tensors.values()))
    if group_ids is None:
        group_ids = torch.arange(first.shape[0], device=first.device)
    if group_ids.numel() != first.shape[0]:
        raise UsageError(f"{group_ids.numel()} group_ids for tensors of {first.shape[0]} conditions")
    if (shape is None) == (latents is None):
        raise UsageError("give the shape of one sample's latents, or the initial latents themselves")
    return group_ids, initial_noise(shape or (), seed, iteration, group_ids) if latents is None else latents


def _velocity(network: Network, guidance: float) -> VelocityFn:
    def velocity(x: Tensor, timestep: Tensor, inputs: NetworkInputs) -> Tensor | Velocity:
        value = network(x, timestep, **inputs.tensors)
        if not inputs.negative or guidance == 1.0:
            return value
        return Velocity(value, network(x, timestep, **{**inputs.tensors, **inputs.negative}), guidance)

    return velocity


def _wan_network(transformer: Any) -> Network:
    def network(
        x: Tensor,
        timestep: Tensor,
        *,
        prompt_embeds: Tensor,
        image_embeds: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        latents = x if condition is None else torch.cat([x, condition.to(x.dtype)], 1)
        return transformer(
            hidden_states=latents.to(transformer.dtype),
            timestep=timestep,
            encoder_hidden_states=prompt_embeds.to(transformer.dtype),
            encoder_hidden_states_image=None if image_embeds is None else image_embeds.to(transformer.dtype),
            return_dict=False,
        )[0]

    return network


def decoder_of(pipeline: Any) -> Callable[[Tensor], Tensor] | None:
    """Latents [n, C, T, h, w] to videos [n, F, 3, H, W] in [-1, 1] by the pipeline's autoencoder; None without one."""
    if getattr(pipeline, "vae", None) is None:
        return None
    from geoalign.models.wan_vae import WanCodec

    return WanCodec(pipeline.vae).decode

"""The audit of a run's approximate tails: one group is finished exactly as well, and what both teach is compared.

What it found (a fall back to exact tails, an audit that is still to be made) lies in the notes of the trainer, so
checkpoints remember it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from geoalign.config.schema import Config
from geoalign.errors import Refusal
from geoalign.flow.sampler import FlowSampler
from geoalign.flow.table import build_step_table, has_exact_tail
from geoalign.models.dit import RetakeDiT
from geoalign.perf.timer import phase
from geoalign.policy.policy import Precomputed, RetakePolicy
from geoalign.rewards.base import Reward
from geoalign.rl.advantage import group_advantage
from geoalign.rl.fidelity import LEAST_MEMBERS, Outcome, compare, told
from geoalign.rl.score import Scores
from geoalign.training.drift import ProfileFile
from geoalign.training.judged import judge
from geoalign.training.modes import is_exact
from geoalign.training.notes import kept
from geoalign.training.processes.ranks import RankRows, Ranks
from geoalign.types import RetakeBatch

logger = logging.getLogger(__name__)
EXACT = "exact_tail_since"
"""Key of the notes: the iteration after which an audit let the run go on with exact tails."""
OWED = "audit_owed"
"""Key of the notes: the group whose audit a later iteration makes, because the tails of this one are exact."""


def keep_exact(config: Config, notes: MutableMapping[str, Any], frames: int, file: ProfileFile | None) -> bool:
    """Whether a fall back to exact tails is noted; one that an audit of something else led to is dropped.

    Args:
        frames: of the videos of the iteration.
        file: of :func:`geoalign.training.drift.profile_file`.
    """
    ode = config.ode
    judged = ("int8_threshold", "audit_spearman", "audit_bias", "audit_margin", "audit_action")
    under = config.approximations() | {f"ode.{name}": getattr(ode, name) for name in judged}
    under |= {"ode.reuse_profile": None if file is None else file.content, "frames": frames}
    return kept(notes, EXACT, under, "the fall back to exact tails")


def approximates(sampler: FlowSampler, twin: RetakeDiT | None, config: Config, notes: Mapping[str, Any]) -> bool:
    """Whether the steps after the window are others than exact ones on the whole grid, so that an audit has work.

    They are not where the drift of reuse is measured, where a late window leaves a coarser tail no fewer steps, and
    where 8-bit attention does not pay on this card or no layer bears it.

    Args:
        sampler: of the iteration, with what it reuses.
        twin: network of its deterministic steps, if there is another.
        config, notes: of the run.
    """
    if sampler.drift is not None:
        return False
    other_steps = bool(sampler.reused) or not has_exact_tail(sampler.table, config.flow)
    return other_steps or not is_exact(twin, config, notes)


@dataclass(frozen=True, slots=True)
class Tail:
    """The steps after the window of this rank's rows [R], as they are before failed rows are set to zero.

    Attributes:
        group: that is audited, its global id.
        start: the states they began in.
        final: the latents they ended in.
    """

    group: int
    start: Tensor
    final: Tensor


@dataclass(frozen=True, slots=True)
class Audit:
    """What an audit found.

    Attributes:
        numbers: of ``fidelity/``.
        bad: those beyond their bounds, in words.
        passes: spent on this rank.
    """

    numbers: Mapping[str, float]
    bad: Sequence[str]
    passes: int


@dataclass(frozen=True, slots=True)
class Auditor:
    """Finishes one group of an iteration with an exact tail too, and compares what both teach.

    Attributes:
        config: ``ode.audit_*`` say how often, and what is done about a bad result.
        ranks, rank_rows: who holds which rollouts.
        rewards: the scorers of the run.
        device: of the rollouts.
    """

    config: Config
    ranks: Ranks
    rank_rows: RankRows
    rewards: Mapping[str, Reward]
    device: torch.device

    def due(self, iteration: int, notes: MutableMapping[str, Any], works: bool) -> int | None:
        """The group to audit in ``iteration``, or None; to be asked once in every iteration.

        Args:
            works: the iteration's tail is approximated (:func:`approximates`). Else an audit would compare exact with
                exact; the next iteration that approximates makes it.
        """
        ode = self.config.ode
        if ode.audit_every == 0 or EXACT in notes:
            return None
        group = notes.pop(OWED, None)
        if ode.audits(iteration):
            group = iteration // ode.audit_every % self.rank_rows.conditions
        if group is not None and not works:
            notes[OWED] = group
            return None
        return group

    def passes(self, group: int | None, sampler: FlowSampler) -> int:
        """Network passes that an audit of ``group`` takes on this rank."""
        window = sampler.table.window
        if group is None or window is None or group not in self.rank_rows.group_ids.tolist():
            return 0
        guidance = 2 if self.config.flow.guidance > 1 else 1
        return (self.config.flow.steps - window.stop) * self.rank_rows.member_ids.numel() * guidance

    def audit(
        self,
        tail: Tail,
        sampler: FlowSampler,
        policy: RetakePolicy,
        precomputed: Precomputed,
        batch: RetakeBatch,
        scores: Scores,
    ) -> Audit:
        """The fidelity of the group of ``tail``; a collective.

        Args:
            tail, sampler: of the iteration, this rank's rows.
            policy: whose exact network is run.
            precomputed, batch: this rank's conditions.
            scores: of all ranks, under the approximate tail.
        """
        group, size, keys = tail.group, self.rank_rows.group_size, sorted(scores.scores)
        found = torch.zeros(3 + len(keys), size, dtype=torch.float64)  # valid, lost, error, scores
        pairs = torch.zeros(2, dtype=torch.float64)  # sum and number of distances between members
        spent = 0
        if group in (held := self.rank_rows.group_ids.tolist()):
            place = held.index(group)
            with phase("audit"):
                final, spent = self._finish(place, sampler, tail, policy, precomputed)
                self._score(place, final, tail, policy, batch, keys, found, pairs)
        found, pairs = self.ranks.all_reduce(found, "sum", "audit"), self.ranks.all_reduce(pairs, "sum", "audit")
        rows = slice(group * size, (group + 1) * size)
        exact = replace(
            scores,
            valid=_with(scores.valid, rows, found[0] > 0),
            lost=_with(scores.lost, rows, found[1] > 0),
            scores={key: _with(scores.scores[key], rows, found[3 + n]) for n, key in enumerate(keys)},
        )
        distance = float(pairs[0] / pairs[1])  # NaN without a pair
        under_exact, under_tail = (outcome_of(each, self.config, size).select(rows) for each in (exact, scores))
        numbers = compare(under_exact, under_tail, error=found[2], distance=distance).numbers()
        bad = self._bad(numbers, told(under_exact, distance), group)
        return Audit(numbers | {"bad": float(len(bad))}, bad, spent)

    def _finish(
        self, place: int, sampler: FlowSampler, tail: Tail, policy: RetakePolicy, precomputed: Precomputed
    ) -> tuple[Tensor, int]:
        """The exact latents of the members here of the ``place``-th group here, and the passes spent."""
        assert sampler.table.window is not None
        exact = replace(
            sampler,
            table=build_step_table(self.config.flow.with_exact_tail(), sampler.table.window),
            reused=frozenset(),
            drift=None,
        )
        members = self.rank_rows.member_ids.numel()
        state = tail.start[place * members : (place + 1) * members]
        condition = precomputed.select(slice(place, place + 1))
        final, spent = exact.finish(policy.exact().phased(), condition, state)
        return final, spent.tail

    def _score(
        self,
        place: int,
        final: Tensor,
        tail: Tail,
        policy: RetakePolicy,
        batch: RetakeBatch,
        keys: list[str],
        found: Tensor,
        pairs: Tensor,
    ) -> None:
        """Fill in what the exact videos of the members that this rank scores are worth, and how far they are off."""
        members = self.rank_rows.member_ids.numel()
        first, scored = place * members, self.rank_rows.scored
        mine = scored[(scored >= first) & (scored < first + members)].to(self.device)  # [n] among the local rows
        if not len(mine):
            return
        local = mine - first
        judged = judge(
            policy,
            self.rewards,
            final[local],
            batch,
            torch.full_like(mine, place),
            chunk=self.config.scoring.chunk,
            beside=tail.final[mine],
        )
        columns, table = self.rank_rows.member_ids[local.cpu()], judged.scores
        found[0, columns], found[1, columns] = table.valid.double().cpu(), table.lost.double().cpu()
        found[2, columns] = judged.error
        for number, key in enumerate(keys):
            found[3 + number, columns] = table.scores[key].double().cpu()
        apart = judged.neighbours[torch.isfinite(judged.neighbours)]  # a failed video must not hide the others
        pairs += torch.tensor([float(apart.sum()), len(apart)], dtype=torch.float64)

    def _bad(self, numbers: Mapping[str, float], defined: Collection[str], group: int) -> list[str]:
        """The numbers beyond their bounds, in words, and those that the exact tail defines and the other made NaN.

        Where the exact tail itself leaves too little to compare, NaN is not bad, and the log says so.
        """
        ode = self.config.ode
        beyond = {"spearman": numbers["spearman"] < ode.audit_spearman}
        beyond |= {name: abs(value) > ode.audit_bias for name, value in numbers.items() if name.startswith("bias_")}
        words = {name: f"{name} {numbers[name]:.3g}" for name in beyond}
        if ode.audit_margin is not None:
            beyond["margin"] = numbers["margin"] < ode.audit_margin
            words["margin"] = f"videos {numbers['margin']:.3g} dB nearer to the exact ones than members to each other"
        undefined = [name for name in beyond if math.isnan(numbers[name])]
        if silent := [name for name in undefined if name not in defined]:
            logger.info(
                "audit of group %d: no %s, because the exact tail leaves fewer than %d members that differ (or, for "
                "the margin, no two neighbours on one rank)",
                group,
                ", ".join(silent),
                LEAST_MEMBERS,
            )
        bad = [words[name] for name, value in beyond.items() if value]
        return bad + [f"no {name} (NaN)" for name in undefined if name in defined]

    def refuse(self, bad: Sequence[str], iteration: int) -> bool:
        """Whether the run goes on with exact tails because an audit found something ``bad``; the log says so.

        Raises:
            Refusal: ``ode.audit_action`` is ``stop``.
        """
        ode = self.config.ode
        if not bad or ode.audit_action == "report":
            return False
        found = (
            f"iteration {iteration}: the approximate tail does not keep what a group teaches: {', '.join(bad)} "
            f"(bounds ode.audit_spearman={ode.audit_spearman:g}, ode.audit_bias={ode.audit_bias:g}, "
            f"ode.audit_margin={ode.audit_margin}) with "
            f"{', '.join(f'{name}={value}' for name, value in self.config.approximations().items())}"
        )
        if ode.audit_action == "stop":
            raise Refusal(
                f"{found}; take a finer setting (`geoalign fidelity run {self.config.asked} --json FILE` measures) or "
                "ode.audit_action=exact, and go on with --resume auto --allow-config-change",
                iteration,
                clean=True,
            )
        logger.warning("%s: from here on the tails are exact", found)
        return True


def outcome_of(scores: Scores, config: Config, size: int) -> Outcome:
    """What all samples of an iteration are worth, in groups of ``size`` rows."""
    groups = torch.arange(len(scores.valid)) // size
    advantage = group_advantage(scores.scores, scores.valid, groups, config.advantage, scores.lost)
    return Outcome(advantage.values, scores.scores, scores.valid, scores.lost)


def _with(values: Tensor, rows: slice, new: Tensor) -> Tensor:
    """A copy of ``values`` with some rows replaced."""
    changed = values.clone()
    changed[rows] = new.to(values.dtype)
    return changed

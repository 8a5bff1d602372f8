"""The steps after the window during a run: which are reused, and the audit that finishes a group exactly as well.

What was found (the drift that steps are chosen by, a fall back to exact tails) lies in the notes of the trainer, so
checkpoints remember it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from geoalign.config.schema import Config
from geoalign.config.training import TailReuse
from geoalign.errors import ConfigError, RunError, UsageError
from geoalign.files.forms import Form, filled
from geoalign.files.parsing import read_json_object
from geoalign.flow.reuse import DriftMeter, DriftProfile, reused_steps
from geoalign.flow.rollout import Rollout
from geoalign.flow.sampler import FlowSampler
from geoalign.flow.table import build_step_table
from geoalign.perf.timer import phase
from geoalign.policy.policy import Precomputed, RetakePolicy
from geoalign.rewards.base import Reward
from geoalign.rl.advantage import group_advantage
from geoalign.rl.fidelity import GroupFidelity, Outcome, compare
from geoalign.rl.score import Scores
from geoalign.training.judged import judge
from geoalign.training.processes.ranks import RankRows, Ranks
from geoalign.types import RetakeBatch

logger = logging.getLogger(__name__)
DRIFT = "tail_drift"
"""Key of the notes: the profile by which reused steps are chosen."""
EXACT = "exact_tail_since"
"""Key of the notes: the iteration after which an audit let the run go on with exact tails."""


class _ProfileForm(Form):
    sigmas: list[Annotated[float, Field(ge=0, le=1)]]
    drift: list[float]
    reuse: TailReuse = "off"


def read_profile(path: Path, reuse: TailReuse) -> DriftProfile:
    """The profile in a file of `geoalign fidelity choose`.

    Raises:
        ConfigError: it cannot be read, or it was measured with another kind of reuse than ``reuse``.
    """
    fix = "make it with `geoalign fidelity choose`"
    found = filled(_ProfileForm, read_json_object(path, ConfigError), path, fix, ConfigError)
    if found.reuse not in ("off", reuse):
        raise ConfigError(f"{path}: the drift of ode.reuse={found.reuse}, and the run says {reuse}; {fix}")
    try:
        return DriftProfile(found.sigmas, found.drift)
    except UsageError as error:
        raise ConfigError(f"{path}: {error}; {fix}") from error


def check_profile(config: Config) -> None:
    """Refuse a drift profile that cannot be used before anything is loaded; raises as :func:`read_profile`."""
    if config.ode.reuse != "off" and config.ode.reuse_profile is not None:
        read_profile(config.ode.reuse_profile, config.ode.reuse)


def with_reuse(sampler: FlowSampler, config: Config, notes: MutableMapping[str, Any]) -> FlowSampler:
    """The sampler with the steps that it reuses, chosen by the profile of the notes or of the file that is named.

    Without either it evaluates all steps and measures the profile: :func:`agree_on_drift` takes it from there.
    """
    if config.ode.reuse == "off":
        return sampler
    if DRIFT not in notes and config.ode.reuse_profile is not None:
        profile = read_profile(config.ode.reuse_profile, config.ode.reuse)
        notes[DRIFT] = {"sigmas": list(profile.sigmas), "drift": list(profile.drift)}
    if DRIFT not in notes:
        return replace(sampler, drift=DriftMeter(sampler.table))
    table = sampler.table
    assert table.window is not None
    count = config.ode.evaluated(table.num_steps - table.window.stop)
    return replace(sampler, reused=reused_steps(table, DriftProfile(**notes[DRIFT]), count))


def agree_on_drift(sampler: FlowSampler, ranks: Ranks, notes: MutableMapping[str, Any]) -> None:
    """Note the drift that the rollouts of all ranks showed, if this sampler measured it; a collective if it did."""
    meter = sampler.drift
    if meter is None:
        return
    meter.sums = ranks.all_reduce(meter.sums, "sum")
    profile = meter.profile()
    notes[DRIFT] = {"sigmas": list(profile.sigmas), "drift": list(profile.drift)}
    logger.info("ode.reuse: drift measured over %d steps of the first tail", len(profile.sigmas) - 1)


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

    def due(self, iteration: int, notes: Mapping[str, Any]) -> int | None:
        """The group to audit in ``iteration``, or None."""
        every = self.config.ode.audit_every
        if every == 0 or EXACT in notes or iteration % every:
            return None
        return iteration // every % self.rank_rows.conditions

    def passes(self, group: int | None, sampler: FlowSampler) -> int:
        """Network passes that an audit of ``group`` takes on this rank."""
        window = sampler.table.window
        if group is None or window is None or group not in self.rank_rows.group_ids.tolist():
            return 0
        guidance = 2 if self.config.flow.guidance > 1 else 1
        return (self.config.flow.steps - window.stop) * self.rank_rows.member_ids.numel() * guidance

    def audit(
        self,
        group: int,
        sampler: FlowSampler,
        rollout: Rollout,
        policy: RetakePolicy,
        precomputed: Precomputed,
        batch: RetakeBatch,
        scores: Scores,
    ) -> tuple[GroupFidelity, int]:
        """The fidelity of ``group``, and the passes spent here; a collective.

        Args:
            group: its global id.
            sampler, rollout: of the iteration, this rank's rows.
            policy: whose exact network is run.
            precomputed, batch: this rank's conditions.
            scores: of all ranks, under the approximate tail.
        """
        size, keys = self.rank_rows.group_size, sorted(scores.scores)
        found = torch.zeros(3 + len(keys), size, dtype=torch.float64)  # valid, lost, error, scores
        pairs = torch.zeros(2, dtype=torch.float64)  # sum and number of distances between members
        spent = 0
        if group in (held := self.rank_rows.group_ids.tolist()):
            place = held.index(group)
            with phase("audit"):
                final, spent = self._finish(place, sampler, rollout, policy, precomputed)
                self._score(place, final, rollout, policy, batch, keys, found, pairs)
        found, pairs = self.ranks.all_reduce(found, "sum", "audit"), self.ranks.all_reduce(pairs, "sum", "audit")
        rows = slice(group * size, (group + 1) * size)
        exact = replace(
            scores,
            valid=_with(scores.valid, rows, found[0] > 0),
            lost=_with(scores.lost, rows, found[1] > 0),
            scores={key: _with(scores.scores[key], rows, found[3 + n]) for n, key in enumerate(keys)},
        )
        distance = float(pairs[0] / pairs[1])  # NaN without a pair
        outcomes = (outcome_of(each, self.config, size).select(rows) for each in (exact, scores))
        return compare(*outcomes, error=found[2], distance=distance), spent

    def _finish(
        self, place: int, sampler: FlowSampler, rollout: Rollout, policy: RetakePolicy, precomputed: Precomputed
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
        state = rollout.x_next[-1][place * members : (place + 1) * members]
        condition = precomputed.select(slice(place, place + 1))
        final, spent = exact.finish(policy.exact().phased(), condition, state)
        return final, spent.tail

    def _score(
        self,
        place: int,
        final: Tensor,
        rollout: Rollout,
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
            beside=rollout.final[mine],
        )
        columns, table = self.rank_rows.member_ids[local.cpu()], judged.scores
        found[0, columns], found[1, columns] = table.valid.double().cpu(), table.lost.double().cpu()
        found[2, columns] = judged.error
        for number, key in enumerate(keys):
            found[3 + number, columns] = table.scores[key].double().cpu()
        pairs += torch.tensor([float(judged.neighbours[1:].sum()), len(mine) - 1], dtype=torch.float64)

    def refuse(self, numbers: Mapping[str, float], iteration: int) -> bool:
        """Whether the run goes on with exact tails, which is noted in the log.

        Raises:
            RunError: the fidelity is below a bound, and ``ode.audit_action`` is ``stop``.
        """
        ode = self.config.ode
        bad = [] if not numbers["spearman"] < ode.audit_spearman else [f"spearman {numbers['spearman']:.3g}"]
        bad += [
            f"{name} {value:.3g}"
            for name, value in numbers.items()
            if name.startswith("bias_") and abs(value) > ode.audit_bias
        ]
        margin = numbers["psnr"] - numbers["distance"]
        if ode.audit_margin is not None and margin < ode.audit_margin:
            bad.append(f"videos {margin:.3g} dB nearer to the exact ones than members to each other")
        if not bad or ode.audit_action == "report":
            return False
        found = (
            f"iteration {iteration}: the approximate tail does not keep what a group teaches: {', '.join(bad)} "
            f"(bounds ode.audit_spearman={ode.audit_spearman:g}, ode.audit_bias={ode.audit_bias:g}, "
            f"ode.audit_margin={ode.audit_margin}) with "
            f"{', '.join(f'{name}={value}' for name, value in self.config.approximations().items())}"
        )
        if ode.audit_action == "stop":
            raise RunError(f"{found}; take a finer setting (`geoalign fidelity run`), or ode.audit_action=exact")
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

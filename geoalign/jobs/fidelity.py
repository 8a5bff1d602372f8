"""The fidelity of approximate tails: from equal window states and noises, what the trainer would make of both.

For every setting and window: the exact rollout once, then the tail again under the setting, decoded and scored by the
run's rewards. Nothing is trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Self

import torch
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor

from geoalign.config.load import flatten
from geoalign.config.schema import Config
from geoalign.errors import DataError, UsageError
from geoalign.files.forms import Form, filled
from geoalign.flow.reuse import DriftProfile
from geoalign.flow.rollout import Rollout
from geoalign.flow.sampler import FlowSampler, initial_noise
from geoalign.flow.table import StepWindow, build_step_table
from geoalign.jobs.ladder import SAMPLER
from geoalign.jobs.pricing import exactly, hours, tail_cost
from geoalign.models.fast import attention_modes, in_dtype, set_attention_modes
from geoalign.perf.devices import DEVICES
from geoalign.policy.open import open_base
from geoalign.policy.policy import Precomputed, RetakePolicy
from geoalign.rewards.base import Reward
from geoalign.rewards.registry import build_rewards, close_rewards
from geoalign.rl.fidelity import GroupFidelity, compare, shortfalls, summary
from geoalign.training.drift import DRIFT, ProfileFile, agree_on_drift, profile_file, source_of_drift, with_reuse
from geoalign.training.judged import Judged, judge
from geoalign.training.modes import MODES
from geoalign.training.notes import under
from geoalign.training.processes.device import device_of, dtype_of
from geoalign.training.processes.ranks import LocalRanks
from geoalign.training.setup import ready, twin_of
from geoalign.training.tail import outcome_of
from geoalign.training.trainer import ConditionSource
from geoalign.types import RetakeBatch

CHANGEABLE = ("flow.tail_", "ode.", "run.dtype", "rewards.")
"""What a setting may change: the steps after the window, and (as controls) their precision and who scores."""


def check_setting(name: str, setting: Config, base: Config) -> None:
    """Refuse a setting before the work.

    Raises:
        UsageError: it changes more than :data:`CHANGEABLE`: its window states would be others.
    """
    before, now = (flatten(config.model_dump(mode="json")) for config in (base, setting))
    for key in dict.fromkeys([*before, *now]):
        if before.get(key) != now.get(key) and not key.startswith(CHANGEABLE):
            raise UsageError(
                f"--setting {name!r} changes {key}: only flow.tail_*, ode.*, run.dtype and rewards.* leave the window "
                "states as they are"
            )


@dataclass(slots=True)
class Setting:
    """One way to finish.

    Attributes:
        name: its overrides, as they were given.
        config: the run's with them.
        notes: what it remembers from round to round, as a trainer does (the drift of reuse, the 8-bit modes).
        profile: the drift of the file that ``config`` names, read here; raises ConfigError where it cannot be used.
    """

    name: str
    config: Config
    notes: dict[str, Any] = field(default_factory=dict)
    policy: RetakePolicy | None = None
    rewards: Mapping[str, Reward] | None = None
    profile: ProfileFile | None = field(init=False)

    def __post_init__(self) -> None:
        self.profile = profile_file(self.config)

    def note_modes(self) -> None:
        """Remember the 8-bit layers that were found."""
        if self.policy is not None and self.policy.fast is not None and (modes := attention_modes(self.policy.fast)):
            self.notes[MODES] = modes

    def remember(self, notes: Mapping[str, Any], where: object) -> None:
        """Go on with the notes of an earlier call.

        Raises:
            UsageError: its drift came from elsewhere, so that its records must not join this one's; begins with
                ``where``.
        """
        now = source_of_drift(self.config, self.profile)["from"]
        then = notes.get(under(DRIFT), {}).get("from", now)
        if then != now:
            raise UsageError(
                f"{where}: {self.name!r} was measured with another drift of ode.reuse (then {then}, now {now}); name "
                "another file, or delete it"
            )
        self.notes.update(notes)


@dataclass(frozen=True, slots=True)
class Record:
    """One setting in one round: the fidelity of its groups."""

    setting: str
    window: int
    iteration: int
    groups: tuple[GroupFidelity, ...]

    def as_json(self) -> dict[str, Any]:
        """For a result file."""
        return dataclasses.asdict(self)

    @staticmethod
    def of(data: Any, where: object) -> Record:
        """From a result file, where what is not defined is None; raises DataError, which begins with ``where``."""
        found = filled(_RecordForm, data, where, "restore the file, or delete it and measure again")
        groups = tuple(GroupFidelity(**_defined(dict(group))) for group in found.groups)
        return Record(found.setting, found.window, found.iteration, groups)


class _GroupForm(Form):
    """Of :class:`GroupFidelity`."""

    model_config = ConfigDict(extra="forbid")
    spearman: float | None
    kendall: float | None
    pearson: float | None
    flips: float | None
    flips_weighted: float | None
    shift: dict[str, float | None]
    spread: dict[str, float | None]
    psnr: float | None
    distance: float | None

    @model_validator(mode="after")
    def _one_spread_a_shift(self) -> Self:
        if self.shift.keys() != self.spread.keys():
            raise ValueError("shift and spread are not of the same scores")
        return self


class _RecordForm(Form):
    """Of :class:`Record`."""

    setting: str
    window: int
    iteration: int
    groups: list[_GroupForm] = Field(min_length=1)


class _DriftForm(Form):
    sigmas: list[Annotated[float, Field(ge=0, le=1)]]
    drift: list[float]


class _NotesForm(Form):
    """Of :attr:`Setting.notes`."""

    tail_drift: _DriftForm | None = None
    tail_drift_under: dict[str, Any] | None = None
    ode_modes: list[str] | None = None


def notes_of(data: Any, where: object) -> dict[str, Any]:
    """Notes of a setting from a result file; raises DataError, which begins with ``where``."""
    fix = "restore the file, or delete it and measure again"
    if not isinstance(data, dict):
        raise DataError(f"{where}: no object; {fix}")
    found = filled(_NotesForm, data, where, fix)
    if found.tail_drift is not None:
        try:
            DriftProfile(found.tail_drift.sigmas, found.tail_drift.drift)
        except UsageError as error:
            raise DataError(f"{where}: {error}; {fix}") from error
    return dict(data)


def _defined(values: Mapping[str, Any]) -> dict[str, Any]:
    nan = float("nan")
    return {
        name: _defined(value) if isinstance(value, Mapping) else (nan if value is None else value)
        for name, value in values.items()
    }


class Bench:
    """A policy, its data and rewards, ready to finish rollouts in several ways on one device.

    Args:
        config: of the run; its own approximations are left out.
        source: conditions.
        policy: opened by default from ``train.base``.
        rewards: scorers by name, by default those of ``config``.
    """

    def __init__(
        self,
        config: Config,
        source: ConditionSource,
        policy: RetakePolicy | None = None,
        rewards: Mapping[str, Reward] | None = None,
    ) -> None:
        self.config, self.source = exactly(config), source
        device = device_of(config.run)
        opened = policy or open_base(self.config, device, dtype_of(config.run, device))
        parts = ready(self.config, opened, LocalRanks())
        self.policy, self.device = parts.policy, parts.device
        self._own = rewards is None
        self.rewards = build_rewards(self.config.rewards, config.failures) if rewards is None else rewards

    def close(self, settings: Sequence[Setting] = ()) -> None:
        """End the workers of the rewards, also of those that ``settings`` have for themselves."""
        if self._own:
            close_rewards(self.rewards)
        for setting in settings:
            close_rewards(setting.rewards or {})

    def rounds(
        self,
        settings: Sequence[Setting],
        windows: Sequence[int],
        groups: int,
        done: Callable[[str, int, int], bool] = lambda *_: False,
    ) -> Iterator[Record]:
        """Measure; a generator, so that every record can be kept at once.

        Args:
            settings: what to compare with the exact tail.
            windows: window starts.
            groups: at least so many groups for every window, in batches of ``groups.conditions``.
            done: (setting, window, iteration) -> whether that is known already.
        """
        conditions = self.config.groups.conditions
        for start in windows:
            for iteration in range(-(-groups // conditions)):
                wanted = [setting for setting in settings if not done(setting.name, start, iteration)]
                if wanted:
                    self._know_drift(wanted)
                    round_ = _Round.begin(self, StepWindow(start, start + self.config.window.size), iteration)
                    yield from (Record(setting.name, start, iteration, round_.fidelity(setting)) for setting in wanted)

    def _know_drift(self, settings: Sequence[Setting]) -> None:
        """Let reuse choose by the drift that a run measures, whichever windows are asked for.

        Settings that differ in the share of steps alone have one drift.
        """
        known: dict[str, Setting] = {}
        for setting in settings:
            if setting.config.ode.reuse == "off" or setting.profile is not None:
                continue
            ode = setting.config.ode.model_copy(update={"reuse_share": 1.0})
            kind = setting.config.model_copy(update={"ode": ode}).model_dump_json()
            if DRIFT not in setting.notes and kind in known:
                setting.notes |= known[kind].notes
            elif DRIFT not in setting.notes:
                self.drift(setting)
            known[kind] = setting

    @torch.no_grad()
    def drift(self, setting: Setting) -> dict[str, Any]:
        """The notes of ``setting`` after one batch of groups has shown the drift that its reuse chooses by.

        It is the first batch, behind the earliest window of the schedule: no window of a run has a longer tail.
        """
        start, policy = self.config.window.start, self.policy_of(setting)
        window = StepWindow(start, start + self.config.window.size)
        sampler = with_reuse(self.sampler(setting.config, window), setting.config, setting.notes, setting.profile)
        self.rollout(policy, sampler, 0)
        agree_on_drift(sampler, LocalRanks(), setting.notes)
        setting.note_modes()
        return setting.notes

    def sampler(self, config: Config, window: StepWindow) -> FlowSampler:
        """The sampler of ``config`` with a window, of which nothing is replayed."""
        groups, table = self.config.groups, build_step_table(config.flow, window)
        return FlowSampler(table, groups.size, rows_per_forward=groups.rows_per_forward, window_grad=False)

    def rollout(
        self, policy: RetakePolicy, sampler: FlowSampler, iteration: int
    ) -> tuple[RetakeBatch, Precomputed, Rollout]:
        """The rollouts of one batch of groups, with what they were made from."""
        config = self.config
        ids = list(range(config.groups.conditions))
        batch = self.source.batch(iteration, ids).to(self.device)
        precomputed, groups = policy.prepare(batch), torch.tensor(ids, device=self.device)
        noise = initial_noise(policy.latent_shape(batch), config.run.seed, iteration, groups)
        rollout = sampler.rollout(
            policy.phased(), precomputed, noise, seed=config.run.seed, iteration=iteration, group_ids=groups
        )
        return batch, precomputed, rollout

    def policy_of(self, setting: Setting) -> RetakePolicy:
        """The policy with the steps that a setting asks for; made once."""
        if setting.policy is None:
            policy, config = self.policy, setting.config
            if config.run.dtype != self.config.run.dtype:
                policy = replace(policy, model=in_dtype(policy.model, dtype_of(config.run, self.device)))
            twin = twin_of(config, policy.model)
            if twin is not None and MODES in setting.notes:
                set_attention_modes(twin, setting.notes[MODES])
            setting.policy = replace(policy, fast=twin, reuse=config.ode.reuse)
        return setting.policy


@dataclass(frozen=True, slots=True)
class _Round:
    """One batch of groups: exact rollouts up to the window's end, and what their exact tails are worth."""

    bench: Bench
    sampler: FlowSampler
    batch: RetakeBatch
    precomputed: Precomputed
    rollout: Rollout
    history: Tensor
    exact: Judged

    @staticmethod
    @torch.no_grad()
    def begin(bench: Bench, window: StepWindow, iteration: int) -> _Round:
        """Run the exact rollouts and score them."""
        policy, sampler = bench.policy, bench.sampler(bench.config, window)
        batch, precomputed, rollout = bench.rollout(policy, sampler, iteration)
        position, last = rollout.num_window_steps - 1, window.stop - 1
        parts = [
            sampler.replay(policy.velocity, rollout, position, precomputed, rows).velocity.combined()
            for rows in sampler.replay_batches(rollout, position)
        ]
        before = rollout.state(position)
        before = before.repeat_interleave(rollout.num_rows // before.shape[0], 0)
        history = before - float(sampler.table.sigmas[last]) * torch.cat(parts)
        exact = _judge(bench, bench.rewards, rollout.final, batch)
        return _Round(bench, sampler, batch, precomputed, rollout, history, exact)

    @torch.no_grad()
    def finish(self, setting: Setting) -> Tensor:
        """The latents under ``setting``.

        Behind a window that ends before the drift begins, a tail that is evaluated whole shows it first.
        """
        policy, config = self.bench.policy_of(setting), setting.config
        same = policy.dtype == self.bench.policy.dtype
        precomputed = self.precomputed if same else policy.prepare(self.batch)
        sampler = replace(self.sampler, table=build_step_table(config.flow, self.sampler.table.window))
        states = policy.phased(), precomputed, self.rollout.x_next[-1], self.history
        chosen = with_reuse(sampler, config, setting.notes, setting.profile)
        final, _ = chosen.finish(*states)
        if chosen.drift is not None:
            agree_on_drift(chosen, LocalRanks(), setting.notes)
            final, _ = with_reuse(sampler, config, setting.notes, setting.profile).finish(*states)
        setting.note_modes()
        return final

    def fidelity(self, setting: Setting) -> tuple[GroupFidelity, ...]:
        """Of every group under ``setting``."""
        bench, size = self.bench, self.bench.config.groups.size
        rewards = bench.rewards
        if setting.config.rewards != bench.config.rewards:
            setting.rewards = setting.rewards or build_rewards(setting.config.rewards, setting.config.failures)
            rewards = setting.rewards
        other = _judge(bench, rewards, self.finish(setting), self.batch, self.rollout.final)
        outcomes = [outcome_of(judged.scores, bench.config, size) for judged in (self.exact, other)]
        found = []
        for first in range(0, self.rollout.num_rows, size):
            rows = slice(first, first + size)
            distance = float(self.exact.neighbours[first + 1 : first + size].nanmean())  # NaN beside a failed video
            found.append(compare(*(o.select(rows) for o in outcomes), error=other.error[rows], distance=distance))
        return tuple(found)


def _judge(
    bench: Bench, rewards: Mapping[str, Reward], latents: Tensor, batch: RetakeBatch, beside: Tensor | None = None
) -> Judged:
    owner = torch.arange(len(latents), device=bench.device) // bench.config.groups.size
    chunk = bench.config.scoring.chunk
    judged = judge(bench.policy, rewards, latents, batch, owner, chunk=chunk, beside=beside)
    table = judged.scores
    on_cpu = replace(
        table,
        scores={key: value.cpu() for key, value in table.scores.items()},
        valid=table.valid.cpu(),
        lost=table.lost.cpu(),
    )
    return replace(judged, scores=on_cpu)


def table_rows(
    records: Sequence[Record], priced: Mapping[str, Config], measured: Config, device: str = "a800"
) -> list[dict[str, Any]]:
    """One row per setting and window: fidelity, cost, hours, and what keeps it from being accepted.

    Args:
        records: of :meth:`Bench.rounds`.
        priced: setting -> configuration whose tail after that window, and whose whole run, are priced.
        measured: of the records; its sampler is told.
        device: name of a device profile; one card per condition.
    """
    card, rows = DEVICES[device], []
    sampler = {name: getattr(measured.flow, name) for name in SAMPLER}
    places = list(dict.fromkeys((record.setting, record.window) for record in records))
    whole = {name: hours(config, card, config.groups.conditions) for name, config in priced.items()}
    for name, window in places:
        groups = [g for record in records if (record.setting, record.window) == (name, window) for g in record.groups]
        numbers, cost = summary(groups), tail_cost(_with_window(priced[name], window), card)
        missed = shortfalls(numbers, cost)
        words = {key: str(value) for key, value in priced[name].approximations().items()}
        row = {"setting": name, "approximations": words, **sampler, "window": window, "cost": cost}
        rows.append({**row, "hours": whole[name], **numbers, "accepted": not missed, "shortfalls": missed})
    return rows


def _with_window(config: Config, start: int) -> Config:
    window = config.window.model_copy(update={"kind": "fixed", "start": start, "max_start": start})
    return config.model_copy(update={"window": window})

"""Cost of a whole run: forwards per iteration, predicted hours, and what each speed-up is worth (the lever ladder).

Levers labelled EXACT run the same algorithm and draw from the same distribution, rounding aside. Those labelled CHANGES
alter what is sampled, so they need evidence of quality and are off by default; their total is stated apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from geoalign.perf.cost import Speedups, TransformerCost, VideoCost
from geoalign.perf.devices import CERTAINTY, DeviceProfile, Kind

BACKWARD_EQUIVALENT = 2
"""A backward counts as two forwards, the usual convention (in FLOPs it is 2.3 here, because attention dominates)."""
_OVERHEAD = 0.02
"""Optimizer, gradient reduction, logging and barriers, as a share of everything else (assumed)."""


@dataclass(frozen=True, slots=True)
class Walk:
    """The steps of one trajectory: ``prefix`` deterministic, ``window`` stochastic, ``tail`` deterministic ones."""

    prefix: int
    window: int
    tail: int


@dataclass(frozen=True, slots=True)
class Plan:
    """How an iteration is executed.

    Attributes:
        speedups: kernels and caches.
        share_prefix: prefix and first window forward once per condition.
        merge_first: one learner pass of the first window step per condition and optimizer update.
        keep_attention: attention outputs saved, everything else recomputed in the backward.
        checkpoint: blocks are recomputed in the backward; False saves all activations.
        stream_backward: the backward starts from the rollout's graph; no learner forward (one update per rollout).
        replay_first: with it, a first window step that serves a group is replayed, so that no graph waits for rewards.
        hide_host: host code of the rewards off the critical path.
        attention, int8_linears: mode of the attention and W8A8 products of frozen linears, in steps after the window.
        guidance: forwards per velocity (2 with classifier-free guidance), in rollout and learner.
        reference: whether a KL term needs one forward of a reference policy per learner pass.
        learned_steps: window steps, drawn at random, that are learned from; None: all.
        learned_members: members of every group that are learned from; None: all.
    """

    speedups: Speedups = field(default_factory=Speedups)
    share_prefix: bool = False
    merge_first: bool = False
    keep_attention: bool = False
    checkpoint: bool = True
    stream_backward: bool = False
    replay_first: bool = False
    hide_host: bool = False
    attention: str = "exact"
    int8_linears: bool = False
    guidance: int = 1
    reference: bool = False
    learned_steps: int | None = None
    learned_members: int | None = None

    def after_window(self, *, attention: str, linears: bool) -> Plan:
        """The same with steps of that precision after the window."""
        return replace(self, attention=attention, int8_linears=linears)

    def with_exact_steps(self) -> Plan:
        """The same without 8-bit steps: steps before the window and audits are exact in every plan."""
        return self.after_window(attention="exact", linears=False)


@dataclass(frozen=True, slots=True)
class PassCount:
    """Network passes of one iteration, counted per sample.

    Attributes:
        prefix, window, tail: rollout forwards.
        replay: learner forwards.
        recompute: forwards repeated for the backward.
        backward: backwards.
        reference: forwards of a reference policy.
        audit: rollout forwards of a group that is also finished exactly.
    """

    prefix: int = 0
    window: int = 0
    tail: int = 0
    replay: int = 0
    recompute: int = 0
    backward: int = 0
    reference: int = 0
    audit: int = 0

    @property
    def rollout(self) -> int:
        """Forwards of the rollout."""
        return self.prefix + self.window + self.tail

    @property
    def forwards(self) -> int:
        """All forwards, recomputation included."""
        return self.rollout + self.replay + self.recompute + self.reference + self.audit

    @property
    def forward_equivalents(self) -> int:
        """Forwards plus ``BACKWARD_EQUIVALENT`` times backwards."""
        return self.forwards + BACKWARD_EQUIVALENT * self.backward


def count_passes(
    walk: Walk, conditions: int, group_size: int, updates: int, plan: Plan, positions: Sequence[int] | None = None
) -> PassCount:
    """Passes of one iteration of ``conditions`` groups that learns from ``positions`` of the window (None: all).

    ``updates`` optimizer updates split the members of every group into equal parts; the first window step can be merged
    inside a part only, because the weights change between parts.
    """
    rows, guidance = conditions * group_size, plan.guidance
    lanes = conditions if plan.share_prefix else rows
    chosen = conditions * (plan.learned_members or group_size)
    positions = range(walk.window) if positions is None else positions
    first = (conditions * updates if plan.merge_first else chosen) * (0 in positions)
    learned = first + chosen * (len(positions) - (0 in positions))
    replayed = learned
    if plan.stream_backward:
        replayed = first if plan.replay_first and plan.merge_first and group_size > 1 else 0
    return PassCount(
        prefix=guidance * lanes * walk.prefix,
        window=guidance * (lanes + rows * (walk.window - 1)),
        tail=guidance * rows * walk.tail,
        replay=guidance * replayed,
        recompute=guidance * learned if plan.checkpoint else 0,
        backward=guidance * learned,
        reference=guidance * learned if plan.reference else 0,
    )


@dataclass(frozen=True, slots=True)
class PhaseSeconds:
    """Predicted device seconds of one or more iterations by phase, summed over all devices."""

    rollout: float
    learner: float
    reward: float

    @property
    def other(self) -> float:
        """Optimizer, communication, logging."""
        return _OVERHEAD * (self.rollout + self.learner + self.reward)

    @property
    def total(self) -> float:
        """All phases."""
        return self.rollout + self.learner + self.reward + self.other


@dataclass(frozen=True, slots=True)
class RunCost:
    """What is run: the network, the work per video, and every iteration's walk.

    Attributes:
        transformer, video: costs per sample and per video.
        walks: walk -> number of iterations that take it.
        conditions, group_size, updates: per iteration.
        audits: exact steps after the window -> number of audits that take them for one group.
    """

    transformer: TransformerCost
    video: VideoCost
    walks: Mapping[Walk, int]
    conditions: int
    group_size: int
    updates: int = 1
    audits: Mapping[int, int] = field(default_factory=dict)

    @property
    def iterations(self) -> int:
        """Iterations of the run."""
        return sum(self.walks.values())

    def passes(self, plan: Plan) -> dict[Walk, PassCount]:
        """Passes of one iteration for every walk."""
        return {walk: count_passes(walk, self.conditions, self.group_size, self.updates, plan) for walk in self.walks}

    def seconds(self, device: DeviceProfile, plan: Plan) -> PhaseSeconds:
        """Predicted device seconds of the whole run, without its audits (:meth:`audit_seconds`)."""
        forward = self.transformer.forward(device, plan.speedups)
        before, after = self.outside(device, plan.with_exact_steps()), self.outside(device, plan)
        backward = self.transformer.backward(device, plan.speedups).total
        recompute = forward.total - (forward.attention if plan.keep_attention else 0.0)
        rollout = learner = 0.0
        for walk, count in self.passes(plan).items():
            times = self.walks[walk]
            rollout += times * (count.prefix * before + count.window * forward.total + count.tail * after)
            # Any subset of steps is equally likely, so each is learned from in that share of the iterations.
            share = times * (1.0 if plan.learned_steps is None else min(1.0, plan.learned_steps / walk.window))
            learner += share * ((count.replay + count.reference) * forward.total + count.recompute * recompute)
            learner += share * count.backward * backward
        per_video = self.video.seconds(device, hide_host=plan.hide_host)
        encode = self.video.encode / device.convolution
        reward = self.iterations * self.conditions * (self.group_size * per_video + encode)
        return PhaseSeconds(rollout, learner, reward)

    def outside(self, device: DeviceProfile, plan: Plan) -> float:
        """Predicted seconds of one deterministic forward, without gradients, as ``plan`` runs it after the window."""
        speedups = replace(plan.speedups, int8_linear=plan.int8_linears)
        mode = plan.attention if device.pays(plan.attention) else "exact"
        return self.transformer.forward(device, speedups, attention=mode, no_gradient=True).total

    def audit_seconds(self, device: DeviceProfile, plan: Plan) -> float:
        """Predicted wall seconds of all audits: the device that holds the group works while all others wait.

        Its members are finished exactly, decoded and scored, and their approximate videos are decoded beside them.
        """
        forward = plan.guidance * self.outside(device, plan.with_exact_steps())
        judged = self.video.seconds(device, hide_host=plan.hide_host) + self.video.decode / device.convolution
        return sum(times * self.group_size * (tail * forward + judged) for tail, times in self.audits.items())

    def hours(self, device: DeviceProfile, plan: Plan, devices: int) -> float:
        """Predicted wall hours on ``devices`` equal devices, each with whole groups: the fullest one sets the pace.

        More devices do not shorten audits.
        """
        share = -(-self.conditions // devices) / self.conditions
        return (self.seconds(device, plan).total * share + self.audit_seconds(device, plan)) / 3600.0


@dataclass(frozen=True, slots=True)
class Lever:
    """One speed-up.

    Attributes:
        name: what it does.
        plan: fields of ``Plan`` that it sets.
        speedups: fields of ``Speedups`` that it sets.
        one_update: whether it needs a single optimizer update per rollout.
        rate: the rate of a device profile that its worth rests on; empty: an assumption of this model.
    """

    name: str
    plan: Mapping[str, Any] = field(default_factory=dict)
    speedups: Mapping[str, Any] = field(default_factory=dict)
    one_update: bool = False
    rate: str = "attention"

    def kind_of_hours(self, device: DeviceProfile) -> Kind:
        """How well founded its worth on ``device`` is."""
        return device.kinds.get(self.rate, "assumed")

    def apply(self, plan: Plan) -> Plan:
        """``plan`` with this lever pulled."""
        return replace(plan, speedups=replace(plan.speedups, **self.speedups), **self.plan)


LEVERS: tuple[Lever, ...] = (
    Lever("fused norm, rotary, gate and GELU kernels", speedups={"kernels": "fused"}, rate="bandwidth"),
    Lever("camera adapter and phases cached per condition", speedups={"cached": True}, rate="convolution"),
    Lever("source tokens pruned in the last block", speedups={"pruned": True}),
    Lever("attention output kept, the rest recomputed", plan={"keep_attention": True}),
    Lever("shared prefix and first window forward", plan={"share_prefix": True}),
    Lever("merged first learner step", plan={"merge_first": True}),
    Lever("reward host work off the critical path", plan={"hide_host": True}, rate=""),
    Lever(
        "backward streamed from the rollout",
        plan={"stream_backward": True, "replay_first": True},
        one_update=True,
    ),
)


def exact_plan(*, streams: bool, guidance: int = 1) -> Plan:
    """All levers; ``streams``: whether the run can stream its backwards (one update per rollout, known members)."""
    plan = Plan(guidance=guidance)
    for lever in LEVERS:
        if streams or not lever.one_update:
            plan = lever.apply(plan)
    return plan


@dataclass(frozen=True, slots=True)
class Rung:
    """A lever on a run: predicted hours with it alone, and with all rungs up to it; the kinds of both."""

    lever: Lever
    alone_hours: float
    cumulative_hours: float
    alone_kind: Kind
    cumulative_kind: Kind


@dataclass(frozen=True, slots=True)
class Ladder:
    """Predicted hours without any lever, and rung by rung."""

    reference_hours: float
    rungs: Sequence[Rung]

    @property
    def total(self) -> float:
        """Hours with all levers."""
        return self.rungs[-1].cumulative_hours if self.rungs else self.reference_hours


def climb(run: RunCost, device: DeviceProfile, devices: int, guidance: int = 1) -> Ladder:
    """The ladder of a run: every lever alone, and on top of those before it."""
    start = Plan(guidance=guidance)
    plan = start
    rungs: list[Rung] = []
    kind = device.kinds.get("attention", "assumed")
    for lever in LEVERS:
        if lever.one_update and run.updates > 1:
            continue
        plan = lever.apply(plan)
        alone = run.hours(device, lever.apply(start), devices)
        own = lever.kind_of_hours(device)
        kind = max(kind, own, key=CERTAINTY.index)
        rungs.append(Rung(lever, alone, run.hours(device, plan, devices), own, kind))
    return Ladder(run.hours(device, start, devices), tuple(rungs))


def tally(walks: Iterable[Walk]) -> dict[Walk, int]:
    """How many iterations take each walk."""
    return dict(Counter(walks))

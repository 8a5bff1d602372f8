"""The whole configuration of a run: every section in one place, and the combinations that cannot work."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field, PrivateAttr, model_validator

from geoalign.config.base import Section
from geoalign.config.benchmark import BenchmarkConfig
from geoalign.config.data import DataConfig
from geoalign.config.flow import LONGCAT_FLATTENS, AdvantageConfig, FlowConfig, ObjectiveConfig, WindowConfig
from geoalign.config.model import ModelConfig
from geoalign.config.rewards import FailureConfig, RewardConfig, ScoringConfig
from geoalign.config.training import (
    CodecConfig,
    EvalConfig,
    GroupsConfig,
    LearnConfig,
    LeversConfig,
    OdeConfig,
    OptimConfig,
    ParallelConfig,
    PretrainConfig,
    RunConfig,
    TrainConfig,
)
from geoalign.config.world import WorldConfig


class Config(Section):
    """Everything a run needs; written to ``config.yaml`` in the run folder as resolved."""

    run: RunConfig = RunConfig()
    """Run folder, seed, device."""
    world: WorldConfig | None = None
    """The embedded world; absent when real data is used."""
    data: DataConfig = DataConfig()
    """Conditions: source clips and target camera paths."""
    codec: CodecConfig = CodecConfig()
    """Pixels to latents."""
    model: ModelConfig = ModelConfig()
    """The retake model."""
    flow: FlowConfig = FlowConfig()
    """Sampler."""
    window: WindowConfig = WindowConfig()
    """Which steps are stochastic and trained."""
    groups: GroupsConfig = GroupsConfig()
    """Conditions and rollouts per iteration."""
    rewards: dict[str, RewardConfig] = Field(default_factory=dict)
    """Scorers by name."""
    scoring: ScoringConfig = ScoringConfig()
    """Chunks and overlap of decoding and scoring."""
    failures: FailureConfig = FailureConfig()
    """What happens when a scorer fails."""
    advantage: AdvantageConfig = AdvantageConfig()
    """Rewards to advantages."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """Clipped surrogate."""
    optim: OptimConfig = OptimConfig()
    """Optimizer."""
    train: TrainConfig = TrainConfig()
    """RL loop."""
    levers: LeversConfig = LeversConfig()
    """Exact savings."""
    ode: OdeConfig = OdeConfig()
    """Approximate steps after the window."""
    learn: LearnConfig = LearnConfig()
    """Cheaper learning."""
    parallel: ParallelConfig = ParallelConfig()
    """Several processes."""
    eval: EvalConfig = EvalConfig()
    """Held-out evaluation."""
    pretrain: PretrainConfig = PretrainConfig()
    """Supervised base policy of the embedded world."""
    benchmark: BenchmarkConfig = BenchmarkConfig()
    """Clips, paths and metrics of ``geoalign benchmark``."""

    _asked: str = PrivateAttr("--config NAME")

    @property
    def asked(self) -> str:
        """Words of a command line that ask for this configuration, for advice that repeats it."""
        return self._asked

    def asked_for(self, name: str | Path, overrides: Sequence[str]) -> Self:
        """This configuration, asked for by the name of its file and by overrides."""
        self._asked = shlex.join(["--config", str(name), *overrides])
        return self

    def approximations(self) -> dict[str, Any]:
        """Settings, by dotted name, by which the steps after the window differ from exact ones on the full grid."""
        changed = self._changed("flow", FlowConfig.TAIL) | self._changed("ode", OdeConfig.APPROXIMATE)
        if "ode.attention" in changed:  # another bound is another approximation
            changed |= self._changed("ode", ("int8_threshold",))
        return changed | ({"ode.reuse_share": self.ode.reuse_share} if "ode.reuse" in changed else {})

    def changes(self) -> dict[str, Any]:
        """All settings, by dotted name, that CHANGE the run: :meth:`approximations`, and what updates are made of."""
        learn = self._changed("learn", LearnConfig.model_fields) | self._changed("optim", ("states",))
        strides = {
            f"rewards.{name}.options.frame_stride": stride
            for name, reward in self.rewards.items()
            if reward.kind == "hpsv3" and (stride := reward.options.get("frame_stride", 1)) != 1
        }
        return self.approximations() | learn | strides

    def undone(self) -> dict[str, Any]:
        """The values, by dotted name, that take :meth:`changes` back.

        Without approximations audits have no work, and a drift profile none either: it is of one kind of reuse.
        """
        exact = {
            f"{section}.{field}": info.default
            for section in ("flow", "ode", "learn", "optim")
            for field, info in type(getattr(self, section)).model_fields.items()
        }
        idle = {"ode.audit_every": 0} | ({} if self.ode.reuse_profile is None else {"ode.reuse_profile": None})
        return idle | {name: exact.get(name, 1) for name in self.changes()}  # 1: every frame

    def _changed(self, section: str, names: Iterable[str]) -> dict[str, Any]:
        """Those settings of a section that are not at their defaults."""
        settings = getattr(self, section)
        fields = type(settings).model_fields
        return {
            f"{section}.{name}": value for name in names if (value := getattr(settings, name)) != fields[name].default
        }

    @model_validator(mode="after")
    def _possible(self) -> Self:
        checks = (
            self._window_fits, self._weight_flattens, self._updates_fit, self._streaming_is_exact, self._parallel_fits,
            self._audit_has_work, self._subsets_fit, self._rewards_have_plain_names,
        )  # fmt: skip
        for check in checks:
            check()
        if self.flow.guidance > 1 and self.model.text_length == 1:
            raise ValueError(
                f"flow.guidance {self.flow.guidance:g} needs a model that reads text: set flow.guidance to 1, or "
                "model.text_length above 1"
            )
        return self

    def _window_fits(self) -> None:
        if reason := self.window.misfit(self.flow.steps):
            raise ValueError(reason)

    def _weight_flattens(self) -> None:
        if self.objective.loss_weight == "longcat" and self.flow.sde not in LONGCAT_FLATTENS:
            raise ValueError(
                f"objective.loss_weight longcat does not even out the steps of flow.sde {self.flow.sde}; set "
                "objective.loss_weight to exact_inverse, which does so for every sampler"
            )

    def _updates_fit(self) -> None:
        updates, rows = self.optim.updates_per_rollout, self.groups.rows_per_forward
        if self.groups.size % updates:
            raise ValueError(f"optim.updates_per_rollout {updates} must divide groups.size {self.groups.size}")
        if rows is not None and updates > 1 and (self.groups.size // updates) % rows:
            raise ValueError(
                f"groups.rows_per_forward {rows} must divide the {self.groups.size // updates} rollouts of one of "
                f"optim.updates_per_rollout {updates} updates: a forward must not serve two of them"
            )

    def _streaming_is_exact(self) -> None:
        levers, updates = self.levers, self.optim.updates_per_rollout
        if levers.merge_first_step and not levers.share_prefix:
            raise ValueError(
                "levers.merge_first_step needs levers.share_prefix, for only then do members share a state: set both, "
                "or neither"
            )
        if levers.streaming == "off":
            return
        if updates > 1:
            raise ValueError(
                f"levers.streaming serves one update per rollout (its ratio is 1), but optim.updates_per_rollout is "
                f"{updates}; set that to 1, or levers.streaming to off"
            )
        if self.objective.kl_weight > 0:
            raise ValueError(
                "levers.streaming has no second forward for a KL term; set objective.kl_weight to 0, or "
                "levers.streaming to off"
            )
        if levers.share_prefix and not levers.merge_first_step:
            raise ValueError(
                "levers.streaming merges the first window step of a shared prefix: set levers.merge_first_step, or "
                "levers.streaming to off"
            )
        if levers.streaming in ("device", "host"):
            if self.groups.rows_per_forward != 1:
                raise ValueError(
                    f"levers.streaming={levers.streaming} keeps one gradient per rollout, so every forward must hold "
                    "one: set groups.rows_per_forward to 1, or levers.streaming to graphs"
                )
            if self.parallel.engine == "fsdp":
                raise ValueError(
                    f"levers.streaming={levers.streaming} keeps a gradient per rollout of whole parameters, which "
                    "parallel.engine=fsdp shards: set levers.streaming to graphs or off"
                )

    def _subsets_fit(self) -> None:
        learn = self.learn
        if learn.window_steps is not None and learn.window_steps > self.window.size:
            raise ValueError(
                f"learn.window_steps {learn.window_steps} of a window of {self.window.size} steps: set "
                "learn.window_steps to at most window.size, or to null for all of them"
            )
        if learn.members is not None:
            if learn.members > self.groups.size:
                raise ValueError(
                    f"learn.members {learn.members} of groups of {self.groups.size}: set learn.members to at most "
                    "groups.size, or to null for all of them"
                )
            if self.levers.streaming != "off" or self.optim.updates_per_rollout > 1:
                raise ValueError(
                    "learn.members chooses once the rewards are known, for one update: set levers.streaming to off "
                    "and optim.updates_per_rollout to 1"
                )
            if self.groups.rows_per_forward != 1:
                raise ValueError("learn.members saves whole forwards only: set groups.rows_per_forward to 1")
        if (learn.short_frames is None) != (learn.short_iterations == 0):
            raise ValueError("learn.short_frames and learn.short_iterations belong together: set both, or neither")
        if learn.short_frames is not None and learn.short_frames >= self.data.num_frames:
            raise ValueError(
                f"learn.short_frames {learn.short_frames} must be below data.num_frames {self.data.num_frames}: set "
                "fewer, or null with learn.short_iterations=0"
            )

    def _audit_has_work(self) -> None:
        if self.ode.audit_every and not self.approximations():
            raise ValueError("ode.audit_every watches approximate tails, but every step is exact: set it to 0")

    def _rewards_have_plain_names(self) -> None:
        if dotted := [name for name in self.rewards if "." in name]:
            raise ValueError(f"rewards.{dotted[0]}: no setting section.key=value reaches a name with a dot; rename it")

    def _parallel_fits(self) -> None:
        parallel = self.parallel
        if self.model.heads % parallel.sequence:
            raise ValueError(
                f"parallel.sequence {parallel.sequence} must divide model.heads {self.model.heads}: ranks share heads"
            )
        frames, *size = self.data.video
        lengths = {frames, self.learn.short_frames or frames}
        counts = [count for length in sorted(lengths) for count in self.model.tokens(length, *size)]
        for name, count in zip(("target", "source") * len(lengths), counts, strict=True):
            if count % parallel.sequence:
                raise ValueError(
                    f"parallel.sequence {parallel.sequence} must divide the {count} {name} tokens of a video: ranks "
                    "share tokens; change data.num_frames, data.height or data.width"
                )
        if parallel.engine == "fsdp" and self.ode != OdeConfig():
            raise ValueError("parallel.engine=fsdp runs one network on all ranks together: remove the settings of ode")
        if parallel.engine != "ddp" and self.optim.states != "float32":
            raise ValueError(f"parallel.engine={parallel.engine} shards float32 states: set optim.states=float32")

"""The whole configuration of a run: every section in one place, and the combinations that cannot work."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from geoalign.config.base import Section
from geoalign.config.data import DataConfig
from geoalign.config.flow import AdvantageConfig, FlowConfig, ObjectiveConfig, WindowConfig
from geoalign.config.model import ModelConfig
from geoalign.config.rewards import FailureConfig, RewardConfig
from geoalign.config.training import (
    CodecConfig,
    EvalConfig,
    GroupsConfig,
    LeversConfig,
    OptimConfig,
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
    eval: EvalConfig = EvalConfig()
    """Held-out evaluation."""
    pretrain: PretrainConfig = PretrainConfig()
    """Supervised base policy of the embedded world."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        last = self.window.start + self.window.size
        if last > self.flow.steps - 1:
            raise ValueError(
                f"window.start {self.window.start} + window.size {self.window.size} reaches the last of flow.steps "
                f"{self.flow.steps} steps, which must stay deterministic; lower window.size or raise flow.steps"
            )
        if self.groups.size % self.optim.updates_per_rollout:
            raise ValueError(
                f"optim.updates_per_rollout {self.optim.updates_per_rollout} must divide groups.size {self.groups.size}"
            )
        if self.levers.streaming and self.optim.updates_per_rollout > 1:
            raise ValueError(
                "levers.streaming serves one update per rollout (its ratio is 1), but optim.updates_per_rollout is "
                f"{self.optim.updates_per_rollout}; switch one of them off"
            )
        if self.levers.streaming and self.objective.kl_weight > 0:
            raise ValueError("levers.streaming has no second forward for a KL term; set objective.kl_weight to 0")
        if self.levers.merge_first_step and not self.levers.share_prefix:
            raise ValueError("levers.merge_first_step needs levers.share_prefix: only then do members share a state")
        if self.objective.kl_weight > 0:
            raise ValueError(
                "objective.kl_weight: the trainer keeps no reference policy; set it to 0 (the paper uses no KL)"
            )
        return self

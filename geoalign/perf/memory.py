"""Predicted device and host memory of one process of a training run, part by part.

Counted from shapes, not measured; what a part leaves out is said in :func:`predict_memory`.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from geoalign.config.layout import deal_groups
from geoalign.config.schema import Config
from geoalign.perf.cost import Saved, TransformerCost

_WIDE = 4
_SAVED: dict[str, Saved] = {"none": "all", "keep_attention": "attention", "full": "inputs"}
SCORER_PARAMETERS = MappingProxyType(
    {"mapanything": 1_143_000_000, "videoalign": 2_208_600_000, "hpsv3": 7_747_000_000}
)
"""Of the pose path and the two Qwen2-VL bodies as they are loaded; 2 bytes each."""


def reward_models(config: Config) -> tuple[tuple[str, ...], list[str]]:
    """Large models that the rewards of ``config`` run, each once, and the rewards without one."""
    models, others = [], []
    for name, reward in config.rewards.items():
        scorer = reward.options.get("evaluator", "") if reward.kind == "geometry" else reward.kind
        (models if scorer in SCORER_PARAMETERS else others).append(scorer or name)
    return tuple(dict.fromkeys(models)), others


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes by part, on the device and in page-locked host memory."""

    device: dict[str, float]
    host: dict[str, float]

    @property
    def device_total(self) -> float:
        """Bytes on the device."""
        return sum(self.device.values())


def predict_memory(config: Config, parameters: int, trained: int, ranks: int, *, matrix_bytes: int) -> MemoryPlan:
    """Memory of one process.

    The video decoder, activations of the scorers, library workspaces and fragmentation are not in it: leave a sixth of
    the device for them.

    Args:
        config: of the run.
        parameters: of the network.
        trained: of them, the trained ones.
        ranks: processes of the run.
        matrix_bytes: bytes per value of the network's matrices.
    """
    groups, optim, levers, parallel = config.groups, config.optim, config.levers, config.parallel
    work = TransformerCost.of(config.model, *config.data.video)
    share = deal_groups(groups.conditions, groups.size, ranks, parallel.sequence)
    of_tokens, passes = 1 / parallel.sequence, 2 if config.flow.guidance > 1 else 1
    of_parameters = 1 / ranks if parallel.engine == "fsdp" else 1.0
    of_states = 1 / ranks if parallel.engine in ("fsdp", "deepspeed") else 1.0
    separate = matrix_bytes < _WIDE or parallel.engine == "deepspeed"  # masters beside the network's own values
    moments = 2 if optim.states == "int8" else 2 * _WIDE
    scorers = [2 * SCORER_PARAMETERS[name] for name in reward_models(config)[0]]
    rollouts = share.groups * share.members
    rows = groups.rows_per_forward or share.members
    kept = share.groups + rollouts * (config.window.size - 1) if levers.streaming == "graphs" else rows
    device = {
        "network": parameters * matrix_bytes * of_parameters,
        # A master, its gradient, the gradient in hand and an average; then AdamW's moments.
        "trained parameters": trained
        * ((_WIDE * (separate + 2 + (optim.ema > 0))) * of_parameters + moments * of_states),
        "conditions": share.groups * work.condition_bytes(phases=levers.cache_phases) * of_tokens,
        "kept graphs": passes * kept * work.activation_bytes(_SAVED[levers.recompute]) * of_tokens,
        "one block's backward": passes * rows * work.block_backward_bytes() * of_tokens,
        "scorers": float((max if config.scoring.take_turns else sum)([0, *scorers])),
    }
    table = {"gradients per rollout": float(rollouts * trained * _WIDE)}
    if levers.streaming == "device":
        device |= table
    host = table if levers.streaming == "host" else {}
    return MemoryPlan(device, host | ({"scorers": float(sum(scorers))} if config.scoring.take_turns else {}))

"""Predicted memory against tensors that are really alive, counted on fake ones of the paper's size."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from geoalign.config.load import load_config
from geoalign.config.schema import Config
from geoalign.evaluators.mapanything.layout import LAYOUTS
from geoalign.evaluators.mapanything.network import PoseNetwork
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.models.conditioning import Conditioning
from geoalign.models.dit import RetakeDiT
from geoalign.models.execution import Recompute
from geoalign.perf.cost import TransformerCost
from geoalign.perf.memory import SCORER_PARAMETERS, predict_memory
from geoalign.rewards.vlm.body import RewardQwen, hpsv3_head, videoalign_head
from geoalign.rewards.vlm.layout import HPSV3_BODY, VIDEOALIGN_BODY
from geoalign.training.engines.optim import freeze_all_but

LAYERS = 4


class AliveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operators made and that somebody still holds."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor) and (storage := value.untyped_storage())._cdata not in self._seen:
                self._seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return result

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


@pytest.fixture(scope="module")
def config() -> Config:
    """The paper's run with fewer blocks: memory grows in proportion to them."""
    full = load_config(Config, "paper_64xa800")
    return full.model_copy(update={"model": full.model.model_copy(update={"layers": LAYERS})})


@pytest.mark.parametrize(("recompute", "saved"), [("full", "inputs"), ("keep_attention", "attention"), ("none", "all")])
def test_a_learner_forward_and_backward(config: Config, recompute: Recompute, saved: Any) -> None:
    """The rest is embedding, head and rope tables."""
    work = TransformerCost.of(config.model, *config.data.video)
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = RetakeDiT(config.model)
        finally:
            torch.set_default_dtype(torch.float32)
        freeze_all_but(model, config.optim.trainable)
        model.execution.recompute, model.execution.core = recompute, "sdpa_flash"
        latents, frames = (1, 16, 21, 60, 104), config.data.num_frames
        camera = CameraTrajectory(torch.empty(1, frames, 4, 4), torch.empty(1, frames, 4))
        cond = Conditioning(
            source_latents=torch.empty(latents), source_camera=camera, target_camera=camera,
            context=torch.empty(1, 512, 4096).bfloat16(), image_tokens=torch.empty(1, 257, 1280).bfloat16(),
        )  # fmt: skip
        alive = AliveBytes([*model.parameters(), *model.buffers()])
        with alive:
            with torch.no_grad():
                cache = model.precompute(cond)
            assert alive.now == pytest.approx(work.condition_bytes(phases=True), rel=0.03)
            before = alive.now
            velocity = model(torch.empty(latents), torch.empty(1), cond, cache)
            kept = alive.now - before
            alive.peak = alive.now
            velocity.sum().backward()
            held = alive.peak - before - kept
    # Of four blocks, of which one is pruned, the eager count knows only that of a whole block.
    assert kept == pytest.approx(work.activation_bytes(saved), rel=0.02 if recompute != "none" else 0.15)
    if recompute != "none":
        assert held == pytest.approx(work.block_backward_bytes(), rel=0.05)


def test_the_parts_of_a_run() -> None:
    """By hand: two groups of twelve on each of eight processes; what is sharded shrinks with the processes."""
    config = load_config(Config, "node_8gpu")
    parameters, trained = 1_662_761_792, 329_840_640
    plan = predict_memory(config, parameters, trained, 8, matrix_bytes=2)
    assert plan.device["network"] == 2 * parameters
    assert plan.device["trained parameters"] == trained * (4 + 4 + 4 + 8)  # master, gradient, gradient in hand, AdamW
    assert plan.host == {"gradients per rollout": 24 * trained * 4}
    assert plan.device_total == sum(plan.device.values()) < 80e9

    def of(**parallel: Any) -> dict[str, float]:
        changed = config.model_copy(update={"parallel": config.parallel.model_copy(update=parallel)})
        return predict_memory(changed, parameters, trained, 8, matrix_bytes=2).device

    turns = config.model_copy(update={"scoring": config.scoring.model_copy(update={"take_turns": True})})
    shared = predict_memory(turns, parameters, trained, 8, matrix_bytes=2)
    assert shared.device["scorers"] == 2 * SCORER_PARAMETERS["hpsv3"]
    assert shared.host["scorers"] == plan.device["scorers"] == 2 * sum(SCORER_PARAMETERS.values())
    assert of(engine="deepspeed")["trained parameters"] == trained * (4 + 4 + 4 + 8 / 8)
    assert of(engine="fsdp")["network"] == 2 * parameters / 8
    assert of(sequence=2)["kept graphs"] == plan.device["kept graphs"] / 2


def test_scorers_have_the_parameters_that_their_layouts_give() -> None:
    found: dict[str, list[torch.nn.Module]] = {}
    with torch.device("meta"):
        found["mapanything"] = [PoseNetwork(LAYOUTS["v1.1"])]
        for name, layout, head in (("videoalign", VIDEOALIGN_BODY, videoalign_head), ("hpsv3", HPSV3_BODY, hpsv3_head)):
            network = RewardQwen(layout, head(layout))
            found[name] = [network.visual, network.model]
    for name, modules in found.items():
        count = sum(p.numel() for module in modules for p in module.parameters())
        assert count == pytest.approx(SCORER_PARAMETERS[name], rel=1e-3)

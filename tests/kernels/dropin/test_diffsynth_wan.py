"""The fused ops inside Wan DiTs of the DiffSynth and ReDirector kind, against the same networks in float64."""

from __future__ import annotations

import pytest
import torch
from dropin_models import error
from torch import Tensor
from wan_dits import WanModel, given

from geoalign_kernels import UnknownNetwork, accelerate

CASES = [(False, False), (False, True), (True, False), (True, True)]


def gradients(model: WanModel, arguments: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = {name: arguments[name].detach().clone().requires_grad_() for name in ("x", "context", "cam_emb", "t_mod")}
    y = model(**(arguments | leaves))
    model.zero_grad()
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape).to(y)).sum().backward()
    named = {**dict(model.named_parameters()), **leaves}
    return y.detach(), {name: leaf.grad.clone() for name, leaf in named.items() if leaf.grad is not None}


@pytest.mark.parametrize(("cameras", "image"), CASES)
@pytest.mark.parametrize("per_token", [False, True])
def test_outputs_and_gradients_equal_float64(cameras: bool, image: bool, per_token: bool) -> None:
    arguments, model = given(image, per_token), WanModel(cameras, image)
    wide = {name: value.double() if value.is_floating_point() else value for name, value in arguments.items()}
    truth, true_gradients = gradients(WanModel(cameras, image).double(), wide)
    handle = accelerate(model)
    assert ("with camera phases" in str(handle.report())) == cameras
    got, found = gradients(model, arguments)
    assert found.keys() == true_gradients.keys() and ("cam_emb" in found) == cameras
    assert error(got, truth) < 1e-6
    # Relative to all gradients together: that of a key's bias vanishes but for rounding.
    names = sorted(found)
    assert error(*(torch.cat([g[n].double().flatten() for n in names]) for g in (found, true_gradients))) < 1e-6


@pytest.mark.parametrize(("cameras", "image"), CASES)
def test_removal_restores_the_bits(cameras: bool, image: bool) -> None:
    arguments, model = given(image), WanModel(cameras, image)
    before, keys = gradients(model, arguments), list(model.state_dict())
    handle = accelerate(model)
    assert list(model.state_dict()) == keys
    assert not torch.equal(gradients(model, arguments)[0], before[0])
    handle.remove()
    after = gradients(model, arguments)
    assert torch.equal(after[0], before[0]) and all(torch.equal(after[1][name], before[1][name]) for name in before[1])


def test_a_camera_network_without_cameras_is_the_plain_one() -> None:
    arguments, model = given(False) | {"cam_emb": None}, WanModel(True, False)
    truth = WanModel(True, False)(**arguments)
    accelerate(model)
    assert error(model(**arguments), truth) < 1e-6


def test_new_rotary_factors_are_noticed() -> None:
    """Another video length gets its own angles, also where the old factors are still alive."""
    model, arguments = WanModel(False, False), given(False)
    accelerate(model)
    model(**arguments)
    other = arguments | {"freqs": arguments["freqs"].conj().resolve_conj()}
    assert error(model(**other), WanModel(False, False)(**other)) < 1e-6


def test_the_lossless_level_leaves_it_alone_and_says_so() -> None:
    model, arguments = WanModel(True, False), given(False)
    handle = accelerate(model, level="lossless")
    assert torch.equal(model(**arguments), WanModel(True, False)(**arguments))
    assert [row["part"] for row in handle.report()] == ["everything else"]


def test_a_block_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from wan_dits import PlainBlock

    run = PlainBlock.run
    monkeypatch.setattr(PlainBlock, "run", lambda self, x, *rest: run(self, x, *rest) + 0.001 * x)
    with pytest.raises(UnknownNetwork, match="block 0 differs from the fused block by"):
        accelerate(WanModel(False, False))


def test_a_recammaster_block_is_refused() -> None:
    model = WanModel(False, False)
    model.blocks[1].projector = torch.nn.Linear(48, 48)
    with pytest.raises(UnknownNetwork, match="ReCamMaster"):
        accelerate(model)

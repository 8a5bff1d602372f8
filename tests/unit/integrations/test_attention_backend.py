"""The attention backend inside diffusers: same numbers as native, selectable both ways, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn
from dropin_models import error, gradients, inputs, output, wan
from torch import Tensor

from geoalign.errors import UsageError
from geoalign.integrations.attention_backend import register_attention_backend


@pytest.mark.parametrize("kind", ["t2v", "i2v", "14b"])
def test_a_network_on_the_backend_equals_native(kind: str) -> None:
    assert register_attention_backend() == register_attention_backend() == "geoalign"
    given, model = inputs(kind), wan(kind)
    model.set_attention_backend("geoalign")
    got, want = gradients(model, given), gradients(wan(kind), given)
    assert error(got[0], want[0]) < 1e-6
    names = sorted(want[1])
    assert error(*(torch.cat([found[1][n].flatten() for n in names]) for found in (got, want))) < 1e-6
    model.reset_attention_backend()
    assert torch.equal(output(model, given), want[0])


def test_it_can_be_chosen_for_a_block_of_code_and_behaves_as_a_member() -> None:
    register_attention_backend()
    model, given = wan(), inputs()
    plain = output(model, given)
    with attention_backend("geoalign"):
        assert error(output(model, given), plain) < 1e-6
    assert torch.equal(output(model, given), plain)
    member = AttentionBackendName("geoalign")
    assert member in list(AttentionBackendName) and member.value == "geoalign" and copy.deepcopy(member) is member


def test_log_sum_exp_has_diffusers_layout() -> None:
    register_attention_backend()
    q, k = torch.randn(2, 5, 3, 8), torch.randn(2, 7, 3, 8)
    out, lse = dispatch_attention_fn(q, k, k, backend="geoalign", attention_kwargs={"return_lse": True})
    scores = torch.einsum("bqhd,bkhd->bqhk", q.double(), k.double()) / 8**0.5
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=0, atol=1e-5)
    exact = torch.einsum("bqhk,bkhd->bqhd", scores.softmax(-1), k.double())
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ({"attn_mask": torch.ones(5, 7, dtype=torch.bool)}, "attn_mask"),
        ({"is_causal": True}, "is_causal"),
        ({"dropout_p": 0.1}, "dropout_p"),
        ({"parallel_config": object()}, "context parallelism"),
    ],
)
def test_what_it_lacks_is_refused(asked: dict[str, Tensor], name: str) -> None:
    register_attention_backend()
    q, k = torch.randn(1, 5, 1, 8), torch.randn(1, 7, 1, 8)
    with pytest.raises(UsageError, match=f"has no {name}"):
        dispatch_attention_fn(q, k, k, backend="geoalign", **asked)  # type: ignore[arg-type]

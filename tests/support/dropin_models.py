"""Tiny random networks of other projects, and diffusers' own code run in float64 as the truth about them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

RATIOS: dict[str, dict[str, Any]] = {
    "t2v": {"num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 280, "num_layers": 2},
    "i2v": {
        "num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 280, "num_layers": 2, "image_dim": 20,
        "added_kv_proj_dim": 48,
    },
    "14b": {"num_attention_heads": 5, "attention_head_dim": 16, "ffn_dim": 216, "num_layers": 3},
    "no_cross_norm": {
        "num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 96, "num_layers": 1, "cross_attn_norm": False,
    },
}  # fmt: skip
"""Ratios of head count, head size and feed-forward as in the released models, and the one that none of them has."""
LATENT = (4, 3, 6, 8)


def wan(kind: str = "t2v", dtype: torch.dtype = torch.float32, seed: int = 0) -> WanTransformer3DModel:
    """A network whose norms, gates and head are far from their initial values."""
    torch.manual_seed(seed)
    fixed = {"in_channels": LATENT[0], "out_channels": LATENT[0], "text_dim": 20, "freq_dim": 32}
    model = WanTransformer3DModel(**{"cross_attn_norm": True, **fixed, **RATIOS[kind]})
    for name, parameter in model.named_parameters():
        if name.endswith(("norm_q.weight", "norm_k.weight", "norm_added_k.weight", "norm2.weight")):
            nn.init.normal_(parameter, 1.0, 0.2)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, 0.0, 0.1)
        elif "scale_shift_table" in name:
            nn.init.normal_(parameter, 0.0, 0.7)
    kept = () if dtype == torch.float32 else model._keep_in_fp32_modules  # as from_pretrained loads it
    for name, parameter in model.named_parameters():
        if not any(part in name.split(".") for part in kept):
            parameter.data = parameter.data.to(dtype)
    return model.eval()


def inputs(kind: str = "t2v", dtype: torch.dtype = torch.float32, batch: int = 2) -> dict[str, Tensor]:
    """Keyword arguments of one forward."""
    generator = torch.Generator().manual_seed(5)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    text = 512 if "image_dim" in RATIOS[kind] else 9
    given = {
        "hidden_states": randn(batch, *LATENT),
        "timestep": torch.tensor([700.0, 310.0][:batch]),
        "encoder_hidden_states": randn(batch, text, 20),
    }
    return given | ({"encoder_hidden_states_image": randn(batch, 257, 20)} if text == 512 else {})


def output(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    return model(**given, return_dict=False)[0]


def gradients(model: nn.Module, given: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and the gradient of every parameter and of the latents, for a fixed output gradient."""
    model.zero_grad()
    x = given["hidden_states"].detach().clone().requires_grad_()
    y = output(model, given | {"hidden_states": x})
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(y)
    (weight * y).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return y.detach(), found | {"hidden_states": x.grad.clone()}  # type: ignore[union-attr]


@contextmanager
def float64() -> Iterator[None]:
    """Tensor.float() keeps float64: diffusers' own code then computes in float64 throughout."""
    original = Tensor.float
    Tensor.float = lambda self, *a, **k: self if self.dtype == torch.float64 else original(self, *a, **k)  # type: ignore
    try:
        yield
    finally:
        Tensor.float = original  # type: ignore[method-assign]


def truth(make: Callable[[], nn.Module], given: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of the untouched network in float64; its time features stay those of float32."""
    model = make().double()
    features = model.condition_embedder.timesteps_proj
    exact = type(features).forward
    features.forward = lambda t: exact(features, t.to(torch.float32)).double()
    wide = {name: value.double() for name, value in given.items()}
    with float64():
        return gradients(model, wide)


def error(got: Tensor, want: Tensor) -> float:
    """Relative L2 difference."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())

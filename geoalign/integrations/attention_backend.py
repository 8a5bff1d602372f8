"""The kernels' exact attention as a diffusers attention backend named ``geoalign``, for any diffusers transformer.

diffusers keeps its backends in an enumeration; a name from outside is added to it as a member, as cache-dit does. For
Wan networks ``geoalign_kernels.accelerate`` does more and needs no backend.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from geoalign.errors import UsageError
from geoalign_kernels import attention

NAME = "geoalign"


def register_attention_backend() -> str:
    """Make ``model.set_attention_backend("geoalign")`` and ``attention_backend("geoalign")`` known to diffusers.

    Calling it again changes nothing. The core is that of ``geoalign_kernels.resolve_attention``.

    Returns:
        The name of the backend.

    Raises:
        UsageError: this diffusers keeps its backends in another way.
    """
    try:
        from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
    except ImportError as error:
        raise UsageError(
            f"no attention backends in this diffusers ({error}); install diffusers 0.42 or 0.43"
        ) from error
    names: Any = AttentionBackendName
    member = names._value2member_map_.get(NAME)
    if member is None:
        member = str.__new__(names, NAME)
        member._name_, member._value_ = NAME.upper(), NAME
        setattr(names, member._name_, member)
        names._member_names_.append(member._name_)
        names._member_map_[member._name_] = names._value2member_map_[NAME] = member
        _AttentionBackendRegistry.register(member)(_backend)
    return NAME


def _backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of query [B, Sq, H, hd] to key and value [B, Sk, H, hd]; with ``return_lse`` also [B, Sq, H].

    Raises:
        UsageError: a mask, causal or grouped attention, dropout or context parallelism.
    """
    asked = {
        "attn_mask": attn_mask is not None,
        "is_causal": is_causal,
        "dropout_p": dropout_p != 0.0,
        "enable_gqa": enable_gqa and key.shape[2] != query.shape[2],
        "context parallelism": _parallel_config is not None,
    }
    if any(asked.values()):
        names = ", ".join(name for name, given in asked.items() if given)
        raise UsageError(f"attention backend 'geoalign' has no {names}: set_attention_backend('native') for this model")
    result = attention(query, key, value, scale=scale)
    if not return_lse:
        return result.out
    assert result.lse is not None  # exact attention has one
    return result.out, result.lse.transpose(1, 2)

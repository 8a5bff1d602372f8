"""Devices by the names that options give them."""

from __future__ import annotations

import torch

from geoalign.errors import ConfigError


def named_device(name: str, option: str = "device") -> torch.device:
    """The device called ``name``: cpu, cuda, cuda:N, or auto, which takes CUDA where there is one.

    Raises ConfigError, which names ``option``, for another name and for a device that this machine lacks.
    """
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if found else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"{option} {name!r}: no such device; use cpu, cuda, cuda:N or auto") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"{option} {name!r}: only cpu and cuda devices can be used")
    if device.type == "cuda" and (device.index or 0) >= found:
        raise ConfigError(f"{option} {name!r}: this machine has {found} CUDA devices (`geoalign doctor` lists them)")
    return device

"""The packages that a run imports, by its settings; looked for without importing any, PyTorch included."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from geoalign.files.check import Check
from geoalign.install import install

if TYPE_CHECKING:  # pydantic, which configurations need, is looked for here
    from geoalign.config.schema import Config

BASE = (
    "torch", "numpy", "scipy", "safetensors", "pydantic", "yaml", "av", "diffusers", "transformers", "ftfy", "nvtx",
    "matplotlib", "PIL", "tensorboard", "cv2", "tqdm",
)  # fmt: skip
"""What every installation has (triton aside, which PyTorch brings where it can run)."""
_FLASH = install("flash", "--no-build-isolation")
_OPTIONAL: tuple[tuple[str, str, Callable[[Config], bool]], ...] = (
    ("deepspeed", install("gpu"), lambda c: c.parallel.engine == "deepspeed"),
    ("torchao", install("gpu"), lambda c: c.optim.states == "int8" or c.ode.linears == "int8"),
    ("nvidia.dali", install("dali-cu13"), lambda c: c.data.clips.reader == "dali"),
    ("wandb", install("wandb"), lambda c: c.run.wandb is not None),
    ("flash_attn", _FLASH, lambda c: c.run.attention == "flash2"),
    ("flash_attn_interface", "build FlashAttention 3 (folder hopper of github.com/Dao-AILab/flash-attention)",
     lambda c: c.run.attention == "flash3"),
    ("flash_attn.cute", "pip install --pre flash-attn-4", lambda c: c.run.attention == "flash4"),
    ("depth_anything_3", "see docs/rewards.md", lambda c: _runs_inline(c, "depth_anything_3")),
)  # fmt: skip
"""Optional packages, and the settings that ask for them."""


def missing_base() -> list[Check]:
    """The packages of every installation that are not there; without them nothing else can be looked at."""
    return [_absent(name, install()) for name in BASE if not importable(name)]


def packages(config: Config) -> Iterator[Check]:
    """Every package that these settings import; those that are there are one line together."""
    wanted = [(name, install()) for name in BASE] + [(name, get) for name, get, asked in _OPTIONAL if asked(config)]
    missing = [_absent(name, get) for name, get in wanted if not importable(name)]
    yield from missing
    if not missing:
        yield Check("packages", "present", ", ".join(name for name, _ in wanted))


def importable(name: str) -> bool:
    """Whether a package or module is there; a package around it is imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:  # of a package around it
        return False


def _absent(name: str, get: str) -> Check:
    return Check(f"package {name}", "absent", "is not installed", get)


def _runs_inline(config: Config, evaluator: str) -> bool:
    return any(r.placement == "inline" and r.options.get("evaluator") == evaluator for r in config.rewards.values())

"""Settings of the embedded world: a stabilised drone that films a coloured map."""

from __future__ import annotations

from pydantic import Field, field_validator

from geoalign.config.base import Section


class WorldConfig(Section):
    """The procedural world with exact metric geometry (no downloads, no GPU)."""

    height: int = Field(48, gt=0)
    """Frame height in pixels."""
    width: int = Field(64, gt=0)
    """Frame width in pixels."""
    frames: int = Field(5, ge=2)
    """Frames of a clip, frame 0 included (it is given, frames 1.. are generated)."""
    focal_px: float = Field(52.0, gt=0)
    """Focal length in pixels."""
    tilt_deg: float = Field(20.0, ge=0, lt=60)
    """How far the camera looks ahead of straight down, in degrees; the gimbal keeps it fixed."""
    height_m: tuple[float, float] = (8.0, 12.0)
    """Range of the height above ground, in metres."""
    streets: bool = False
    """Whether streets with soft edges and blocks of their own brightness lie over the coloured map."""
    clips: int = Field(384, gt=0)
    """Source clips written for RL (unpaired with the targets)."""
    trajectories: int = Field(512, gt=0)
    """Target camera paths written for RL (unpaired with the clips)."""
    fps: float = Field(12.0, gt=0)
    """Frame rate of the clips; only playback and the unit of speed depend on it."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the scenes and paths on disk."""

    @field_validator("height_m")
    @classmethod
    def _above_ground(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError(f"height_m must be a lowest and a highest height above 0, got {list(value)}")
        return value

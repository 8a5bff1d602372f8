"""What a finished run leaves behind, for the tests of its report."""

from __future__ import annotations

from typing import Any

import numpy as np

FRAMES, HEIGHT, WIDTH = 4, 12, 16


def summary() -> dict[str, Any]:
    """Three noise seeds a value, in the layout that training writes."""
    before = {
        "translation_error_m": [0.48, 0.50, 0.52],
        "rotation_error_deg": [0.9, 1.0, 1.1],
        "scale_ratio": [1.50, 1.50, 1.50],
        "translation_gain": [1.40, 1.40, 1.40],
        "psnr_db": [18.0, 18.0, 18.0],
        "new_measure": [1.0, 2.0, 3.0],
    }
    after = {
        "translation_error_m": [0.24, 0.25, 0.26],
        "rotation_error_deg": [1.0, 1.05, 1.1],
        "scale_ratio": [1.10, 1.10, 1.10],
        "translation_gain": [0.98, 0.98, 0.98],
        "psnr_db": [17.0, 17.0, 17.0],
        "new_measure": [3.0, 2.0, 1.0],
    }
    kinds = ("presets", "random", "mean")
    seeds = {kind: {"before": before, "after": after} for kind in kinds}
    means = {
        kind: {stage: {key: float(np.mean(values)) for key, values in rows.items()} for stage, rows in stages.items()}
        for kind, stages in seeds.items()
    }
    return {"held_out": means, "held_out_per_noise_seed": seeds, "seed": 3, "wall_s": 100.0, "commit": "abc"}


def paths(count: int, scale: float) -> np.ndarray:
    c2w = np.tile(np.eye(4), (count, FRAMES, 1, 1))
    c2w[:, :, 0, 3] = scale * np.linspace(0, 1, FRAMES) * np.arange(1, count + 1)[:, None]
    return c2w

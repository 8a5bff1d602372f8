"""Figure of raw and rescaled target paths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from geoalign.config.data import RescaleConfig, TruncatedGaussian
from geoalign.geometry.rescale import RescaleResult, truncated_gaussian
from geoalign.geometry.trajectory import CameraTrajectory
from geoalign.io_utils import atomic_path

_SHOWN = 24


def plot_paths(
    path: Path, raw: Sequence[CameraTrajectory], results: Sequence[RescaleResult], config: RescaleConfig
) -> None:
    """Write a figure: paths from above before and after, speeds along them, drawn peak speeds against their law.

    Args:
        path: destination; the suffix names the format.
        raw: windows ``[F]`` in the archive's unit.
        results: what the rescale made of them.
        config: the rescale settings.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 7.5), layout="constrained")
    scaled = [result.trajectory for result in results]
    for axis, title, group in ((axes[0, 0], "raw (archive unit)", raw), (axes[1, 0], "rescaled (m)", scaled)):
        for trajectory in group[:_SHOWN]:
            position = trajectory.position.numpy()
            axis.plot(position[:, 0], position[:, 2], linewidth=1, alpha=0.7)
        axis.plot(0, 0, "k^", markersize=5)
        axis.set(title=f"from above, {title}", xlabel="right", ylabel="forward", aspect="equal")
    for axis, title, column in ((axes[0, 1], "speed (m/s)", 1), (axes[1, 1], "turn (deg/s)", 0)):
        for trajectory in scaled[:_SHOWN]:
            steps = trajectory.increments()[column].norm(dim=-1).numpy() * config.play_fps
            axis.plot(np.rad2deg(steps) if column == 0 else steps, linewidth=1, alpha=0.7)
        axis.set(title=title, xlabel="frame")
    _law(axes[0, 2], "peak speed (m/s)", [result.peak_translation for result in results], config.translation)
    _law(axes[1, 2], "peak turn (deg/s)", [result.peak_rotation for result in results], config.rotation)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)


def _law(axis: Any, title: str, values: Sequence[float], law: TruncatedGaussian) -> None:
    """Histogram of peaks beside the density that the draw follows."""
    axis.hist(values, bins=24, range=(0, 1.1 * law.high), density=True, alpha=0.6, label="measured")
    if law.std > 0:
        quantiles = truncated_gaussian(np.linspace(1e-4, 1 - 1e-4, 400), law.mean, law.std, law.low, law.high)
        shape = np.exp(-0.5 * ((quantiles - law.mean) / law.std) ** 2)
        mass = float(np.trapezoid(shape, quantiles)) or math.inf
        axis.plot(quantiles, shape / mass, "k", linewidth=1, label="law")
    axis.set(title=title)
    axis.legend(frameon=False)

"""Figures of camera paths: raw and rescaled targets, and few paths side by side with viewing directions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from geoalign.config.data import RescaleConfig, TruncatedGaussian
from geoalign.files.atomic import atomic_path
from geoalign.geometry.rescale import RescaleResult, truncated_gaussian
from geoalign.geometry.trajectory import CameraTrajectory

_SHOWN = 24
_COLOURS = ("#777777", "#c2410c")
PNG_MARK = {"Software": "geoalign"}
"""Metadata of the camera plots, by which one of them is told from a picture of somebody else."""


def plot_cameras(path: Path, cameras: Mapping[str, Tensor]) -> None:
    """Write :func:`cameras_figure` as a png that carries ``PNG_MARK``, atomically."""
    figure = cameras_figure(cameras)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lstrip(".") or None, dpi=110, metadata=PNG_MARK)


def cameras_figure(cameras: Mapping[str, Tensor]) -> Any:
    """Two camera paths from above and from the side, with viewing directions; down in the world is down on paper.

    Args:
        cameras: camera-to-world ``[F, 4, 4]`` in metres by label, at most two.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    reach = 0.2 * max([float((c2w[:, :3, 3] - c2w[0, :3, 3]).norm(dim=-1).max()) for c2w in cameras.values()] + [0.5])
    views = (
        ("from above", 0, 2, "x (m, right)", "z (m, forward)"),
        ("from the side", 2, 1, "z (m, forward)", "y (m, down)"),
    )
    for axis, (title, i, j, across, along) in zip(figure.subplots(1, 2), views, strict=True):
        for (name, c2w), colour in zip(cameras.items(), _COLOURS, strict=False):
            centre, look = c2w[:, :3, 3], c2w[:, :3, 2]
            axis.plot(centre[:, i], centre[:, j], "-o", color=colour, markersize=2, linewidth=1.5, label=name)
            for point, ray in zip(*(part[:: max(1, len(centre) // 8)] for part in (centre, look)), strict=True):
                tip = point + reach * ray  # a short line of sight, drawn even where the camera does not move
                axis.plot([point[i], tip[i]], [point[j], tip[j]], color=colour, linewidth=0.8)
        axis.set(title=title, xlabel=across, ylabel=along)
        axis.margins(0.25)
        axis.set_aspect("equal", adjustable="datalim")
        axis.grid(alpha=0.3)
        if j == 1:  # OpenCV's y points down
            axis.invert_yaxis()
    figure.axes[0].legend(frameon=False)
    return figure


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

    figure, axes = plt.subplots(2, 3, figsize=(13, 8), layout="constrained")
    figure.suptitle(
        f"{len(results)} target paths, mode {config.mode}, {config.play_fps:g} frames a second; "
        f"lines: the first {min(len(results), _SHOWN)}, coloured by their peak speed"
    )
    shown = results[:_SHOWN]
    tint = plt.get_cmap("viridis")
    order = np.argsort(np.argsort([result.peak_translation for result in shown]))
    colours = [tint(0.9 * rank / max(len(shown) - 1, 1)) for rank in order]  # yellow at the very end is hard to see
    _from_above(axes[0, 0], "raw", "archive unit", raw[:_SHOWN], colours)
    _from_above(axes[1, 0], "rescaled", "m", [result.trajectory for result in shown], colours)
    moves = [result.trajectory.increments() for result in shown]
    speeds = [move[1].norm(dim=-1).numpy() * config.play_fps for move in moves]
    turns = [np.rad2deg(move[0].norm(dim=-1).numpy()) * config.play_fps for move in moves]
    _along(axes[0, 1], "speed (m/s)", speeds, colours)
    _along(axes[1, 1], "turn (deg/s)", turns, colours)
    _law(axes[0, 2], "peak speed (m/s)", [result.peak_translation for result in results], config.translation)
    _law(axes[1, 2], "peak turn (deg/s)", [result.peak_rotation for result in results], config.rotation)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lstrip(".") or None, dpi=110)
    plt.close(figure)


def _from_above(
    axis: Any, what: str, unit: str, paths: Sequence[CameraTrajectory], colours: Sequence[tuple[float, ...]]
) -> None:
    """Paths in the x-z plane; a dot marks where each ends, the triangle where all start, looking up."""
    for path, colour in zip(paths, colours, strict=True):
        position = path.position.numpy()
        axis.plot(position[:, 0], position[:, 2], linewidth=1, color=colour)
        axis.plot(*position[-1, [0, 2]], "o", markersize=2.5, color=colour)
    axis.plot(0, 0, "k^", markersize=5)
    axis.set(title=f"from above, {what}", xlabel=f"right ({unit})", ylabel=f"forward ({unit})")
    axis.set_aspect("equal", adjustable="datalim")


def _along(axis: Any, title: str, lines: Sequence[np.ndarray[Any, Any]], colours: Sequence[tuple[float, ...]]) -> None:
    """Values of every step between frames."""
    from matplotlib.ticker import MaxNLocator

    for values, colour in zip(lines, colours, strict=True):
        axis.plot(np.arange(1, len(values) + 1), values, linewidth=1, color=colour)
    axis.set(title=title, xlabel="frame")
    axis.set_ylim(bottom=0)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _law(axis: Any, title: str, values: Sequence[float], law: TruncatedGaussian) -> None:
    """Histogram of peaks beside the density that the draw follows; the dashed lines are its bounds."""
    edges = np.linspace(min(0.0, *values), max(law.high, *values), 25)
    axis.hist(values, bins=edges, density=True, color="0.75", label="measured")
    if law.std > 0:
        quantiles = truncated_gaussian(np.linspace(1e-4, 1 - 1e-4, 400), law.mean, law.std, law.low, law.high)
        shape = np.exp(-0.5 * ((quantiles - law.mean) / law.std) ** 2)
        mass = float(np.trapezoid(shape, quantiles)) or math.inf
        axis.plot(quantiles, shape / mass, "k", linewidth=1.2, label="law")
    for bound in (law.low, law.high):
        axis.axvline(
            bound, ymax=0.8, color="k", linewidth=0.8, linestyle="--", label="bounds" if bound == law.low else None
        )
    axis.set(title=title, ylabel="density")
    axis.set_yticks([])
    axis.set_ylim(top=1.3 * axis.get_ylim()[1])  # room for the legend
    axis.legend(frameon=False, ncols=3, loc="upper center")

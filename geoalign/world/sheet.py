"""A contact sheet of the embedded world: one picture in which a person sees what the policy has to do."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw

from geoalign.config.world import WorldConfig
from geoalign.files.atomic import atomic_path
from geoalign.world.pairs import paired_videos

_ENLARGED, _HEADER, _GAP = 3, 24, 4  # times, pixels, pixels before enlarging


def write_sheet(world: WorldConfig, path: Path, rows: int = 10) -> None:
    """One row per preset path: the source frames, then the true target frames, enlarged three times and labelled."""
    pairs = paired_videos(world, rows, torch.Generator().manual_seed(world.seed), paths="presets", style="real")
    gap = torch.ones(rows, 3, world.height, _GAP)
    frames = [*pairs.batch.source.video.unbind(1), gap, *pairs.truth.unbind(1)]
    sheet = torch.cat(list(torch.cat(frames, dim=-1)), dim=-2)
    pixels = ((sheet.permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
    picture = Image.fromarray(pixels)
    picture = picture.resize((picture.width * _ENLARGED, picture.height * _ENLARGED), Image.Resampling.BICUBIC)
    labelled = Image.new("RGB", (picture.width, picture.height + _HEADER), "white")
    labelled.paste(picture, (0, _HEADER))
    draw = ImageDraw.Draw(labelled)
    for left, label in ((0, "source frames"), ((picture.width + _GAP * _ENLARGED) // 2, "true target frames")):
        draw.text((left + 4, 2), label, "black", font_size=_HEADER - 8)
    with atomic_path(path) as temporary:
        labelled.save(temporary, Image.registered_extensions().get(path.suffix.lower(), "PNG"))

"""What the two published scorers read from the disk: where it lies, how to get it, whether it is that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from geoalign.config.published import HPSV3, HPSV3_TOKENIZER, TEMPLATES, VIDEOALIGN
from geoalign.files.need import Need, looks_like_tokenizer
from geoalign.files.weights import TensorFile
from geoalign.models.layouts import summary
from geoalign.rewards.vlm import templates
from geoalign.rewards.vlm.body import hpsv3_head, videoalign_head
from geoalign.rewards.vlm.checkpoint import PEFT_PREFIX, check_headers
from geoalign.rewards.vlm.layout import HPSV3_BODY, VIDEOALIGN_BODY


def _template_need(name: str, folder: str | None) -> Need:
    path = templates.path_of(name, folder)
    return Need(f"prompt {name}", path, TEMPLATES.line(), lambda _: f"{len(templates.load(name, folder))} characters")


def videoalign(
    checkpoint: str, *, tokenizer: str | None = None, template_folder: str | None = None, **_: Any
) -> tuple[Need, ...]:
    """What :func:`geoalign.rewards.vlm.scorers.build_videoalign` reads with these options."""
    path = Path(checkpoint).expanduser()

    def verify(path: Path) -> str:
        file = TensorFile(path)
        check_headers(file, PEFT_PREFIX, VIDEOALIGN_BODY, videoalign_head)
        return summary(file.shapes)

    words = Path(tokenizer).expanduser() if tokenizer else path.parent / "tokenizer"
    return (
        Need("VideoAlign weights", path, VIDEOALIGN.line_for(path), verify),
        Need("VideoAlign tokenizer", words, VIDEOALIGN.line_for(words), looks_like_tokenizer),
        _template_need("videoalign", template_folder),
    )


def hpsv3(checkpoint: str, *, tokenizer: str, template_folder: str | None = None, **_: Any) -> tuple[Need, ...]:
    """What :func:`geoalign.rewards.vlm.scorers.build_hpsv3` reads with these options."""
    path, words = Path(checkpoint).expanduser(), Path(tokenizer).expanduser()

    def verify(path: Path) -> str:
        file = TensorFile(path)
        check_headers(file, "", HPSV3_BODY, hpsv3_head)
        return summary(file.shapes)

    return (
        Need("HPSv3 weights", path, HPSV3.line_for(path), verify),
        Need("HPSv3 tokenizer", words, HPSV3_TOKENIZER.line(words), looks_like_tokenizer),
        _template_need("hpsv3_instruction", template_folder),
        _template_need("hpsv3_suffix", template_folder),
    )

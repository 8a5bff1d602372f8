"""What a retake of one video needs of text and image encoders: where they lie, and what they make of the inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from geoalign.errors import UsageError
from geoalign.files import parsing
from geoalign.files.need import looks_like_tokenizer
from geoalign.models.encoders import check_image_encoder, check_text_encoder, load_image_encoder, load_text_encoder
from geoalign.policy.open import ModelFiles
from geoalign.types import Encodings, RetakeBatch

GUIDANCE = 5.0
"""Scale of classifier-free guidance where there is a text encoder and none was asked for."""
_TEXT = (("text_encoder", "tokenizer"), ("models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl"))
_IMAGE = ("image_encoder", "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")


def find_text_encoder(home: Path) -> tuple[Path, Path] | None:
    """Weights and tokenizer of the text encoder beside a model, or None for a model that reads no text."""
    return next(((home / w, home / t) for w, t in _TEXT if (home / w).exists()), None)


def reads_text_of(files: ModelFiles) -> bool:
    """Whether a model reads text; raises UsageError for one that does without a text encoder beside it."""
    home = files.location.home
    if find_text_encoder(home) is not None:
        return True
    if files.config.text_length > 1:
        (diffusers, its_tokenizer), (published, other_tokenizer) = _TEXT
        raise UsageError(
            f"this model reads text, and {home} holds no text encoder; put {diffusers}/ with "
            f"{its_tokenizer}/, or {published} with {other_tokenizer}/, there"
        )
    return False


def check_encoders(files: ModelFiles) -> None:
    """Look at the encoders beside a model by their headers; raises CheckpointError for what :func:`encode` would."""
    encoder = find_text_encoder(files.location.home)
    if encoder is not None:
        check_text_encoder(encoder[0])
        looks_like_tokenizer(encoder[1])
    if (image := _find_image_encoder(files)) is not None:
        check_image_encoder(image)


def _find_image_encoder(files: ModelFiles) -> Path | None:
    if files.config.image_dim is None:
        return None
    return next((path for name in _IMAGE if (path := files.location.home / name).exists()), None)


def choose_guidance(given: float | None, reads_text: bool, model: object) -> float:
    """The scale to use; raises UsageError for guidance of a ``model`` without text encoder."""
    if given not in (None, 1.0) and not reads_text:
        raise UsageError(f"--guidance {given} needs a text encoder, and {model} has none; use --guidance 1")
    return given if given is not None else (GUIDANCE if reads_text else 1.0)


class Encoders:
    """The text and the image encoder beside a model, loaded when first needed; they stay for the next video."""

    def __init__(self, files: ModelFiles, *, dtype: torch.dtype, device: torch.device | str) -> None:
        self._files, self._dtype, self._device = files, dtype, device
        self._text: Callable[[list[str]], Tensor] | None = None
        self._image: Callable[[Tensor], Tensor] | None = None

    def __call__(self, batch: RetakeBatch, prompt: str | None, negative_prompt: str) -> Encodings | None:
        """What they make of the prompts and of the first source frame; None for a model without encoders."""
        context = negative = None
        found = find_text_encoder(self._files.location.home)
        if found is not None and prompt is not None:
            if self._text is None:
                text = load_text_encoder(*found, dtype=self._dtype, device=str(self._device))
                text.length = self._files.config.text_length
                self._text = text
            context, negative = self._text([prompt, negative_prompt]).split(1)
        made = Encodings(context=context, negative=negative, image_tokens=self._image_tokens(batch))
        return made if len(made) else None

    def _image_tokens(self, batch: RetakeBatch) -> Tensor | None:
        if self._image is None:
            path = _find_image_encoder(self._files)
            if path is None:
                return None
            self._image = load_image_encoder(path, dtype=self._dtype, device=str(self._device))
        return self._image(batch.source.video[:, 0].to(self._device))


def read_text(value: str) -> str:
    """A text, or the contents of the file in ``@FILE``; raises DataError if it cannot be read."""
    return parsing.read_text(value[1:]).strip() if value.startswith("@") else value

"""What a retake of one video needs of text and image encoders: where they lie, and what they make of the inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from geoalign.errors import UsageError, argument
from geoalign.files import parsing
from geoalign.files.need import looks_like_tokenizer
from geoalign.jobs import arguments
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


def choose_guidance(
    given: float | None,
    reads_text: bool,
    model: object,
    *,
    prompt: str | None = None,
    negative_prompt: str | None = None,
    captioned: bool = False,
) -> float:
    """The scale of classifier-free guidance to use, where it and the texts fit each other and the model.

    Args:
        given: scale that was asked for; None: 5 for a model that reads text, else 1.
        reads_text: whether the model does (:func:`reads_text_of`).
        model: what it is called in messages.
        prompt, negative_prompt: texts that were asked for.
        captioned: whether a captioner writes the prompt that is missing.

    Raises:
        UsageError: guidance or a text that would have no effect, or a model that reads text and is given none.
    """
    scale = (GUIDANCE if reads_text else 1.0) if given is None else arguments.positive("guidance", given)
    texts = {"prompt": prompt is not None, "captioner": captioned, "negative_prompt": negative_prompt is not None}
    unread = " and ".join(argument(name) for name, is_given in texts.items() if is_given)
    if unread and not reads_text:
        raise UsageError(f"a prompt needs a text encoder, and {model} has none; drop {unread}")
    if scale != 1.0 and not reads_text:
        one = argument("guidance", 1)
        raise UsageError(f"{argument('guidance', scale)} needs a text encoder, and {model} has none; use {one}")
    if reads_text and prompt is None and not captioned:
        fix = argument("prompt", "TEXT or @FILE, or give --captioner FOLDER", "prompt=TEXT")
        raise UsageError(f"this model reads text: say what the video shows with {fix}")
    if negative_prompt is not None and scale == 1.0:
        unread, one = argument("negative_prompt"), argument("guidance", 1)
        raise UsageError(f"{unread} is the text of the second pass, which {one} does not make; drop one of both")
    return scale


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

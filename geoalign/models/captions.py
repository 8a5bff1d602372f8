"""Captions of clips without text: transformers' BLIP-2 (Li et al. 2023) on the middle frame."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from geoalign.config.published import BLIP2
from geoalign.errors import CheckpointError, DataError
from geoalign.files.parsing import first_line
from geoalign.models.encoders import clean_text
from geoalign.models.pretrained import check_pretrained, open_pretrained

if TYPE_CHECKING:
    from transformers import Blip2ForConditionalGeneration, Blip2Processor

_MAX_NEW_TOKENS = 40  # published captions are one clause; OPT goes on to invent a second one


class Captioner:
    """Greedy captions, so that one clip always gets one text.

    Args:
        model: a BLIP-2; its config names the image token.
        processor: brings frames to the model's size and tokens to text.
        folder: where both come from.
    """

    def __init__(self, model: Blip2ForConditionalGeneration, processor: Blip2Processor, folder: Path) -> None:
        self.model, self.processor, self.folder = model.eval().requires_grad_(False), processor, folder

    @torch.no_grad()
    def caption(self, frames: Tensor) -> str:
        """Describe the middle frame, index F // 2, of ``[F, 3, H, W]`` in [-1, 1].

        Raises:
            DataError: the model has nothing to say.
        """
        middle = ((frames[len(frames) // 2].float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        picture = Image.fromarray(middle.permute(1, 2, 0).cpu().numpy())
        pixels = self.processor.image_processor(picture, return_tensors="pt")["pixel_values"]
        tokens = self.model.generate(
            pixels.to(self.model.device, self.model.dtype), do_sample=False, num_beams=1, max_new_tokens=_MAX_NEW_TOKENS
        )
        text = clean_text(self.processor.batch_decode(tokens, skip_special_tokens=True)[0])
        if not text:
            raise DataError(f"{self.folder}: the captioner gave an empty caption; write the prompt yourself")
        return text


def load_captioner(
    folder: Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Captioner:
    """Load a BLIP-2 folder (``config.json``, safetensors, processor and tokenizer files); nothing is downloaded.

    Raises:
        CheckpointError: the folder is missing, damaged or holds another kind of model.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: no BLIP-2 folder (config.json is missing); get one with: {BLIP2.line(folder)}"
        )
    from transformers import AutoConfig, Blip2ForConditionalGeneration, Blip2Processor

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if config.model_type != "blip-2" or config.image_token_index is None:
            raise CheckpointError(
                f"{folder}: a {config.model_type} model; needed is BLIP-2 whose config.json has an image_token_index"
            )
        model: Any = open_pretrained(Blip2ForConditionalGeneration, folder, "BLIP-2 folder", dtype=dtype)
        processor = Blip2Processor.from_pretrained(folder, local_files_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # of json, the tokenizers library and transformers itself
        raise CheckpointError(f"{folder}: captioner cannot be read ({first_line(error)})") from error
    return Captioner(model.to(device), processor, folder)


def check_captioner(folder: Path) -> str:
    """Look at what :func:`load_captioner` would load, by headers; a few words, and the same errors."""
    return check_pretrained(folder, "BLIP-2 folder", ("blip-2",))

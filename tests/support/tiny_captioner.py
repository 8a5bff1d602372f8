"""A tiny random BLIP-2 in the published folder format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SIZE, QUERIES = 28, 3
VOCABULARY = (
    "<s>", "<pad>", "</s>", "<unk>", "<image>", "a", "bear", "walks", "past", "rocks", "river", "street", "tree", "two",
    "dogs", "red", "car", "on", "the",
)  # fmt: skip


def toy_tokenizer() -> PreTrainedTokenizerBase:
    """Whole words in a file like the published one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip


def save_tiny_blip2(folder: Path) -> Path:
    """A random BLIP-2 over OPT, saved as the published folder is: weights, configuration, processor, tokenizer."""
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2Processor,
        BlipImageProcessor,
        OPTConfig,
    )  # fmt: skip

    tokenizer = toy_tokenizer()
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2}
    text = OPTConfig(
        vocab_size=len(VOCABULARY), hidden_size=16, ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=64,
        bos_token_id=0, pad_token_id=1, eos_token_id=2, **layers,
    )  # fmt: skip
    config = Blip2Config(
        vision_config={"hidden_size": 16, "intermediate_size": 32, "image_size": SIZE, "patch_size": 14, **layers},
        qformer_config={"hidden_size": 16, "intermediate_size": 32, "vocab_size": 20, **layers},
        text_config=text.to_dict(), num_query_tokens=QUERIES, image_token_index=4,
    )  # fmt: skip
    torch.manual_seed(1)
    model = Blip2ForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        # Small tied embeddings: the next word is decided by the layers, not by likeness to the last word.
        norm = "norm" in name.lower() and name.endswith("weight")
        parameter.data.normal_(1.0 if norm else 0.0, 0.1 if "embed_tokens" in name else 0.5)
    model.save_pretrained(folder)
    image = BlipImageProcessor(size={"height": SIZE, "width": SIZE})
    Blip2Processor(image, tokenizer, num_query_tokens=QUERIES).save_pretrained(folder)
    return folder

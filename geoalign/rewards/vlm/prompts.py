"""Chat text around a clip, its tokens, and the places of visual and reward tokens: built once, static afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from geoalign.errors import RewardError
from geoalign.files.parsing import first_line

Encode = Callable[[str], list[int]]

VIDEO_PAD, IMAGE_PAD = "<|video_pad|>", "<|image_pad|>"
VQ, MQ, TA = "<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"
REWARD = "<|Reward|>"


@dataclass(frozen=True, slots=True)
class TokenPlan:
    """Tokens of one prompt: ``ids`` [L], where the visual tokens go, and where the head reads."""

    ids: tuple[int, ...]
    visual_index: tuple[int, ...]
    pool_index: tuple[int, ...]

    def padded(self, length: int, pad_id: int = 0) -> TokenPlan:
        """Right-padded to ``length``; causal attention keeps what is read unchanged."""
        if length < len(self.ids):
            raise RewardError(f"a prompt of {len(self.ids)} tokens does not fit into {length}")
        filler = (pad_id,) * (length - len(self.ids))
        return TokenPlan(self.ids + filler, self.visual_index, self.pool_index)


def chat_opening(pad: str) -> str:
    """Qwen2-VL's chat text up to the user's words: default system turn, then the visual placeholder."""
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n<|vision_start|>{pad}<|vision_end|>"
    )


def plan_tokens(encode: Encode, text: str, *, pad: str, visual_tokens: int, reads: Sequence[str]) -> TokenPlan:
    """Encode ``chat_opening(pad) + text``, cut after the last read token, repeat the placeholder per visual token.

    What follows the last read token cannot change the score (attention is causal), so it is not computed.

    Raises RewardError when the tokenizer does not know a special token or the text holds it not exactly once.
    """
    ids = encode(chat_opening(pad) + text)
    places = [_place(encode, ids, token) for token in (pad, *reads)]
    visual, pooled = places[0], places[1:]
    if any(place < visual for place in pooled):
        raise RewardError("a reward token stands before the clip; the prompt template is not the published one")
    shift = visual_tokens - 1
    end = max(pooled) + 1
    return TokenPlan(
        ids=(*ids[:visual], *([ids[visual]] * visual_tokens), *ids[visual + 1 : end]),
        visual_index=tuple(range(visual, visual + visual_tokens)),
        pool_index=tuple(place + shift for place in pooled),
    )


def _place(encode: Encode, ids: Sequence[int], token: str) -> int:
    code = encode(token)
    if len(code) != 1:
        raise RewardError(f"the tokenizer splits {token}; use the tokenizer published with the scorer")
    if ids.count(code[0]) != 1:
        raise RewardError(f"expected {token} exactly once in the prompt, found it {ids.count(code[0])} times")
    return ids.index(code[0])


def load_encoder(folder: str, added: Sequence[str]) -> Encode:
    """The tokenizer at ``folder`` (local files only) with the special tokens ``added``, as a plain function.

    Raises RewardError when the folder holds no tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of json, the tokenizers library and transformers itself
        raise RewardError(
            f"no tokenizer at {folder} ({first_line(error)}); download the tokenizer files that the scorer's page names"
            " into it"
        ) from error
    tokenizer.add_special_tokens({"additional_special_tokens": list(added)})
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]

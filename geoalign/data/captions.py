"""Prompts: which text goes with a clip, and removal of sentences that narrate the source's camera motion.

Walking-tour captions tell how the camera moves ("the camera moves forward along the street"); a retake has another
camera, so such text would contradict the target path, both for the model and for rewards that read the prompt.
"""

from __future__ import annotations

import re

from geoalign.config.data import ClipsConfig
from geoalign.data.clip_record import ClipRecord

CLEANING_VERSION = 2
"""Part of the settings of prepared caches: raised whenever other words are made of a caption, here or by
``geoalign.models.encoders.clean_text``."""

_OBSERVER = (
    r"\b(?:camera\w*|cameraman|viewpoint|point of view|pov|footage|viewer|videographer|shot|drone|lens|vantage)\b"
)
_MOTION = (
    r"\b(?:mov(?:e|es|ed|ing|ement)|pan(?:s|ned|ning)?|tilt(?:s|ed|ing)?|zoom(?:s|ed|ing)?|dolly|dollies|turn(?:s|ed|ing)?"
    r"|rotat(?:e|es|ed|ing|ion)|track(?:s|ed|ing)?|walk(?:s|ed|ing)?|advanc(?:e|es|ed|ing)|glid(?:e|es|ed|ing)"
    r"|pivot(?:s|ed|ing)?|orbit(?:s|ed|ing)?|follow(?:s|ed|ing)?|approach(?:es|ed|ing)?|progress(?:es|ed|ing)?"
    r"|shift(?:s|ed|ing)?|sway(?:s|ed|ing)?|travel(?:s|led|ling|ed|ing)?|proceed(?:s|ed|ing)?|continu(?:e|es|ed|ing)"
    r"|shak(?:e|es|y|ing)|handheld|steady|steadily|static|stationary|forward|backward|backwards)\b"
)
_FIRST_PERSON = r"\b(?:we|i|one)\b.{0,20}" + _MOTION
_MOTION_SENTENCE = re.compile(
    rf"(?=.*{_OBSERVER})(?=.*{_MOTION})|^\W*(?:as\s+)?{_FIRST_PERSON}|\bfirst[- ]person\b", re.I
)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")


def remove_camera_motion(caption: str) -> str:
    """Drop sentences about the camera's motion; the others stay word for word, joined by single spaces.

    A sentence is dropped if it names an observer (camera, viewpoint, footage, viewer, shot, drone, ...) together with
    a word of motion or steadiness (moves, pans, zooms, walks, forward, static, ...), if it starts in the first person
    with such a word ("We walk past ..."), or if it says "first-person". People and cars that move are kept.
    """
    sentences = (part.strip() for part in _SENTENCE_END.split(caption))
    return " ".join(part for part in sentences if part and not _MOTION_SENTENCE.search(part))


def prompt_of(record: ClipRecord, config: ClipsConfig, generated: str | None = None) -> str:
    """The prompt of a clip under ``config.caption``; ``generated`` is its prepared BLIP-2 caption, if any."""
    if config.caption == "constant":
        return config.caption_text
    text = generated if config.caption == "blip2" and generated else record.caption
    if config.caption != "verbatim":
        text = remove_camera_motion(text)
    return text or config.caption_text

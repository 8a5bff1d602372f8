"""What the files of a benchmark's folder must hold: whoever reads one may then take its keys and types for granted."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from geoalign.files.forms import Form

_Row = Annotated[list[float], Field(min_length=4, max_length=4)]


class _ByFrame(Form):
    frames: list[int] = Field(default_factory=list)
    position_m: list[float] = Field(default_factory=list)
    rotation_deg: list[float] = Field(default_factory=list)
    c2w: list[Annotated[list[_Row], Field(min_length=3, max_length=3)]] = Field(default_factory=list)

    @model_validator(mode="after")
    def _equally_long(self) -> Self:
        if len({len(self.frames), len(self.position_m), len(self.rotation_deg), len(self.c2w)}) > 1:
            raise ValueError("its lists hold unequal numbers of frames")
        return self


class _ReadingForm(Form):
    """Of :class:`geoalign.benchmark.measure.Reading`."""

    status: Literal["ok", "failed", "not applicable"]
    cause: str
    metrics: dict[str, float | None]
    by_frame: _ByFrame


class RowForm(Form):
    """One case of one method; what is measured of a video is there where the case is ``ok``."""

    method: str
    case: str
    clip: str
    path: str
    speed: float
    status: Literal["ok", "failed"]
    cause: str
    readers: dict[str, _ReadingForm]
    frames: int | None = Field(None, ge=1)
    video: str = ""
    source: str = ""
    facts: dict[str, float | None] = Field(default_factory=dict)
    metrics: dict[str, float | None] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _whole_where_ok(self) -> Self:
        wanted = {"frames", "source"} if self.video else set[str]()
        if self.status == "ok":
            wanted |= {"frames", "video", "source", "facts", "metrics"}
        if missing := sorted(wanted - self.model_fields_set):
            raise ValueError(f"{', '.join(missing)} missing")
        return self


class _ReaderForm(Form):
    cameras: bool
    metrics: list[str]
    licence: str = ""
    is_the_reward: bool = False


class ManifestForm(Form):
    """``benchmark.json``: what may not become another thing."""

    settings: dict[str, Any]
    methods: dict[str, Any]
    contents: dict[str, str]
    cases: list[str]
    readers: dict[str, _ReaderForm]


class NumbersForm(Form):
    """Numbers as printed by their authors."""

    source: str = ""
    methods: dict[str, dict[str, float]]

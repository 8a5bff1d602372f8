"""The base of all configuration sections: frozen, strict, documented field by field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator


class Section(BaseModel):
    """A frozen section; unknown keys are errors (the loader adds the nearest match), and so are NaN and infinity."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*")
    @classmethod
    def _home_is_meant(cls, value: Any) -> Any:
        """A path's ``~`` is the home folder, as in a shell, which expands none behind ``key=`` and none in YAML."""
        if not isinstance(value, Path) or not str(value).startswith("~"):
            return value
        try:
            return value.expanduser()
        except RuntimeError as error:
            raise ValueError(f"{value}: there is no such home folder; write the path out") from error

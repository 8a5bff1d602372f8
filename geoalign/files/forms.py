"""What a JSON file must hold, stated as a model: of a damaged or foreign one the first wrong key is named."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from geoalign.errors import DataError
from geoalign.files.parsing import Failure, first_line

Filled = TypeVar("Filled", bound="Form")


class Form(BaseModel):
    """The base of what files are held to: types as they are written, no NaN; other keys are kept."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


def filled(form: type[Filled], value: Any, where: object, fix: str, failure: Failure = DataError) -> Filled:
    """``value`` as a filled form.

    Args:
        form: what it must hold.
        value: of a JSON file.
        where: the file, and the place in it.
        fix: what to do about a file that holds anything else.
        failure: the error for such a file.

    Raises:
        failure: one line that names ``where``, the first key that does not fit, and ``fix``.
    """
    try:
        return form.model_validate(value)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
        key = ".".join(map(str, problem["loc"]))
        said = first_line(ValueError(problem["msg"].removeprefix("Value error, ").replace("Input should", "should")))
        raise failure(f"{where}: {f'{key}: ' if key else ''}{said}; {fix}") from None

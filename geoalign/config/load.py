"""Validate merged configuration data: one frozen object, or an error that lists every problem with place and fix."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from geoalign.config.introspect import field_paths, model_of, value_models
from geoalign.config.source import KeyPath, RawConfig, did_you_mean, dump_yaml, load_raw
from geoalign.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)
_UNWRITABLE = re.compile("[\0\ud800-\udfff]")  # no file name or terminal takes these


def load_config(model: type[Model], name: str, overrides: Sequence[str] = ()) -> Model:
    """Load ``name`` (preset or path), apply ``overrides`` and validate against ``model``.

    Raises:
        ConfigError: file missing or malformed, key unknown, value refused; the message lists every problem.
    """
    return validate(model, load_raw(name, overrides))


def validate(model: type[Model], raw: RawConfig) -> Model:
    """Validate merged data; all problems are reported at once, each with its place."""
    if hidden := [path for path, value in _leaves(raw.data) if isinstance(value, str) and _UNWRITABLE.search(value)]:
        raise ConfigError(
            "\n".join(f"{_place(raw, path)}`{'.'.join(path)}` holds a zero byte or half a character" for path in hidden)
        )
    data = _drop_removed_entries(model, raw.data)
    unknown = [_unknown_key_text(model, raw, path, section) for path, section in _unknown_keys(model, data)]
    if unknown:
        raise ConfigError("\n".join(unknown))
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = [_error_text(raw, problem) for problem in error.errors(include_url=False)]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def to_yaml(config: BaseModel) -> str:
    """Write a resolved configuration as YAML that :func:`load_config` reads back to an equal object."""
    return dump_yaml(config.model_dump(mode="json"))


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to ``{"a.b": value}``; an empty mapping stays as a leaf."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(flatten(item, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def differing_keys(*flat: Mapping[str, Any]) -> list[str]:
    """Keys of flattened mappings whose values are not equal in all of them, in order of first appearance."""
    absent = object()
    keys = dict.fromkeys(key for values in flat for key in values)
    return [key for key in keys if any(values.get(key, absent) != flat[0].get(key, absent) for values in flat[1:])]


def _leaves(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every value that is no mapping and no list, with its place."""
    if isinstance(value, Mapping | list):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _leaves(item, (*path, str(key)))
    else:
        yield path, value


def _drop_removed_entries(model: type[BaseModel], data: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out entries of by-name mappings that were set to null: so an experiment removes what its base defines."""
    result = dict(data)
    for name, info in model.model_fields.items():
        value = result.get(name)
        if not isinstance(value, Mapping):
            continue
        if inner := model_of(info.annotation):
            result[name] = _drop_removed_entries(inner, value)
        elif value_models(info.annotation):
            result[name] = {key: item for key, item in value.items() if item is not None}
    return result


def _unknown_keys(
    model: type[BaseModel], data: Mapping[str, Any], path: KeyPath = ()
) -> Iterator[tuple[KeyPath, type[BaseModel]]]:
    """Yield the keys that no field takes, each with the section that was asked for it."""
    for key, value in data.items():
        here = (*path, str(key))
        info = model.model_fields.get(str(key))
        if info is None:
            yield here, model
            continue
        if not isinstance(value, Mapping):
            continue
        if inner := model_of(info.annotation):
            yield from _unknown_keys(inner, value, here)
        elif len(entries := value_models(info.annotation)) == 1:
            for name, item in value.items():
                if isinstance(item, Mapping):
                    yield from _unknown_keys(entries[0], item, (*here, str(name)))


def _unknown_key_text(root: type[BaseModel], raw: RawConfig, path: KeyPath, section: type[BaseModel]) -> str:
    """Suggest, in this order: a near name in the same section, the same name elsewhere, a near dotted path."""
    dotted, key = ".".join(path), path[-1]
    known = field_paths(root)
    suggestion = None
    if close := difflib.get_close_matches(key, section.model_fields, n=1, cutoff=0.55):
        suggestion = ".".join((*path[:-1], close[0]))
    elif elsewhere := [name for name in known if name.rpartition(".")[2] == key]:
        suggestion = elsewhere[0]
    elif len(path) == 1 and (near := difflib.get_close_matches(dotted, known, n=1, cutoff=0.6)):
        suggestion = near[0]
    fix = f"did you mean `{suggestion}`?" if suggestion else f"known here: {', '.join(sorted(section.model_fields))}."
    return f"{_place(raw, path)}unknown key `{dotted}`; {fix}"


def _error_text(raw: RawConfig, problem: Any) -> str:
    path = _data_path(raw.data, problem["loc"])
    value = problem.get("input")
    kind = problem["type"]
    message = problem["msg"]
    if kind in ("literal_error", "enum"):
        expected = problem["ctx"]["expected"]
        choices = re.findall(r"'([^']*)'", expected)
        hint = did_you_mean(str(value), choices)
        message = f"must be one of {', '.join(choices) or expected}, got {value!r}{hint}"
    elif kind == "missing":
        path = tuple(str(part) for part in problem["loc"])
        message = "is required and has no default; set it in the file or on the command line"
    elif kind in ("value_error", "assertion_error"):
        message = message.removeprefix("Value error, ").removeprefix("Assertion failed, ")
    elif isinstance(value, Mapping):
        message = f"{_lower(message)}"
    else:
        message = f"{_lower(message)}, got {value!r}"
    if not path:
        path = _named_key(raw, message)
        return f"{_place(raw, path)}{message}"
    where = f"`{'.'.join(path)}` "
    joiner = "" if kind == "missing" or message.startswith(("must", "should")) else ": "
    where = where.rstrip() if joiner else where
    return f"{_place(raw, path)}{where}{joiner}{message}"


def _named_key(raw: RawConfig, message: str) -> KeyPath:
    """Find the first written key that a message about several sections names, to point at its line."""
    for name in re.findall(r"[a-z_]+(?:\.[a-z_]+)+", message):
        if (path := tuple(name.split("."))) in raw.origins:
            return path
    return ()


def _lower(message: str) -> str:
    message = message[:1].lower() + message[1:]
    return message.removeprefix("input ")


def _data_path(data: Any, location: Sequence[str | int]) -> KeyPath:
    """Keep the parts of a pydantic location that exist in the data (tags of unions do not)."""
    path: list[str] = []
    for part in location:
        known = part in data if isinstance(data, Mapping) else isinstance(data, list) and part in range(len(data))
        if known:
            data = data[part]
        if known or part is location[-1]:
            path.append(str(part))
    return tuple(path)


def _place(raw: RawConfig, path: KeyPath) -> str:
    origin = raw.origin(path)
    return f"{origin}: " if origin else ""

"""Write the reference page of all settings from the schema and the presets, so that it cannot go stale."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from geoalign.config.introspect import item_model, model_of, value_models
from geoalign.config.load import flatten, load_config
from geoalign.config.source import preset_names, preset_summary

PAPER_PRESET = "paper_64xa800"

INTRODUCTION = """\
<!-- Written by `geoalign config docs --out docs/configuration.md`; a test compares the two. Do not edit. -->
# Configuration

A run is one YAML file: `geoalign train --config NAME_OR_PATH section.key=value ...`. `extends: OTHER` starts from
another file (at most two deep): mappings merge key by key, everything else replaces, and `null` removes an entry of a
by-name mapping such as `rewards`. An unknown key is an error that names the nearest known one.

    geoalign config print --config NAME section.key=value    # what a run would use, resolved
    geoalign config check --config NAME --world-size 64      # is it possible on 64 processes?
    geoalign config diff --config NAME --against OTHER       # which settings differ
    geoalign config schema > geoalign.schema.json            # completion in editors that speak YAML schemas
"""

PAPER_NOTE = f"""\
## Values of the paper

What `{PAPER_PRESET}` uses where the Geo-Align paper (arXiv 2605.23903) prints a value (*published*) or leaves it open
(*assumed*, with the reason or the alternative).
"""


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the page."""

    key: str
    type: str
    default: str
    doc: str
    mark: str = ""
    why: str = ""


def reference_page(schema: type[BaseModel]) -> str:
    """Compose ``docs/configuration.md`` for the root section ``schema``."""
    settings = {name: list(_settings(name, info, _default(info))) for name, info in schema.model_fields.items()}
    parts = [INTRODUCTION, "## Presets\n", _presets_table(), "## Sections\n", _overview(schema)]
    for name, info in schema.model_fields.items():
        parts += [f"### `{name}`\n", _section_text(info), _settings_table(settings[name])]
    parts += [PAPER_NOTE, _paper_table(schema, [row for rows in settings.values() for row in rows])]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts if part)


def _settings(
    key: str, info: FieldInfo, default: Any, inherited: Mapping[str, Any] = types.MappingProxyType({})
) -> Iterator[Setting]:
    """Yield the rows of one field: itself, or the fields of its section with the defaults its parent gives them.

    A mark (published, assumed) on a field that holds a section counts for all keys of the section.
    """
    extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else inherited
    inner = model_of(info.annotation)
    if inner is not None:
        for name, field in inner.model_fields.items():
            value = getattr(default, name) if isinstance(default, inner) else _default(field)
            yield from _settings(f"{key}.{name}", field, value, extra)
        return
    yield Setting(
        key=key,
        type=_type_text(info.annotation) + _bounds_text(info),
        default=_value_text(default),
        doc=_one_line(info.description),
        mark=str(extra.get("paper", "")),
        why=str(extra.get("why", "")),
    )
    entries = [(f"{key}.NAME", model) for model in value_models(info.annotation)]
    if item := item_model(info.annotation):
        entries.append((f"{key}[]", item))
    for prefix, model in entries:
        for name, field in model.model_fields.items():
            yield from _settings(f"{prefix}.{name}", field, _default(field))


def _presets_table() -> str:
    rows = [(f"`{name}`", preset_summary(name)) for name in preset_names()]
    return _table(("Preset", "What it is for"), rows)


def _overview(schema: type[BaseModel]) -> str:
    rows = [(f"[`{name}`](#{name})", _one_line(info.description)) for name, info in schema.model_fields.items()]
    return _table(("Section", "What it holds"), rows)


def _section_text(info: FieldInfo) -> str:
    models = [model_of(info.annotation), *value_models(info.annotation)]
    texts = [_one_line(model.__doc__) for model in models if model is not None]
    return "\n".join(texts) + "\n" if texts else ""


def _settings_table(settings: list[Setting]) -> str:
    rows = [
        (f"`{row.key}`", _code(row.type), _code(row.default), row.doc + (f" (*{row.mark}*)" if row.mark else ""))
        for row in settings
    ]
    return _table(("Key", "Type", "Default", "Meaning"), rows)


def _paper_table(schema: type[BaseModel], settings: list[Setting]) -> str:
    if PAPER_PRESET not in preset_names():
        return ""
    values = load_config(schema, PAPER_PRESET).model_dump(mode="json")
    flat = flatten(values)
    rows = []
    for row in settings:
        if not row.mark:
            continue
        value = flat.get(row.key, _lookup(values, row.key))
        rows.append((f"`{row.key}`", _code(_value_text(value)), row.mark, row.why))
    rows.sort(key=lambda cells: cells[2] != "published")
    return _table(("Key", "Value", "Source", "Reason or alternative"), rows)


def _lookup(values: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(values, Mapping) or part not in values:
            return PydanticUndefined
        values = values[part]
    return values


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _default(info: FieldInfo) -> Any:
    return info.get_default(call_default_factory=True) if not info.is_required() else PydanticUndefined


def _value_text(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_value_text(item) for item in value) + "]"
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, bool | int | Mapping) or value is None:
        return json.dumps(value, default=str)
    return str(value) or '""'


def _type_text(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_text(arguments[0])
    if origin is Literal:
        return " | ".join(str(argument) for argument in arguments)
    if origin in (Union, types.UnionType):
        return " | ".join(_type_text(argument) for argument in arguments)
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return f"list of {_type_text(arguments[0])}"
    if origin in (tuple, list):
        return "[" + ", ".join(_type_text(argument) for argument in arguments) + "]"
    if origin is dict:
        return f"mapping of {_type_text(arguments[1])}"
    if annotation is type(None):
        return "null"
    names = {"str": "text", "Path": "path", "bool": "true | false", "Any": "any"}
    name = getattr(annotation, "__name__", str(annotation))
    return names.get(name, name)


def _bounds_text(info: FieldInfo) -> str:
    signs = {annotated_types.Gt: ">", annotated_types.Ge: ">=", annotated_types.Lt: "<", annotated_types.Le: "<="}
    bounds = []
    for constraint in info.metadata:
        sign = signs.get(type(constraint))
        if sign:
            limit = next(getattr(constraint, name) for name in ("gt", "ge", "lt", "le") if hasattr(constraint, name))
            bounds.append(f"{sign} {limit}")
    return " " + ", ".join(bounds) if bounds else ""


def _one_line(text: str | None) -> str:
    return " ".join((text or "").replace("``", "`").split())


def _code(text: str) -> str:
    return f"`{text}`" if text else ""

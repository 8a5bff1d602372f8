"""What the schema says about itself: nested sections, by-name mappings and the dotted paths of all keys."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel


def model_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section class of a field, looking through ``Annotated`` and ``| None``; None for plain values."""
    models = [part for part in _alternatives(annotation) if _is_model(part)]
    return models[0] if len(models) == 1 else None


def value_models(annotation: Any) -> list[type[BaseModel]]:
    """Return the section classes that entries of a ``dict[str, Section]`` field may take (several for a union)."""
    for part in _alternatives(annotation):
        if get_origin(part) in (dict, Mapping) or get_origin(part) is types.MappingProxyType:
            arguments = get_args(part)
            return [item for item in _alternatives(arguments[1]) if _is_model(item)]
    return []


def item_model(annotation: Any) -> type[BaseModel] | None:
    """Return the section class of the entries of a ``tuple[Section, ...]`` or ``list[Section]`` field."""
    for part in _alternatives(annotation):
        if get_origin(part) in (tuple, list):
            return model_of(get_args(part)[0])
    return None


def field_paths(model: type[BaseModel], prefix: str = "") -> list[str]:
    """List the dotted paths of all keys, sections included; entries of by-name mappings appear as ``NAME``."""
    paths: list[str] = []
    for name, info in model.model_fields.items():
        path = f"{prefix}{name}"
        paths.append(path)
        if inner := model_of(info.annotation):
            paths.extend(field_paths(inner, f"{path}."))
        for entry in value_models(info.annotation):
            paths.extend(field_paths(entry, f"{path}.NAME."))
    return list(dict.fromkeys(paths))


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _alternatives(annotation: Any) -> list[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _alternatives(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [leaf for part in get_args(annotation) for leaf in _alternatives(part)]
    return [annotation]

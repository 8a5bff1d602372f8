"""From YAML files and ``a.b=c`` overrides to merged data that remembers where every value was written.

A preset is a YAML file. ``extends: other`` names a file (or preset) it starts from, at most two deep; mappings merge
key by key, everything else replaces. Every value remembers where it was written, so that an error of the schema can
say ``configs/node_8gpu.yaml:12`` instead of a pydantic location tuple. Validation is in :mod:`geoalign.config.load`.
"""

from __future__ import annotations

import difflib
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from geoalign.errors import ConfigError
from geoalign.files.parsing import read_text
from geoalign.files.yaml_text import MAX_YAML, Loader, parse_yaml

MAX_EXTENDS = 2
COMMAND_LINE = "command line"

KeyPath = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RawConfig:
    """Merged but unvalidated data, with the origin (``file:line`` or ``command line``) of every key."""

    data: dict[str, Any]
    origins: dict[KeyPath, str] = field(default_factory=dict)

    def origin(self, path: KeyPath) -> str:
        """Return where ``path`` was written, or where its nearest enclosing section was, or the empty string."""
        for length in range(len(path), 0, -1):
            if found := self.origins.get(path[:length]):
                return found
        return ""


class _Dumper(yaml.SafeDumper):
    """Quotes exactly the strings that :class:`Loader` would read as something else."""

    yaml_implicit_resolvers = Loader.yaml_implicit_resolvers


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """Line breaks of Unicode are escaped: PyYAML reads one in quotes as a space."""
    style = '"' if _BREAKS.intersection(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_BREAKS = frozenset("\x85\u2028\u2029")
_Dumper.add_representer(str, _represent_text)


def dump_yaml(data: Any) -> str:
    """Write plain data so that this module's reader gives back equal data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


def presets_folder() -> Path:
    """Return the copy of ``configs/`` inside an installed wheel, else the folder of the repository."""
    package = Path(__file__).resolve().parents[1]
    bundled = package / "_presets"
    return bundled if bundled.is_dir() else package.parent / "configs"


def preset_names() -> list[str]:
    """List the presets that ``--config NAME`` accepts (``base`` only serves others to extend and is left out)."""
    folder = presets_folder()
    names = (path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
    return sorted(name for name in names if name != "base")


def preset_summary(name: str) -> str:
    """Return the comment lines at the top of a preset as one sentence: what the preset is for."""
    lines = resolve_path(name).read_text(encoding="utf-8").splitlines()
    comments = itertools.takewhile(lambda line: line.startswith("#"), lines)
    return " ".join(line.lstrip("# ").strip() for line in comments)


def resolve_path(name: str, relative_to: Path | None = None) -> Path:
    """Turn a preset name or a path into an existing file; a path is tried beside ``relative_to`` first."""
    is_path = name.endswith((".yaml", ".yml")) or name.startswith((".", "/", "~"))
    candidates = []
    if is_path:
        path = Path(name).expanduser()
        candidates = [relative_to.parent / path, path] if relative_to else [path]
        candidates.append(presets_folder() / path)
    else:
        candidates.append(presets_folder() / f"{name}.yaml")
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = preset_names()
    hint = did_you_mean(name, known) if not is_path else ""
    what = f"no such configuration file: {name}" if is_path else f"no preset is called {name!r}"
    raise ConfigError(f"{what}{hint}. Presets: {', '.join(known) or 'none found'}; or give the path of a .yaml file.")


def load_raw(name: str, overrides: Sequence[str] = ()) -> RawConfig:
    """Read a preset name or path, follow ``extends`` and apply ``a.b=c`` overrides, without validating the result."""
    raw = _read_chain(resolve_path(name), ())
    for text in overrides:
        _apply_override(raw, text)
    return raw


def parse_settings(texts: Sequence[str]) -> dict[str, Any]:
    """Nested data of ``a.b=c`` texts alone, later ones winning."""
    raw = RawConfig({})
    for text in texts:
        _apply_override(raw, text)
    return raw.data


def _read_chain(path: Path, children: tuple[Path, ...]) -> RawConfig:
    if path.resolve() in (child.resolve() for child in children):
        raise ConfigError(f"{_show(path)}: `extends` goes in a circle; remove one of the links.")
    if len(children) > MAX_EXTENDS:
        chain = " -> ".join(_show(child) for child in (*children, path))
        raise ConfigError(f"`extends` may be at most {MAX_EXTENDS} deep, found {chain}; merge two of these files.")
    own = _read_file(path)
    parent = own.data.pop("extends", None)
    if parent is None:
        return own
    if not isinstance(parent, str):
        raise ConfigError(f"{own.origin(('extends',))}: `extends` takes one preset name or path, got {parent!r}.")
    try:
        base = _read_chain(resolve_path(parent, relative_to=path), (*children, path))
    except ConfigError as error:
        if len(children) or "extends" in str(error):
            raise
        raise ConfigError(f"{own.origin(('extends',))}: {error}") from None
    _merge(base, own.data, own.origins)
    return base


def _read_file(path: Path) -> RawConfig:
    text = read_text(path, limit=MAX_YAML, failure=ConfigError)
    node, data = parse_yaml(text, _show(path), ConfigError)
    origins: dict[KeyPath, str] = {}
    if node is None:
        return RawConfig({}, origins)
    _note_origins(node, (), _show(path), origins)
    if not isinstance(data, dict):
        raise ConfigError(f"{_show(path)}: expected sections such as `run:` at the top, got {type(data).__name__}.")
    return RawConfig(data, origins)


def _note_origins(node: yaml.Node, path: KeyPath, file: str, origins: dict[KeyPath, str]) -> None:
    """Record the line of every key and refuse keys given twice (YAML would silently keep the last)."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        here = (*path, str(key.value))
        place = f"{file}:{key.start_mark.line + 1}"
        if here in origins:
            raise ConfigError(f"{place}: `{'.'.join(here)}` is given twice (first at {origins[here]}); keep one.")
        origins[here] = place
        _note_origins(value, here, file, origins)


def _merge(base: RawConfig, data: Mapping[str, Any], origins: Mapping[KeyPath, str]) -> None:
    _merge_mapping(base.data, data)
    base.origins.update(origins)


def _merge_mapping(into: dict[str, Any], data: Mapping[str, Any]) -> None:
    for key, value in data.items():
        current = into.get(key)
        if isinstance(current, dict) and isinstance(value, Mapping):
            _merge_mapping(current, value)
        else:
            into[key] = value


def _apply_override(raw: RawConfig, text: str) -> None:
    key, equals, written = text.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(path):
        raise ConfigError(f"{COMMAND_LINE}: {text!r} is not an override; write section.key=value, e.g. optim.lr=1e-4.")
    value = parse_yaml(written, f"{COMMAND_LINE}: the value of {text!r}, which may need quotes", ConfigError)[1]
    nested: Any = value
    for part in reversed(path):
        nested = {part: nested}
    _merge(raw, nested, {path: f"{COMMAND_LINE} ({text})"})


def did_you_mean(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _show(path: Path) -> str:
    """Show a path relative to the working directory when it lies inside it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative

"""The preparation cache: encoded windows in safetensors shards beside json-lines manifests.

``{cache}/{settings hash}/`` holds ``settings.json``, ``parts/{key}.safetensors`` (one finished window each, so an
interrupted run loses at most the window in hand) and ``shard-*.safetensors`` with ``shard-*.jsonl`` (parts packed
together). A key is the hash of the clip's content, the window and the settings: nothing stale is ever read, and running
``prepare`` again does only what is missing.

A shard is written, then its manifest, then its parts are deleted: killed in between, it is packed again. A shard whose
manifest and parts are both gone, or a manifest that is damaged or without its shard, has lost windows: reading is an
error, and ``prepare`` sets the files aside and encodes those windows again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from geoalign.data.clip_record import ClipRecord
from geoalign.data.folders import visible
from geoalign.errors import DataError
from geoalign.files.atomic import atomic_write_bytes, atomic_write_json, atomic_write_text
from geoalign.files.parsing import parse_json, read_json_object, read_text
from geoalign.files.sealed import Seal, digest_of, notice_unsealed, sealed_bytes, skips_checksums
from geoalign.geometry.cameras.door import files_of, split_name

_ROW_SEAL = "sha256"  # in a row of a manifest: of the rest of it
_MAX_MANIFEST = 256 << 20  # bytes; a row is some hundred

Settings = Mapping[str, Mapping[str, Any]]
"""``{"data": ..., "encoder": ...}``: everything that changes what is stored."""


@dataclass(frozen=True, slots=True)
class FileFacts:
    """The bytes of a clip and how to tell without reading them that they are unchanged.

    Attributes:
        content: sha256 of the bytes (of a folder: of names and bytes of its visible files).
        size: number of bytes (of a folder: of all its files).
        mtime_ns: modification time (of a folder: a hash of names, sizes and times of its files).
    """

    content: str
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One prepared window.

    Attributes:
        key: see :func:`window_key`.
        clip_id: clip name.
        start: first frame in the file.
        source: path of the clip when it was prepared.
        content, size, mtime_ns: see :class:`FileFacts`.
        caption: the prompt.
        shard: name of the file that holds the tensors, relative to the settings folder.
        shard_sha256: its hash, "" for a part that is not packed yet.
        frames: frames of the clip, 0 if not known.
    """

    key: str
    clip_id: str
    start: int
    source: str
    content: str
    size: int
    mtime_ns: int
    caption: str
    shard: str = ""
    shard_sha256: str = ""
    frames: int = 0

    @property
    def facts(self) -> FileFacts:
        """What is known of the clip's bytes."""
        return FileFacts(self.content, self.size, self.mtime_ns)

    def is_current(self, record: ClipRecord, settings: Settings) -> bool:
        """Whether clip, caption and camera file are still those that were prepared."""
        try:
            content = file_facts(record.path, self.facts).content
            return content == self.content and window_key(record, content, self.start, settings) == self.key
        except DataError:  # gone
            return False


def settings_hash(settings: Settings) -> str:
    """Sixteen hex digits that name a settings folder."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def file_facts(path: Path, *known: FileFacts) -> FileFacts:
    """Facts of a file or folder; those of ``known`` with its size and time are taken and nothing is read."""
    try:
        # Before the bytes are read: a clip that changes meanwhile is read again next time.
        states = [(file.name, file.stat()) for file in _files(path)]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    size, time = sum(state.st_size for _, state in states), states[0][1].st_mtime_ns if states else 0
    if path.is_dir():
        listing = repr([(name, state.st_size, state.st_mtime_ns) for name, state in states])
        digest = hashlib.sha256(listing.encode("utf-8", "surrogateescape")).digest()
        time = int.from_bytes(digest[:7], "big")
    unchanged = [facts for facts in known if (size, time) == (facts.size, facts.mtime_ns)]
    return unchanged[0] if unchanged else FileFacts(content_hash(path), size, time)


def content_hash(path: Path) -> str:
    """sha256 of a file, or of the names and bytes of a folder's files."""
    digest = hashlib.sha256()
    try:
        for file in _files(path):
            if file is not path:
                digest.update(file.name.encode("utf-8", "surrogateescape") + b"\0")
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    return digest.hexdigest()


def _files(path: Path) -> list[Path]:
    return visible(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]


def window_key(record: ClipRecord, content: str, start: int, settings: Settings) -> str:
    """The key of a window (32 hex digits): clip name, bytes, caption, camera file, start and settings."""
    file, chosen = split_name(record.camera) if record.camera else (None, "")
    camera = "".join(map(content_hash, files_of(file))) + chosen if file else ""
    facts = [record.clip_id, content, record.caption, camera, start, settings_hash(settings)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def trim_tokens(context: Tensor) -> Tensor:
    """Drop the all-zero rows at the end of ``[L, D]`` (text encoders pad with zeros); at least one row stays."""
    used = context.any(dim=1).nonzero()
    return context[: int(used[-1]) + 1 if len(used) else 1].contiguous()


def pad_tokens(context: Tensor, length: int) -> Tensor:
    """Inverse of :func:`trim_tokens`: ``[L, D]`` with zero rows appended up to ``length``."""
    return torch.nn.functional.pad(context, (0, 0, 0, length - context.shape[0]))


class CacheFolder:
    """One settings folder: write parts, pack them into shards, read everything back.

    Args:
        cache: root of all settings folders.
        settings: what the entries were made with.
    """

    def __init__(self, cache: Path, settings: Settings) -> None:
        self.settings = settings
        self.path = cache / settings_hash(settings)
        self._parts = self.path / "parts"

    def entries(self) -> dict[str, Entry]:
        """All finished windows by key.

        Raises:
            DataError: windows were lost, which must not pass for fewer windows (see :meth:`defects`).
        """
        for file, defect in self.defects():
            raise DataError(f"{file}: {defect}; run `geoalign prepare` again, which encodes its windows anew")
        return self.readable()

    def readable(self) -> dict[str, Entry]:
        """The finished windows that can be read, by key: what ``prepare`` need not encode again."""
        found = {}
        for manifest in visible(self.path.glob("shard-*.jsonl")):
            with contextlib.suppress(DataError):
                if manifest.with_suffix(".safetensors").is_file():
                    found |= {entry.key: entry for entry in _read_manifest(manifest)}
        return self.parts() | found

    def defects(self) -> Iterator[tuple[Path, str]]:
        """Yield (file, what is wrong) where finished windows cannot be read or were lost."""
        for part in self._part_files():
            if _cause(_part_entry, part) and part.exists():  # else another process packed it
                yield part, "not a prepared window"
        manifests = visible(self.path.glob("shard-*.jsonl"))
        for manifest in manifests:
            if not manifest.with_suffix(".safetensors").is_file():
                yield manifest, "its shard is missing"
        for shard in visible(self.path.glob("shard-*.safetensors")):
            manifest = shard.with_suffix(".jsonl")
            if _cause(_shard_keys, shard):
                yield shard, "damaged shard"
            elif manifest in manifests:
                if cause := _cause(_read_manifest, manifest):
                    yield manifest, f"damaged manifest ({cause})"
                elif _shard_keys(shard) != {entry.key for entry in _read_manifest(manifest)}:
                    yield manifest, "does not list the windows of its shard"
            elif not (self._unpacked(shard) or manifest.is_file()):  # again: it may have been finished just now
                yield shard, "its manifest is missing"

    def _unpacked(self, shard: Path) -> bool:
        """Whether all parts of a shard are there still."""
        return all((self._parts / f"{key}.safetensors").is_file() for key in _shard_keys(shard))

    def set_defects_aside(self) -> list[Path]:
        """Rename what :meth:`defects` finds, and the other half of its pair, to names that nothing reads."""
        moved = []
        for file, _ in list(self.defects()):
            for half in (file.with_suffix(".jsonl"), file.with_suffix(".safetensors")):
                if half.is_file():
                    moved.append(half.replace(half.with_name(f"{half.name}.damaged")))
        return moved

    def add(self, entry: Entry, tensors: Mapping[str, Tensor]) -> None:
        """Store one window as a part, atomically."""
        if not (self.path / "settings.json").is_file():
            atomic_write_json(self.path / "settings.json", self.settings)
        plain = {name: value.cpu().contiguous() for name, value in tensors.items()}
        payload = sealed_bytes(plain, {"entry": json.dumps(asdict(entry))})
        atomic_write_bytes(self._parts / f"{entry.key}.safetensors", payload)

    def pack(self, keys: Sequence[str]) -> Path:
        """Move the parts ``keys`` into one shard. Killed halfway, the parts are still there and are packed again."""
        entries, tensors = [], {}
        for key in keys:
            part = self._parts / f"{key}.safetensors"
            entries.append(_part_entry(part))
            tensors |= {f"{key}/{name}": value for name, value in _read_tensors(part, "").items()}
        self._discard_unfinished(set(keys))
        name = f"shard-{hashlib.sha256(''.join(keys).encode()).hexdigest()[:16]}"
        payload = sealed_bytes(tensors)
        digest = hashlib.sha256(payload).hexdigest()
        shard = self.path / f"{name}.safetensors"
        atomic_write_bytes(shard, payload)
        rows = [asdict(entry) | {"shard": shard.name, "shard_sha256": digest} for entry in entries]
        lines = [json.dumps(row | {_ROW_SEAL: digest_of(row)}, ensure_ascii=False) for row in rows]
        atomic_write_text(self.path / f"{name}.jsonl", "\n".join(lines) + "\n")
        for key in keys:
            (self._parts / f"{key}.safetensors").unlink(missing_ok=True)
        return shard  # the folder of the parts stays: another process may be about to write into it

    def _discard_unfinished(self, keys: set[str]) -> None:
        """Delete shards of an interrupted packing of some of ``keys``, whose parts are there still."""
        for shard in visible(self.path.glob("shard-*.safetensors")):
            if not shard.with_suffix(".jsonl").is_file() and _shard_keys(shard) & keys:
                shard.unlink()

    def parts(self) -> dict[str, Entry]:
        """The parts that wait to be packed, by key in order; unreadable ones are left out."""
        found = {}
        for part in self._part_files():
            with contextlib.suppress(DataError):
                found[part.stem] = _part_entry(part)
        return found

    def _part_files(self) -> list[Path]:
        return visible(self._parts.glob("*.safetensors"))

    def read(self, entry: Entry) -> dict[str, Tensor]:
        """The tensors of one window (memory-mapped: only their bytes are read)."""
        return _read_tensors(self.path / entry.shard, "" if entry.shard.startswith("parts/") else f"{entry.key}/")

    def verify(self) -> Iterator[tuple[str, str]]:
        """Yield (file, defect) for every shard whose bytes changed and every part that cannot be read."""
        broken = dict(self.defects())
        for file, defect in broken.items():
            yield file.relative_to(self.path).as_posix(), defect
        shards = visible(self.path.glob("shard-*.safetensors"))
        pairs = [(shard, shard.with_suffix(".jsonl")) for shard in shards]
        manifests = [file for shard, file in pairs if file.is_file() and not broken.keys() & {shard, file}]
        hashes = {entry.shard: entry.shard_sha256 for manifest in manifests for entry in _read_manifest(manifest)}
        for shard, expected in sorted(hashes.items()):
            if expected and content_hash(self.path / shard) != expected:
                yield shard, "bytes differ from the manifest"
        for part in self._part_files():
            try:
                _read_tensors(part, "")
            except DataError:
                if part not in broken:
                    yield f"parts/{part.name}", "unreadable"


def open_cache(cache: Path, data_settings: Mapping[str, Any], encoder: Mapping[str, Any] | None = None) -> CacheFolder:
    """The settings folder made with these data settings (and encoder, if given).

    Raises:
        DataError: none fits (the message names the settings that differ), or several do.
    """
    fitting, differences = [], []
    for path in sorted(
        folder / "settings.json" for folder in visible(cache.glob("*")) if (folder / "settings.json").is_file()
    ):
        try:
            settings = read_json_object(path)
            made_with = settings["data"]
            if settings_hash(settings) != path.parent.name:  # every entry would be taken for one of other settings
                raise DataError(f"{path}: damaged")
        except (DataError, KeyError):
            differences.append(f"{path}: unreadable")
            continue
        keys = sorted(key for key in {*made_with, *data_settings} if made_with.get(key) != data_settings.get(key))
        if not keys and (encoder is None or settings.get("encoder") == dict(encoder)):
            fitting.append(settings)
        else:
            differences.append(f"{path.parent}: differs in {', '.join(keys) or 'the encoder'}")
    if len(fitting) != 1:
        found = "\n  ".join(differences) or "nothing is prepared there"
        missing = "run `geoalign prepare` with the --config and settings of this run"
        reason = "several encoders were used; remove all but one folder" if fitting else missing
        raise DataError(f"{cache}: no single cache for these settings; {reason}\n  {found}")
    return CacheFolder(cache, fitting[0])


def _cause(read: Callable[[Path], object], path: Path) -> str:
    """Why ``read`` cannot read ``path``, without its name; empty if it can."""
    try:
        read(path)
    except DataError as error:
        return str(error).removeprefix(f"{path}: ")
    return ""


def _read_manifest(path: Path) -> list[Entry]:
    """The entries of a shard; raises DataError for a damaged line: fewer windows would not show."""
    entries = []
    for number, line in enumerate(read_text(path, limit=_MAX_MANIFEST).removesuffix("\n").split("\n"), 1):
        where = f"{path}: line {number}"
        row = parse_json(line, where)
        sealed = row.pop(_ROW_SEAL, None) if isinstance(row, dict) else None
        if not isinstance(row, dict) or (sealed and not skips_checksums() and sealed != digest_of(row)):
            raise DataError(f"{where}: differs from its checksum")
        if sealed is None:
            notice_unsealed(path)
        try:
            entries.append(Entry(**row))
        except TypeError as error:
            raise DataError(f"{where}: not an entry of this version ({error})") from error
    return entries


def _shard_keys(path: Path) -> set[str]:
    """Keys of the windows in a shard; raises DataError if its header is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            Seal.read(file.metadata() or {}, file.keys(), path, DataError)
            return {name.partition("/")[0] for name in file.keys()}  # noqa: SIM118 - no __iter__
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: damaged shard ({error})") from error


def _part_entry(path: Path) -> Entry:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            Seal.read(metadata, file.keys(), path, DataError)
        facts = parse_json(metadata["entry"], path)
        if facts["key"] != path.stem:
            raise ValueError(f"it holds the window {facts['key']}")
        return Entry(**facts | {"shard": f"parts/{path.name}", "shard_sha256": ""})
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path}: not a prepared window ({error}); delete it and run `geoalign prepare`") from error


def _read_tensors(path: Path, prefix: str) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            seal = Seal.read(file.metadata() or {}, file.keys(), path, DataError)
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 - no __iter__
            found = {name: file.get_tensor(name) for name in names}
        for name, tensor in found.items():
            if seal is not None:
                seal.check(name, tensor)
        return {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    except (OSError, SafetensorError, ValueError) as error:
        raise DataError(f"{path}: damaged shard ({error}); delete it and run `geoalign prepare`") from error

"""Whether a file is still the one that it was, without reading gigabytes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from geoalign.errors import DataError

_BLOCK, _BLOCKS = 1 << 20, 64


def text_hash(*texts: str) -> str:
    """Hash of texts in their order."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:32]


def by_content(options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` by sorted name; one that is the path of a file or folder that is there counts by what it holds.

    Raises DataError for a file that cannot be read.
    """
    return {name: _by_content(options[name]) for name in sorted(options)}


def _by_content(value: Any) -> Any:
    named = isinstance(value, str) and value and Path(value).exists()
    return content_hash(Path(value)) if named else value


def content_hash(path: Path) -> str:
    """Hash of a file, or of the files of a folder: names, sizes and 64 blocks of 1 MiB spread over each file.

    Files of up to 64 MiB are read whole; of larger ones a sample, because all ranks of a run check 11 GB of text
    encoder at every start and training changes every block of a network.

    Raises:
        DataError: missing or unreadable.
    """
    digest = hashlib.sha256()
    try:
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        for file in files:
            size = file.stat().st_size
            digest.update(f"{file.relative_to(path) if file != path else ''}\0{size}\0".encode())
            blocks = min(-(-size // _BLOCK), _BLOCKS)
            with file.open("rb") as stream:
                for number in range(blocks):
                    stream.seek(number * max(size - _BLOCK, 0) // max(blocks - 1, 1))
                    digest.update(stream.read(_BLOCK))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    return digest.hexdigest()[:32]

"""Folders that diffusers and transformers read: their exceptions become ours, and no tensor is drawn at random."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from geoalign.errors import CheckpointError
from geoalign.files.parsing import first_line, read_json_object
from geoalign.files.shards import weight_files
from geoalign.files.weights import TensorFile, require_finite
from geoalign.models.layouts import summary

_MOST_LAYERS = 1000
"""The libraries make one module after the other, however many a file asks for; published networks have below 100."""
_DEPTH = re.compile(r"(^|_)(num|n)_(\w+_)?(layers|blocks)$|^depths?$")


def read_settings(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a folder of diffusers or transformers.

    Raises:
        CheckpointError: it cannot be read, or asks for more layers than any network has.
    """
    file = folder / "config.json"
    settings = read_json_object(file, CheckpointError)
    _refuse_depth(settings, file)
    return settings


def _refuse_depth(settings: Mapping[str, Any], file: Path) -> None:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            _refuse_depth(value, file)
        numbers = [n for n in (value if isinstance(value, list) else [value]) if isinstance(n, int)]
        if _DEPTH.search(key) and max(numbers, default=0) > _MOST_LAYERS:
            raise CheckpointError(
                f"{file}: {key} is {max(numbers)}, at most {_MOST_LAYERS} are read here; download the folder again"
            )


def check_pretrained(folder: Path, what: str, kinds: Collection[str]) -> str:
    """Look at a folder of diffusers or transformers without reading weights: its class, its files, their headers.

    Args:
        folder: as published.
        what: what it should be, for messages.
        kinds: the ``_class_name`` or ``model_type`` that its config.json may state.

    Returns a few words about it.

    Raises:
        CheckpointError: another kind of model, or missing or damaged files.
    """
    config = read_settings(folder)
    kind = config.get("_class_name") or config.get("model_type")
    if not isinstance(kind, str) or kind not in kinds:
        raise CheckpointError(f"{folder}: not a {what} (config.json says {kind!r})")
    if any(folder.glob("*.bin*")):
        return f"{kind}, weights in .bin"
    return f"{kind}, {summary(TensorFile(folder).shapes)}"


@contextmanager
def _without_notices(network: type) -> Iterator[None]:
    """Keep the library of ``network`` from drawing a bar and from warning: what is wrong becomes our error."""
    library: Any = sys.modules[f"{network.__module__.partition('.')[0]}.utils.logging"]
    level, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity_error()
    library.disable_progress_bar()
    try:
        yield
    finally:
        library.set_verbosity(level)
        if bars:
            library.enable_progress_bar()


def open_pretrained(network: Any, folder: Path, what: str, **options: Any) -> nn.Module:
    """``network.from_pretrained(folder)``, complete or not at all.

    Args:
        network: a class of diffusers or transformers.
        folder: as published; nothing is downloaded.
        what: what it should be, for messages.
        options: passed on.

    Raises:
        CheckpointError: missing or damaged files, a missing shard, tensors that the network needs and the files lack,
            or NaN.
    """
    if not any(folder.glob("*.bin*")):  # both libraries also read those
        weight_files(folder)
    if (folder / "config.json").exists():
        read_settings(folder)
    try:
        with _without_notices(network):
            model, told = network.from_pretrained(folder, local_files_only=True, output_loading_info=True, **options)
    except Exception as error:  # of json, safetensors, pickle, torch and of the library itself
        raise CheckpointError(f"{folder}: not a {what} ({first_line(error)})") from error
    lacking = sorted(map(str, (*told["missing_keys"], *told["mismatched_keys"])))
    if lacking:
        raise CheckpointError(
            f"{folder}: not a {what} ({len(lacking)} tensors are missing or of another shape, first {lacking[0]})"
        )
    for name, tensor in model.state_dict().items():
        require_finite(folder, name, tensor)
    return model

"""OpenEXR files of one half-float channel without compression, and the part of the OpenEXR bindings that reads them.

Copied as ``OpenEXR.py`` into stand-in environments, so it imports only numpy.
"""

from __future__ import annotations

import struct
import types
from typing import IO, Any

import numpy as np

_MAGIC, _VERSION, _HALF = 20000630, 2, 1


def encode(pixels: np.ndarray[Any, Any], channel: str = "Z") -> bytes:
    """The bytes of a file with ``pixels`` ``[H, W]`` as its one channel."""
    height, width = pixels.shape
    box = struct.pack("<4i", 0, 0, width - 1, height - 1)
    channels = channel.encode() + b"\0" + struct.pack("<iB3xii", _HALF, 0, 1, 1) + b"\0"
    attributes = [
        ("channels", "chlist", channels), ("compression", "compression", b"\0"), ("dataWindow", "box2i", box),
        ("displayWindow", "box2i", box), ("lineOrder", "lineOrder", b"\0"),
        ("pixelAspectRatio", "float", struct.pack("<f", 1)), ("screenWindowCenter", "v2f", struct.pack("<2f", 0, 0)),
        ("screenWindowWidth", "float", struct.pack("<f", 1)),
    ]  # fmt: skip
    head = struct.pack("<2i", _MAGIC, _VERSION)
    for name, kind, value in attributes:
        head += f"{name}\0{kind}\0".encode() + struct.pack("<i", len(value)) + value
    head += b"\0"
    lines = [struct.pack("<2i", y, 2 * width) + pixels[y].astype("<f2").tobytes() for y in range(height)]
    begin = len(head) + 8 * height
    table = struct.pack(f"<{height}Q", *(begin + y * len(lines[0]) for y in range(height)))
    return head + table + b"".join(lines)


class InputFile:
    """``OpenEXR.InputFile`` of bindings before 3.3, for files as above."""

    def __init__(self, file: IO[bytes]) -> None:
        data = file.read()
        if struct.unpack("<2i", data[:8]) != (_MAGIC, _VERSION):
            raise OSError("not an OpenEXR file")
        self._found, place = {}, 8
        while data[place]:
            name, kind = data[place:].split(b"\0", 2)[:2]
            place += len(name) + len(kind) + 2
            (length,) = struct.unpack("<i", data[place : place + 4])
            self._found[name.decode()] = data[place + 4 : place + 4 + length]
            place += 4 + length
        assert self._found["compression"] == b"\0" and self._found["channels"].startswith(b"Z\0")
        x0, y0, x1, y1 = struct.unpack("<4i", self._found["dataWindow"])
        corner = types.SimpleNamespace
        self._window = types.SimpleNamespace(min=corner(x=x0, y=y0), max=corner(x=x1, y=y1))
        height, row = y1 - y0 + 1, 8 + 2 * (x1 - x0 + 1)
        lines = data[place + 1 + 8 * height :]
        if len(lines) != height * row:
            raise OSError("the file ends early")
        self._pixels = b"".join(lines[y * row + 8 : (y + 1) * row] for y in range(height))

    def header(self) -> dict[str, Any]:
        """The attributes that are asked for."""
        return {"dataWindow": self._window}

    def channels(self, names: list[str]) -> list[bytes]:
        """The bytes of the one channel."""
        assert names == ["Z"]
        return [self._pixels]

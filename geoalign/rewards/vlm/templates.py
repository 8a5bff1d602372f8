"""Published texts, byte-exact: found on disk, verified by checksum, fetched from their own packages at set-up.

They are the prompt templates of the scorers and Wan's negative prompt. They belong to their authors, and trailing
spaces change tokens, so this package ships only their checksums. Fetching downloads the published package and looks for
the string literal with the right checksum.
"""

from __future__ import annotations

import ast
import hashlib
import os
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

from geoalign.errors import RewardError
from geoalign.files.atomic import atomic_write_bytes

FOLDER_VARIABLE = "GEOALIGN_REWARD_TEMPLATES"
_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Template:
    """One published text: checksum and length of its UTF-8 bytes, and the package that holds it."""

    sha256: str
    length: int
    package: str


TEMPLATES: Mapping[str, Template] = MappingProxyType(
    {
        # github.com/KwaiVGI/VideoAlign (MIT), revision 219ab9d; holds the slot {text_prompt}.
        "videoalign": Template("fdb6309bac618dd0c8b1b589d3a0970a974f7856eecbb355a190b2dce54af700", 3997, "VideoAlign"),
        # hpsv3 1.0.0 on PyPI (MIT); the instruction holds the slot {text_prompt}, the suffix the reward token.
        "hpsv3_instruction": Template(
            "0393599dad45a971903d1d62a3acf9bad3ccccdafa7f40f680523419e1f68b7a", 2523, "hpsv3"
        ),
        "hpsv3_suffix": Template("2471faca094ae5bd6fe17b71dce20c3d7583625545e235889f7e74e7eeb69d0a", 67, "hpsv3"),
        # github.com/Wan-Video/Wan2.1 (Apache-2.0), revision 9737cba; ReDirector's configuration repeats it.
        "wan_negative_prompt": Template(
            "ce96e0324e4b54ce4b6e867f669ca520952e1a34cc116543516b1897f0d3c47e", 403, "Wan2.1"
        ),
    }
)


def default_folder() -> Path:
    """Where templates lie: ``$GEOALIGN_REWARD_TEMPLATES``, else ``~/.cache/geoalign/reward-templates``."""
    return Path(os.environ.get(FOLDER_VARIABLE) or Path.home() / ".cache" / "geoalign" / "reward-templates")


def verify(name: str, data: bytes, expected: Template, source: str | Path) -> str:
    """The text of ``data`` if it has the expected checksum.

    Raises RewardError with both checksums otherwise.
    """
    found = hashlib.sha256(data).hexdigest()
    if found != expected.sha256:
        raise RewardError(
            f"{source} is not the published template {name!r}: sha256 {found} ({len(data)} bytes), expected "
            f"{expected.sha256} ({expected.length} bytes). Delete it and run: geoalign doctor --fetch-rewards"
        )
    return data.decode("utf-8")


def path_of(name: str, folder: str | Path | None = None) -> Path:
    """Where the template ``name`` lies in ``folder`` (default: the default one)."""
    return Path(folder or default_folder()) / f"{name}.txt"


def load(name: str, folder: str | Path | None = None, known: Mapping[str, Template] = TEMPLATES) -> str:
    """Read and verify one template.

    Raises RewardError when it is missing (with the command that fetches it) or altered.
    """
    path = path_of(name, folder)
    if not path.is_file():
        raise RewardError(
            f"prompt template {name!r} not found at {path}. On a machine with a network run: "
            f"geoalign doctor --fetch-rewards   (or set {FOLDER_VARIABLE} to a folder that holds it)"
        )
    return verify(name, path.read_bytes(), known[name], path)


def _literals(source: str) -> Iterator[str]:
    """All string literals of a Python source; slots of f-strings come out as ``{name}``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else "{" + ast.unparse(part.value) + "}"
                for part in node.values
                if isinstance(part, ast.Constant | ast.FormattedValue)
            )


def extract(archive: Path, wanted: Mapping[str, Template]) -> dict[str, bytes]:
    """Find ``wanted`` among the string literals of all Python files in a wheel or zip; nothing of it is executed.

    Raises RewardError naming what was not found.
    """
    by_sum = {template.sha256: name for name, template in wanted.items()}
    found: dict[str, bytes] = {}
    with zipfile.ZipFile(archive) as files:
        for member in files.namelist():
            if not member.endswith(".py"):
                continue
            try:
                texts = list(_literals(files.read(member).decode("utf-8")))
            except (SyntaxError, UnicodeDecodeError):
                continue
            for data in (text.encode("utf-8", "surrogatepass") for text in texts):
                name = by_sum.get(hashlib.sha256(data).hexdigest())
                if name is not None:
                    found[name] = data
    lost = sorted(set(wanted) - set(found))
    if lost:
        raise RewardError(f"{archive.name} holds no text with the published checksum for: {', '.join(lost)}")
    return found


def _download_hpsv3(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), "hpsv3==1.0.0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    if done.returncode:
        raise RewardError(f"`{' '.join(command)}` failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return next(folder.glob("hpsv3-*.whl"))


def _download_repository(revision: str, folder: Path) -> Path:
    """The zip of a public repository at ``OWNER/NAME/zip/COMMIT``."""
    target = folder / "repository.zip"
    with urllib.request.urlopen(f"https://codeload.github.com/{revision}", timeout=_TIMEOUT_S) as answer:
        target.write_bytes(answer.read())
    return target


DOWNLOADS: Mapping[str, Callable[[Path], Path]] = MappingProxyType(
    {
        "hpsv3": _download_hpsv3,
        "VideoAlign": partial(_download_repository, "KwaiVGI/VideoAlign/zip/219ab9d"),
        "Wan2.1": partial(_download_repository, "Wan-Video/Wan2.1/zip/9737cba"),
    }
)


def fetch(
    folder: str | Path | None = None,
    *,
    known: Mapping[str, Template] = TEMPLATES,
    downloads: Mapping[str, Callable[[Path], Path]] = DOWNLOADS,
) -> dict[str, Path]:
    """Make sure that all templates lie verified in ``folder``; what is there already is not downloaded again.

    Returns the path of each. All packages are tried before an error is raised.

    Raises RewardError naming every package that could not be fetched and the cause.
    """
    target = Path(folder or default_folder())
    paths = {name: path_of(name, target) for name in known}
    problems: list[str] = []
    for package, download in downloads.items():
        wanted = {
            name: item for name, item in known.items() if item.package == package and not _good(paths[name], item)
        }
        if not wanted:
            continue
        try:
            with tempfile.TemporaryDirectory() as temporary:
                texts = extract(download(Path(temporary)), wanted)
        except (OSError, subprocess.SubprocessError, StopIteration, zipfile.BadZipFile, RewardError) as error:
            problems.append(f"{package}: {error}")
            continue
        for name, data in texts.items():
            atomic_write_bytes(paths[name], data)
    if problems:
        raise RewardError(f"could not fetch published texts into {target}: {'; '.join(problems)}")
    return paths


def _good(path: Path, template: Template) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == template.sha256

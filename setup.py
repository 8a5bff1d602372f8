"""The version, and the folders of the repository that are copied into a wheel; all else is declared in pyproject.toml.

One file for both packages: ``kernels/setup.py`` is a link to it. Editable installs read the folders from the
repository, so nothing is copied there. Native code is compiled at first use by ``geoalign_kernels.native``, which keeps
torch out of the build requirements.
"""

import re
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent  # of the repository, also through the link
COPIED_FOLDERS = {"configs": "geoalign/_presets", "csrc": "geoalign_kernels/_csrc"}
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "geoalign" / "version.py").read_text("utf-8"), re.MULTILINE)[1]


class BuildPyWithFolders(build_py):
    """``build_py`` that adds the folders which live outside the packages, to the packages that are built."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for source, target in COPIED_FOLDERS.items():
            if target.split("/")[0] not in self.packages:
                continue
            destination = Path(self.build_lib) / target
            shutil.rmtree(destination, ignore_errors=True)
            shutil.copytree(ROOT / source, destination, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.o"))


setup(version=VERSION, cmdclass={"build_py": BuildPyWithFolders})

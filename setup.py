"""Copy the CUDA/C++ sources and the presets into the wheel; everything else is declared in pyproject.toml.

Editable installs read both from the repository, so nothing is copied there. Native code is compiled at first use by
``geoalign_kernels.native``, which keeps torch out of the build requirements.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

COPIED_FOLDERS = {"configs": "geoalign/_presets", "csrc": "geoalign_kernels/_csrc"}


class BuildPyWithSources(build_py):
    """``build_py`` that adds the folders which live outside the packages."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        root = Path(__file__).resolve().parent
        for source, target in COPIED_FOLDERS.items():
            destination = Path(self.build_lib) / target
            shutil.rmtree(destination, ignore_errors=True)
            if (root / source).is_dir():
                shutil.copytree(root / source, destination, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.o"))


setup(cmdclass={"build_py": BuildPyWithSources})

"""Copy the CUDA/C++ sources of the checkout into the wheel, as the setup of the whole project does."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPyWithSources(build_py):
    """``build_py`` that adds ``csrc``, which lies beside this folder."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "geoalign_kernels" / "_csrc"
            shutil.copytree(Path(__file__).resolve().parents[1] / "csrc", target, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildPyWithSources})

"""What pyproject.toml can't say: ``recipes/`` goes into a wheel as ``aimv2/recipes``. A checkout reads it where it lies."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


class BuildWithRecipes(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copytree(ROOT / "recipes", Path(self.build_lib) / "aimv2" / "recipes", dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithRecipes})

"""What pyproject.toml cannot say: the compiled modules, which depend on the tools of the machine."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `python setup.py` has it, a build backend does not

from _build.extensions import Build, BuildExtensions, BuildReport, extensions

setup(
    ext_modules=extensions(),
    cmdclass={"build": Build, "build_ext": BuildExtensions, "build_report": BuildReport},
)

"""Build of the compiled modules, which depends on the compilers on the machine; all else is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for `_build`; build backends do not add this folder

from _build.extensions import Build, BuildExtensions, BuildReport, extensions

setup(
    ext_modules=extensions(),
    cmdclass={"build": Build, "build_ext": BuildExtensions, "build_report": BuildReport},
)

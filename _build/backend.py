"""The PEP 517 backend: setuptools' own, except that the torch of the machine serves the build.

Listing torch as a build requirement would make pip download a second one of some gigabytes next to the one that is
installed. So it is asked for only where there is none. The host's copy is not importable inside an isolated build, and
need not be: `extensions.find_torch` reads its headers, libraries and version file where they lie.
"""

import shutil
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  (hooks that pip looks up here)
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

from _build.extensions import MINIMUM_TORCH, find_torch, missing_prerequisite

Settings = dict[str, Any] | None


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """What the build needs on this machine: nothing at all where nothing can be compiled."""
    if missing_prerequisite():
        return []
    torch = [] if find_torch() else [f"torch>={'.'.join(map(str, MINIMUM_TORCH))}"]
    return ["ninja", "pybind11>=2.13", *torch]


get_requires_for_build_editable = get_requires_for_build_wheel


def build_wheel(directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    """Build a wheel into `directory` and return its file name."""
    # setuptools collects files here and never deletes one: what an earlier build compiled would be shipped again.
    for collected in Path("build").glob("lib*"):
        shutil.rmtree(collected)
    name: str = build_meta.build_wheel(directory, config_settings, metadata_directory)
    return name


def build_editable(directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    """Build an editable wheel into `directory`, with the compiled modules in the source tree."""
    name: str = build_meta.build_editable(directory, config_settings, metadata_directory)
    return name

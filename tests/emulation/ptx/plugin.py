"""A plugin of pytest that runs Triton kernels in the emulator: the tests of all ops then test compiled kernels.

TRITON_INTERPRET=0 python -m pytest -p tests.emulation.ptx.plugin tests/ops -k triton-cpu
"""

import os
from contextlib import ExitStack

import pytest

from tests.emulation.ptx.launch import emulated, use_triton_on_the_cpu

_STACK = ExitStack()


def pytest_configure(config: pytest.Config) -> None:
    """Register the kernels before tests are collected, because tests list what they find."""
    assert os.environ.get("TRITON_INTERPRET") == "0", "set TRITON_INTERPRET=0: Triton's interpreter compiles nothing"
    use_triton_on_the_cpu()
    _STACK.enter_context(emulated())


def pytest_unconfigure(config: pytest.Config) -> None:
    _STACK.close()

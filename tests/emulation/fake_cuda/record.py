"""What was seen while code ran on the pretended GPU, and where in the code it happened."""

import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from types import FrameType
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

#: Parts of a path after which a file's name is short enough to show, by preference: the first kind that is on the stack
#: names the place. Our own code comes first, then the code that calls it or that it calls.
_KINDS = (
    ("/fastssl/fastssl/",),
    ("/tests/emulation/fake_cuda/faults.py",),
    ("/site-packages/transformers/", "/site-packages/torchaudio/", "/site-packages/lightning/"),
    ("/site-packages/torch/amp/", "/site-packages/torch/optim/", "/site-packages/torch/nn/"),
    ("/fastssl/benchmarks/",),
    ("/tests/emulation/fake_cuda/",),
)
_LIBRARY = 2  # index of the kind above that holds other libraries
_INSTRUMENT = ("mode.py", "launches.py", "pretend.py", "record.py", "answers.py")


@dataclass
class Record:
    """Counts of what happened, by place or by kind.

    Attributes:
        launches: Number of launches, by operator or Triton kernel. An operator whose result shares memory with its
            input, or that only allocates, launches nothing. Copies between host and device count as launches.
        waits: Number of times that the host waits for the device, by place and reason.
        pageable: Number of asynchronous copies to the device from memory that is not page-locked, by place.
        problems: Errors, by description with the place.
        variants: Specialisations of Triton kernels that were launched, each compiled separately.
        trace: Operators and launches of Triton kernels in order, with all that the host gives them: shapes, strides,
            dtypes, numbers and grids. None if nobody asked for it.
    """

    launches: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    pageable: Counter[str] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)
    variants: set[tuple[str, ...]] = field(default_factory=set)
    trace: list[str] | None = None

    def wait(self, reason: str) -> None:
        self.waits[f"{place()}: {reason}"] += 1

    def problem(self, what: str) -> None:
        self.problems[f"{place()}: {what}"] += 1

    def step(self, name: str, *arguments: Any) -> None:
        """Add an operator or a launch to the trace, if there is one."""
        if self.trace is not None:
            self.trace.append(f"{name} {tree_map(_described, arguments)}")


def _described(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        return repr(leaf)
    return f"{leaf.dtype} {tuple(leaf.shape)} {leaf.stride()} +{leaf.storage_offset()} {leaf.device}"


def place() -> str:
    """Return the file and the function on the stack that an engineer would look at first.

    If our code called another library, its function follows after "via". Lines are left out, because any edit moves
    them; so are comprehensions, which are functions in some versions of Python only, and overrides of `Module._apply`,
    because whoever moves a module decides when.
    """
    best, name, library = len(_KINDS), "outside the known code", ""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and best > 0:
        kind, short = _short(frame.f_code.co_filename)
        if kind < best and not frame.f_code.co_name.startswith(("<", "_apply")):
            best, name = kind, f"{short} {frame.f_code.co_name}"
            if kind == _LIBRARY:
                library = f" via {name}"
        frame = frame.f_back
    return name + (library if best != _LIBRARY else "")


@cache
def _short(file: str) -> tuple[int, str]:
    """Return the index in `_KINDS` of a file's kind, and its short name."""
    file = _without_root(file)
    for kind, parts in enumerate(_KINDS):
        for part in parts:
            _, found, after = file.partition(part)
            if found and not (kind == len(_KINDS) - 1 and after in _INSTRUMENT):
                return kind, (found + after).replace("/site-packages/", "").removeprefix("/fastssl/").lstrip("/")
    return len(_KINDS), file


def _without_root(file: str) -> str:
    """Let files of this project begin with "/fastssl/", whatever the folder of the checkout is called."""
    root = __file__.partition("/tests/emulation/")[0]
    return "/fastssl" + file.removeprefix(root) if file.startswith(root) and "site-packages" not in file else file

"""Record the functions that a one-update `pretrain` and an accelerated model call.

Run it as `python -m benchmarks.bits.walk FILE`, where FILE is the JSON file to write.

A module counts if one of its functions, methods or lambdas is called, even during an import; the bodies of modules and
classes do not count. The package is first imported while it is being watched.
"""

import importlib.util
import inspect
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
import soundfile
import torch

_SPEC = importlib.util.find_spec("fastssl")
assert _SPEC is not None
assert _SPEC.origin is not None
_PACKAGE = Path(_SPEC.origin).resolve().parent
_OPTIONS = (
    *("--recipe", "wav2vec2-tiny", "--trainer.max_steps", "1", "--trainer.accelerator", "cpu"),
    *("--trainer.progress", "false", "--data.valid", "0", "--data.num_workers", "0", "--data.max_duration_s", "9"),
)
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "conv1d", "einsum"}
Function = tuple[str, str]  # (path of the module, qualified name)


class Walk:
    """Profile function for one thread: records which package functions run, and its stack at certain moments."""

    def __init__(self) -> None:
        #: Functions called in total, and between `training_step` and clipping.
        self.called: dict[Function, None] = {}
        self.in_step: dict[Function, None] = {}
        #: For each moment, the package's functions on the stack at its first occurrence, outermost first.
        self.stacks: dict[str, list[Function]] = {}
        self._names: dict[CodeType, Function | None] = {}
        self._step = False

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "c_call":
            if argument.__name__ in _PRODUCTS:
                self._moment("first product", frame)
            return
        if event != "call":
            return
        code = frame.f_code
        if code.co_filename.endswith("torch/_ops.py") and code.co_name == "__call__":
            called = frame.f_locals["self"]
            kernel = str(getattr(called, "_qualified_op_name", None) or getattr(called, "_name", ""))
            if kernel.startswith("fastssl"):
                self._moment("first product" if "conv" in kernel else kernel, frame)
        elif code.co_name == "clip_grad_norm_":
            self._moment("clipping", frame)
            self._step = False
        elif code.co_name == "save" and code.co_filename.endswith("torch/serialization.py"):
            self._moment("checkpoint written", frame)
        elif code.co_name == "read" and code.co_filename.endswith("soundfile.py"):
            self._moment("waveform read", frame)
        function = self._function(code)
        if function is None:
            return
        self._step |= code.co_name == "training_step"
        self.called[function] = None
        if self._step:
            self.in_step[function] = None

    def _moment(self, name: str, frame: FrameType) -> None:
        if name not in self.stacks:
            active = [self._function(f.f_code) for f in _frames(frame)]
            self.stacks[name] = list(dict.fromkeys(function for function in reversed(active) if function))

    def _function(self, code: CodeType) -> Function | None:
        """Return the function of this code; None outside of the package, and for bodies of modules and classes."""
        if code not in self._names:
            path = Path(code.co_filename).resolve()
            ours = bool(code.co_flags & inspect.CO_OPTIMIZED) and path.is_relative_to(_PACKAGE)
            name = getattr(code, "co_qualname", code.co_name)  # Python 3.10 has no co_qualname
            self._names[code] = (str(path.relative_to(_PACKAGE)), name) if ours else None
        return self._names[code]


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


@contextmanager
def watched() -> Iterator[Walk]:
    """Record the function calls inside a `with` block."""
    walk = Walk()
    sys.setprofile(walk)
    try:
        yield walk
    finally:
        sys.setprofile(None)


def pretrain(folder: Path) -> Walk:
    """Record the calls of `fastssl pretrain` for one update on noise, written into `folder`."""
    random = np.random.default_rng(0)
    (folder / "corpus").mkdir()
    for index in range(6):
        samples = 0.1 * random.standard_normal(16000 * (3 + index)).astype(np.float32)
        soundfile.write(folder / "corpus" / f"{index}.wav", samples, 16000)
    with watched() as walk:
        from fastssl import cli

        status = cli.main(["pretrain", str(folder / "corpus"), "--output", str(folder / "run"), *_OPTIONS])
    if status != 0:
        raise RuntimeError(f"fastssl pretrain: failed with exit status {status}; see its output above")
    return walk


def accelerated() -> tuple[Walk, Walk]:
    """Record the calls of `accelerate` itself, and those of the accelerated model's first forward pass."""
    import transformers

    import fastssl

    config = transformers.Wav2Vec2Config(
        hidden_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        conv_dim=[32] * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    )
    model: Any = transformers.Wav2Vec2Model(config)
    model.eval()
    with watched() as patching:
        fastssl.accelerate(model)
    with torch.no_grad(), watched() as calling:
        model(torch.randn(1, 4000))
    return patching, calling


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        training = pretrain(Path(folder))
    patching, calling = accelerated()
    result = {
        "called": list(training.called),
        "in_step": list(training.in_step),
        "stacks": training.stacks,
        "accelerate": list(patching.called),
        "first_product": calling.stacks["first product"],
    }
    Path(sys.argv[1]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()

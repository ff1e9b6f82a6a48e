"""Test the module walk: which functions count as executed, and how the report shows a walk."""

import sys
from pathlib import Path
from types import CodeType

import pytest

from benchmarks import module_walk
from benchmarks.bits import walk

_CODE = """
class Box:
    size = len("class bodies do not count")

    def training_step(self):
        return [half(x) for x in (2, 4)]

def half(x):
    return x / 2

def clip_grad_norm_():
    return half(1)

def before():
    return Box().training_step(), clip_grad_norm_(), after()

def after():
    return None

half(0)
"""


def test_functions_are_counted_and_bodies_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nn").mkdir()
    code: CodeType = compile(_CODE, str(tmp_path / "nn" / "box.py"), "exec")
    monkeypatch.setattr(walk, "_PACKAGE", tmp_path)
    names: dict[str, object] = {}
    with walk.watched() as found:
        exec(code, names)
        exec("before()", names)
    assert sys.getprofile() is None
    called, in_step = (
        {name.rpartition(".")[2] for _, name in functions} - {"<listcomp>"}
        for functions in (found.called, found.in_step)
    )
    assert called == {"half", "before", "training_step", "clip_grad_norm_", "after"}
    assert in_step == {"training_step", "half"}
    assert {module for module, _ in found.called} == {"nn/box.py"}
    assert [name for _, name in found.stacks["clipping"]] == ["before", "clip_grad_norm_"]


def test_a_walk_counts_each_function_once() -> None:
    main, read, step, save = ["cli/main.py", "main"], ["data.py", "read"], ["models/a.py", "step"], ["data.py", "save"]
    found = {
        "called": [main, read, step, save],
        "in_step": [step],
        "stacks": {
            "waveform read": [main, read],
            "first product": [main, step],
            "clipping": [main],
            "checkpoint written": [main, save],
            "fastssl_native::contrastive_loss_fwd": [main, step],
        },
        "accelerate": [main],
        "first_product": [step],
    }
    text = module_walk.report(found)
    assert "one-update pretrain: 3 modules, 4 functions\n  cli/main.py data.py models/a.py\n" in text
    assert "training_step to clipping: 1 modules, 1 functions\n" in text
    assert "| waveform to checkpoint | 4 | 3 |" in text
    assert "| contrastive_logits_temperature to the kernel | 2 | 2 |" in text

"""Test the instrument: each fault that is put into an encoder is reported, at its place, and nothing else."""

import pytest

from tests.emulation.fake_cuda import shims
from tests.emulation.fake_cuda.budgets import broken
from tests.emulation.fake_cuda.run import found_by

WHY_NOT = shims.why_not()
needs_pretence = pytest.mark.skipif(WHY_NOT is not None, reason=f"a GPU cannot be pretended: {WHY_NOT}")

#: Fault in `faults.py` -> kind of finding, and text that it must contain.
FAULTS = {
    "item": ("waits", "faults.py item: item"),
    "truth": ("waits", "faults.py truth: item"),
    "dropped_device": ("problems", "faults.py dropped_device: add: FakeTensorDeviceMismatchError"),
    "boolean_mask": ("waits", "faults.py boolean_mask: index by a mask"),
    "index_on_the_host": ("waits", "faults.py index_on_the_host: index on the host"),
    "blocking_copy": ("waits", "faults.py blocking_copy: copy to device"),
    "literal": ("waits", "faults.py literal: copy to device"),
    "pageable_copy": ("pageable", "faults.py pageable_copy"),
    "copy_to_host": ("waits", "faults.py copy_to_host: copy to host"),
    "asynchronous_copy_to_host": ("problems", "faults.py asynchronous_copy_to_host: asynchronous copy to the host"),
    "list_of_values": ("waits", "faults.py list_of_values: copy to host"),
    "sizes_from_the_device": ("waits", "faults.py sizes_from_the_device: repeat_interleave without output_size"),
    "collective_on_the_host": ("problems", "allreduce_: tensors are on cpu"),
    "synchronize": ("waits", "faults.py synchronize: synchronize"),
    "mixed_dtypes": ("problems", "faults.py mixed_dtypes: mm: expected one dtype, got float32 and float64"),
    "dtype_of_no_kernel": ("problems", "no ahead-of-time case has out_ptr float64, x_ptr float64"),
    "mixture_of_no_kernel": ("problems", "no ahead-of-time case has context_ptr float32, hash_ptr int32"),
    "strided_argument": ("problems", "x_ptr is not contiguous"),
    "argument_on_the_host": ("problems", "bias_gelu_dropout_fwd: tensors are on cuda:0, cpu"),
    "grid_out_of_range": ("problems", "copy_kernel: grid (1, 70000) is out of range"),
    "empty_grid": ("problems", "copy_kernel: grid (0,) is out of range"),
    "variant_per_length": ("new_variants", "copy_kernel: WIDTH="),
    "variant_per_divisibility": ("new_variants", "copy_kernel: rows="),
    "variant_per_alignment": ("new_variants", "copy_kernel: x_ptr="),
}
_KINDS = ("waits", "pageable", "problems", "new_variants")


@needs_pretence
def test_every_fault_is_found() -> None:
    found = {name.removeprefix("fault/"): of for name, of in found_by("fault/*").items()}
    without = found.pop("none")
    assert [without[kind] for kind in (*_KINDS, "error")] == [{}, {}, {}, [], ""]
    assert without["launches"]["forward"] > 50
    assert found.keys() == FAULTS.keys()
    for name, (kind, text) in FAULTS.items():
        assert any(text in what for what in found[name][kind]), (name, found[name][kind])
        assert not found[name]["waits"] or kind in ("waits", "problems")


def test_a_broken_budget_is_described() -> None:
    recorded = {"a": {"launches": {"forward": 10}, "waits": {"x.py f: item": 1, "x.py g: item": 1}}}
    same = {"launches": {"forward": 10}, "waits": {"x.py f: item": 1, "x.py g: item": 1}}
    fewer = {"launches": {"forward": 9}, "waits": {"x.py f: item": 1}}
    more = {"launches": {"forward": 11, "backward": 1}, "waits": same["waits"] | {"x.py f: item": 2}}
    assert broken("a", same, recorded) == []
    assert broken("a", fewer, recorded) == ["the host waits 0 times, not 1, at x.py g: item"]
    assert broken("a", more, recorded) == [
        "phase 'forward' has 11 launches, more than the 10 recorded",
        "phase 'backward' has 1 launches, more than the 0 recorded",
        "the host waits 2 times, not 1, at x.py f: item",
    ]
    assert broken("b", same, recorded) == ["nothing is recorded for this scenario"]

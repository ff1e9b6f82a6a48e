"""Test that a CUDA graph captures the same for all batches of its bucket, without waits, and that it is replayed."""

from typing import Any

import pytest

from tests.emulation.fake_cuda import shims
from tests.emulation.fake_cuda.run import found_by
from tests.emulation.fake_cuda.test_scenarios import faults

WHY_NOT = shims.why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"a GPU cannot be pretended: {WHY_NOT}")
#: Small encoders, which are quick; the others run with the slow tests.
PATTERNS = ("graphs/hubert/bf16-mixed", "graphs/wavlm/32-true", "graphs/best-rq/16-mixed")


def assert_the_same_is_captured(found: dict[str, Any]) -> None:
    assert faults(found) == {}
    for name, of in found.items():
        notes, launches = of["notes"], of["launches"]["replay"] / 4
        assert notes["differences"] == [], name
        # Had the trace not what differs between buckets, it would not show that nothing differs within one.
        assert notes["another bucket differs"], name
        assert (notes["captured waits"], notes["captured copies"]) == ({}, 0), name
        assert (notes["captures"], notes["captures while replayed"]) == (5, 0), name
        assert (of["waits"], of["pageable"]) == ({}, {}), name
        # Each call fills the graph's inputs (samples, zeros, layouts), runs it, and copies a layout and all states.
        assert of["kernels"]["CUDA graph"] == of["kernels"]["copy to device"] == 4, name
        assert launches == 5 + notes["states"], name
        assert launches < notes["captured launches"] / 2, name


def test_batches_of_a_bucket_launch_the_same() -> None:
    found = found_by(*PATTERNS)
    assert len(found) == len(PATTERNS)
    assert_the_same_is_captured(found)


@pytest.mark.slow
def test_batches_of_a_bucket_launch_the_same_in_every_encoder_and_precision() -> None:
    assert_the_same_is_captured(found_by("graphs/*"))

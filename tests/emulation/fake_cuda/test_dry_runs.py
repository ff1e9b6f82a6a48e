"""Test that the benchmarks and `fastssl check` run to their end with `--device cuda`, on a pretended GPU."""

from collections.abc import Mapping
from typing import Any

import pytest

from tests.emulation.fake_cuda import shims
from tests.emulation.fake_cuda.run import found_by

WHY_NOT = shims.why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"a GPU cannot be pretended: {WHY_NOT}")

#: Rows that run quickly, for the default suite.
QUICK = (
    "benchmark/bench_train_step/pretrain-tiny",
    "benchmark/ops.bench_integrate_and_fire/*",
)
#: The other modules with rows are grouped by how long they take.
GROUPS = (
    "benchmark/all",
    "benchmark/bench_train_step/*",
    "benchmark/bench_hubert_step/*",
    "benchmark/bench_encoder/*",
    "benchmark/bench_compression/*",
    *(f"benchmark/bench_drop_in/wav2vec2-{model}*" for model in ("base", "large", "conformer", "pretraining")),
    *(
        f"benchmark/bench_drop_in/{model}*"
        for model in ("hubert", "wavlm", "data2vec", "unispeech", "sew", "torchaudio")
    ),
    "benchmark/ops.*",
    "check/*",
)
#: Why a contender may be left out of a row.
LEFT_OUT = (
    "not available for varlen_attention on cuda (PyTorch's kernel has no d",  # dropout, or distance bias
    "varlen_attn does not support dropout",
    "No module named 'flash_attn'",
)


def faults(found: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return what is wrong with each dry run that has a fault."""
    said = {
        name: [
            *of["error"].splitlines()[-3:],
            *of["problems"],
            *(
                f"{contender} was not measured: {why}"
                for contender, why in of["notes"].get("skipped", {}).items()
                if not any(reason in why for reason in LEFT_OUT)
            ),
        ]
        for name, of in found.items()
    }
    return {name: lines for name, lines in said.items() if lines}


def test_quick_rows_run() -> None:
    found = found_by(*QUICK)
    assert faults(found) == {}
    measured = {name: contenders for of in found.values() for name, contenders in of["notes"]["measured"].items()}
    assert measured["pretrain-tiny"] == ["fastssl", "Transformers, eager", "Transformers, torch.compile"]
    assert measured["integrate-and-fire"][0] == "fastssl, native"


@pytest.mark.slow
def test_hubert_has_both_rivals() -> None:
    (found,) = found_by("benchmark/bench_hubert_step/hubert-tiny").values()
    expected = ["fastssl", "torchaudio", "torchaudio, equal crops, torch.compile"]
    assert found["notes"]["measured"]["hubert-tiny"] == expected


@pytest.mark.slow
@pytest.mark.parametrize("pattern", GROUPS)
def test_every_row_runs(pattern: str) -> None:
    assert faults(found_by(pattern)) == {}

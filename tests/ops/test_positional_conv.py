from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastssl.kernels.positional_conv import op, reference
from fastssl.ops import positional_conv
from fastssl.packing import Layout, Packed
from tests.ops.common import LENGTHS, check_against_reference, compiler_for, gradients, layout_of, normal, randn
from tests.ops.standard import Inputs, Mates, Standard

#: Name -> (lengths, groups, channels per group, K, bias).
CASES = {
    "wav2vec2": (LENGTHS["odd"], 4, 6, 16, True),
    "odd_kernel": (LENGTHS["odd"], 2, 8, 7, True),
    "kernel_longer_than_sequences": (LENGTHS["one_long"], 2, 4, 32, True),
    "depthwise": (LENGTHS["odd"], 6, 1, 5, False),
    "depthwise_of_conformer": (LENGTHS["with_empty"], 24, 1, 31, True),
    "depthwise_even": (LENGTHS["one_long"], 5, 1, 4, True),
    "one_group": (LENGTHS["with_empty"], 1, 5, 4, True),
    "kernel_1": (LENGTHS["odd"], 2, 3, 1, False),
    "single_frame": (LENGTHS["single_frame"], 2, 4, 8, True),
    "small": ((5, 0, 3), 2, 2, 4, True),
    "empty_batch": (LENGTHS["empty_batch"], 2, 4, 8, True),
}


def make_inputs(case: str, dtype: torch.dtype = torch.float32) -> Inputs:
    lengths, groups, group_channels, kernel, bias = CASES[case]
    generator = torch.Generator().manual_seed(0)
    channels = groups * group_channels
    inputs = {
        "x": torch.randn(sum(lengths), channels, generator=generator, dtype=dtype),
        "weight": torch.randn(channels, group_channels, kernel, generator=generator, dtype=dtype),
    }
    if bias:
        inputs["bias"] = torch.randn(channels, generator=generator, dtype=dtype)
    return inputs


def run(case: str, inputs: Inputs, backend: str | None = None) -> Tensor:
    layout = layout_of(CASES[case][0], inputs["x"].device.type)
    return positional_conv(inputs["x"], inputs["weight"], layout, bias=inputs.get("bias"), backend=backend)


def serves(case: str, backend: str, device: str, dtype: torch.dtype) -> bool:
    half_on_cpu = (dtype, device) == (torch.float16, "cpu")
    return backend != "torch" or not (dtype == torch.float64 or case == "empty_batch" or half_on_cpu)


def frames(count: int) -> Inputs:
    return {"x": randn(count, 8), "weight": randn(8, 4, 6)}


def make_batch(lengths: Sequence[int]) -> Inputs:
    return normal(x=(sum(lengths), 24), weight=(24, 6, 16))


def call(inputs: Inputs, layout: Layout, backend: str) -> Tensor:
    return positional_conv(inputs["x"], inputs["weight"], layout, backend=backend)


STANDARD = Standard(
    op="positional_conv",
    cases=CASES,
    make_inputs=make_inputs,
    run=run,
    serves=serves,
    backward_dtypes=(torch.float32, torch.bfloat16, torch.float16),
    mates={
        "drawn": Mates(
            make=make_batch,
            call=lambda inputs, layout, backend: [Packed(call(inputs, layout, backend), layout)],
            lengths=st.lists(st.integers(0, 150), min_size=1, max_size=6),
            shared=("weight",),
            examples=40,
            empty=lambda backend: backend != "torch",
        )
    },
    good={"x": torch.randn(20, 8), "weight": torch.randn(8, 4, 3), "layout": layout_of((12, 8))},
    bad={
        r"x: expected \(20, D\)": {"x": torch.randn(19, 8)},
        r"weight: expected \(8, 8 / groups, K\)": {"weight": torch.randn(8, 3, 3)},
        "weight and bias: must be torch.float32": {"weight": torch.randn(8, 4, 3).double()},
        r"bias: expected \(8,\)": {"bias": torch.randn(5)},
        "backend='warp': not available for positional_conv on cpu": {"backend": "warp"},
    },
    frames=frames,
    call=call,
    gradcheck_cases=("small", "empty_batch"),
    compile_cases=("wav2vec2",),
    compiler=compiler_for,
    compile_tolerance=(1e-4, 1e-3),
)


def test_reference_is_the_convolution_of_transformers() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((40, 12), (12, 3, 10), (12,)))
    out = positional_conv(x, weight, layout_of((25, 15)), bias=bias, backend="reference")
    for frames, found in zip(x.split((25, 15)), out.split((25, 15)), strict=True):
        expected = F.conv1d(frames.t()[None], weight, bias, padding=5, groups=4)[0, :, :-1].t()
        torch.testing.assert_close(found, expected)


def test_long_sequences_have_an_exact_weight_gradient() -> None:
    """Test the weight gradient over many blocks of the Fourier transform, with groups as large as the base model's."""
    generator = torch.Generator().manual_seed(0)
    layout = layout_of((700, 3, 450))
    inputs = {
        "x": torch.randn(layout.total, 32, generator=generator),
        "weight": torch.randn(32, 16, 128, generator=generator) / 45,
    }
    check_against_reference(
        lambda tensors, name: positional_conv(tensors["x"], tensors["weight"], layout, backend=name),
        inputs,
        backend="torch",
        device="cpu",
        dtype=torch.float32,
        backward=True,
    )


def test_autocast_reaches_the_arguments_and_not_the_op() -> None:
    inputs = make_inputs("wav2vec2")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run("wav2vec2", inputs)
    assert torch.equal(out, run("wav2vec2", {name: tensor.bfloat16() for name, tensor in inputs.items()}))


def test_the_form_for_gpus_sorts_no_rows_and_equals_the_reference() -> None:
    """On a GPU, the backward of `x[rows]` sorts the rows. The form itself runs on any device."""
    layout = layout_of((11, 0, 7, 1))
    leaves = [randn(*shape).requires_grad_() for shape in ((19, 8), (8, 4, 6), (8,))]
    x, weight, bias = leaves

    class Names(TorchDispatchMode):
        seen: ClassVar[set[str]] = set()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.add(func.name())
            return func(*args, **(kwargs or {}))

    with Names():  # type: ignore[no-untyped-call]
        out = op._conv_with_gaps(x, weight, layout, bias)
        found = [out, *gradients(out, leaves)]
    assert "aten::index_select" in Names.seen
    assert not {name for name in Names.seen if "index_put" in name}
    out = reference.positional_conv(x, weight, layout, bias=bias)
    for a, b in zip(found, [out, *gradients(out, leaves)], strict=True):
        torch.testing.assert_close(a, b)

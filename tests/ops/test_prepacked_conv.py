"""Test products with prepacked weights: against the reference, plain PyTorch and themselves in other batches."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastssl import ops
from fastssl.kernels.dispatch import INFERENCE_BACKENDS, UnavailableBackendError
from fastssl.kernels.prepacked_conv.op import multiplies_bytes
from fastssl.kernels.prepacked_conv.weights import FORMATS, Format
from fastssl.packing import Layout, Packed
from tests.ops.common import LENGTHS

native = pytest.mark.skipif(
    "native" not in INFERENCE_BACKENDS["prepacked_conv"]["cpu"], reason="the compiled CPU module was not built"
)
#: Largest error against plain PyTorch in fp64 with the same values, relative to the largest one: rounding of operands.
_ROUNDING = {"fp32": 1e-6, "bf16": 6e-3, "int8": 2e-2}
#: Largest difference between backends: GELU is coarser in the compiled kernel, unless in fp32.
_BACKENDS = {"fp32": 1e-6, "bf16": 6e-5, "int8": 6e-5}


def usable(backend: str) -> list[Format]:
    """Return the formats that a backend supports on this machine."""
    return [name for name in FORMATS if backend == "reference" or name != "int8" or multiplies_bytes()]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def off(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest expected value; 0 for empty tensors."""
    assert found.shape == expected.shape
    if not expected.numel():
        return 0.0
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


@pytest.mark.parametrize("backend", INFERENCE_BACKENDS["prepacked_conv"]["cpu"])
@pytest.mark.parametrize(
    ("rows", "c_in", "c_out"), [(0, 8, 8), (1, 1, 1), (7, 5, 3), (50, 768, 200), (13, 64, 65), (97, 3, 128)]
)
def test_linear_is_that_of_pytorch(backend: str, rows: int, c_in: int, c_out: int) -> None:
    x, weight, bias = numbers(rows, c_in), numbers(c_out, c_in, seed=1), numbers(c_out, seed=2)
    for format, gelu, with_bias in itertools.product(usable(backend), (False, True), (False, True)):
        packed = ops.prepack(weight, bias if with_bias else None, format=format)
        (found,) = ops.prepacked_linear(x, [packed], gelu=gelu, backend=backend)
        expected = F.linear(x.double(), weight.double(), bias.double() if with_bias else None)
        assert found.dtype == torch.float32
        assert off(found, F.gelu(expected) if gelu else expected) <= _ROUNDING[format]


@native
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(("kernel", "stride"), [(10, 5), (3, 2), (2, 2), (1, 1), (2, 3), (5, 1)])
def test_conv_is_that_of_the_reference(lengths: tuple[int, ...], kernel: int, stride: int) -> None:
    layout = Layout.from_lengths(lengths)
    for format, channels, norm, dtype in itertools.product(
        usable("native"), (4, 7), (False, True), (torch.float32, torch.bfloat16)
    ):
        x = numbers(layout.total, channels).to(dtype)
        packed = ops.prepack(numbers(70, channels, kernel, seed=1), numbers(70, seed=2), format=format)
        row_norm = ops.RowNorm(numbers(70, seed=3), numbers(70, seed=4), 1e-5) if norm else None
        found, out = ops.prepacked_conv(x, packed, layout, stride=stride, norm=row_norm, gelu=True, backend="native")
        expected, expected_out = ops.prepacked_conv(
            x, packed, layout, stride=stride, norm=row_norm, gelu=True, backend="reference"
        )
        assert out.lengths == expected_out.lengths == layout.after_conv(kernel, stride).lengths
        assert off(found, expected) <= _BACKENDS[format]


@pytest.mark.parametrize("backend", INFERENCE_BACKENDS["prepacked_conv"]["cpu"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(("groups", "kernel"), [(4, 16), (1, 5), (2, 128), (24, 3), (3, 1)])
def test_keep_length_is_positional_conv(backend: str, lengths: tuple[int, ...], groups: int, kernel: int) -> None:
    layout = Layout.from_lengths(lengths)
    x, weight, bias = numbers(layout.total, 24), numbers(24, 24 // groups, kernel, seed=1), numbers(24, seed=2)
    expected = ops.positional_conv(x.double(), weight.double(), layout, bias=bias.double())
    for format in usable(backend):
        packed = ops.prepack(weight, bias, format=format, groups=groups)
        found, out = ops.prepacked_conv(x, packed, layout, keep_length=True, backend=backend)
        assert out is layout
        assert off(found, expected) <= _ROUNDING[format]


@pytest.mark.parametrize("backend", INFERENCE_BACKENDS["prepacked_conv"]["cpu"])
def test_several_weights_multiply_the_same_rows(backend: str) -> None:
    x = numbers(30, 48)
    for format in usable(backend):
        packed = [ops.prepack(numbers(size, 48, seed=size), None, format=format) for size in (48, 8, 130)]
        together = ops.prepacked_linear(x, packed, dtype=torch.bfloat16, backend=backend)
        for one, found in zip(packed, together, strict=True):
            assert found.dtype == torch.bfloat16
            assert found.equal(ops.prepacked_linear(x, [one], dtype=torch.bfloat16, backend=backend)[0])


@native
@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(0, 150), min_size=1, max_size=6))
def test_an_utterance_has_the_same_bits_alone(lengths: list[int]) -> None:
    layout = Layout.from_lengths(lengths)
    x = Packed(numbers(layout.total, 24), layout)
    norm = ops.RowNorm(numbers(40, seed=3), numbers(40, seed=4), 1e-5)
    for format in usable("native"):
        linear = ops.prepack(numbers(100, 24, seed=1), None, format=format)
        conv = ops.prepack(numbers(40, 24, 3, seed=1), numbers(40, seed=2), format=format)
        grouped = ops.prepack(numbers(24, 6, 16, seed=1), None, format=format, groups=4)

        def call(part: Packed) -> list[Tensor]:
            return [
                *ops.prepacked_linear(part.values, [linear], gelu=True, backend="native"),  # noqa: B023
                ops.prepacked_conv(part.values, conv, part.layout, stride=2, norm=norm, gelu=True, backend="native")[0],  # noqa: B023
                ops.prepacked_conv(part.values, grouped, part.layout, keep_length=True, backend="native")[0],  # noqa: B023
            ]

        alone = [call(Packed.pack([sequence])) for sequence in x.unpack()]
        for together, parts in zip(call(x), zip(*alone, strict=True), strict=True):
            assert together.equal(torch.cat(parts))


@native
def test_a_single_row_has_the_same_bits_as_among_others() -> None:
    x = numbers(200, 96)
    for format in usable("native"):
        packed = [ops.prepack(numbers(130, 96, seed=1), numbers(130, seed=2), format=format)]
        (together,) = ops.prepacked_linear(x, packed, backend="native")
        rows = [ops.prepacked_linear(row[None], packed, backend="native")[0] for row in x]
        assert together.equal(torch.cat(rows))


@native
def test_the_number_of_threads_does_not_change_a_bit() -> None:
    layout = Layout.from_lengths([311, 0, 7, 150])
    x, before = numbers(layout.total, 24), torch.get_num_threads()
    for format in usable("native"):
        linear = ops.prepack(numbers(100, 24, seed=1), None, format=format)
        grouped = ops.prepack(numbers(24, 6, 16, seed=1), None, format=format, groups=4)
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(
                [
                    *ops.prepacked_linear(x, [linear], backend="native"),
                    ops.prepacked_conv(x, grouped, layout, keep_length=True, backend="native")[0],
                ]
            )
        torch.set_num_threads(before)
        for found in results[1:]:
            assert all(one.equal(expected) for one, expected in zip(found, results[0], strict=True))


@pytest.mark.parametrize(("shape", "groups"), [((70, 5, 3), 1), ((24, 6, 16), 4), ((64, 64, 1), 1), ((1, 1, 1), 1)])
def test_unpack_returns_what_prepack_got(shape: tuple[int, int, int], groups: int) -> None:
    weight, bias = numbers(*shape), numbers(shape[0], seed=1)
    for format in FORMATS:
        packed = ops.prepack(weight, bias, format=format, groups=groups)
        found, found_bias = ops.unpack(packed)
        assert found_bias is not None
        assert found_bias.equal(bias)
        assert packed.format == format
        if format == "int8":
            step = weight.abs().amax((1, 2), keepdim=True) / 127
            assert ((found - weight).abs() <= step * 0.5001).all()
        else:
            assert found.equal(weight if format == "fp32" else weight.bfloat16().float())
        again = ops.prepack(found, None, format=format, groups=groups)
        assert again.panels.equal(packed.panels)
        assert ops.unpack(again)[1] is None


def test_int8_sums_of_the_largest_products_are_exact() -> None:
    """Every product is 255 * 127, and their sum is an integer that fp32 cannot hold."""
    if not multiplies_bytes():
        pytest.skip("this processor does not multiply bytes")
    depth = 4099
    packed = ops.prepack(torch.full((2, depth), 127.0), None, format="int8")
    (found,) = ops.prepacked_linear(torch.full((3, depth), 255.0), [packed], backend="native")
    assert found.tolist() == [[float(torch.tensor(255.0 * 127 * depth))] * 2] * 3


@pytest.mark.parametrize("backend", INFERENCE_BACKENDS["prepacked_conv"]["cpu"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_spoils_its_own_row_only(backend: str, bad: float) -> None:
    x = numbers(9, 20)
    spoiled = x.clone()
    spoiled[4, 7] = bad
    for format in usable(backend):
        packed = [ops.prepack(numbers(5, 20, seed=1), None, format=format)]
        (found,), (expected,) = (ops.prepacked_linear(rows, packed, backend=backend) for rows in (spoiled, x))
        assert not found[4].isfinite().any()
        assert found[torch.arange(9) != 4].equal(expected[torch.arange(9) != 4])


@pytest.mark.parametrize("backend", INFERENCE_BACKENDS["prepacked_conv"]["cpu"])
def test_int8_of_constant_and_of_tiny_rows(backend: str) -> None:
    if "int8" not in usable(backend):
        pytest.skip("this processor does not multiply bytes")
    weight = numbers(6, 10)
    packed = [ops.prepack(weight, None, format="int8")]
    for value, expected in ((0.0, 0.0), (3.0, 3.0), (-2.0, -2.0), (1e-38, 0.0)):
        (found,) = ops.prepacked_linear(torch.full((2, 10), value), packed, backend=backend)
        wanted = (expected * ops.unpack(packed[0])[0].sum((1, 2))).expand(2, 6)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def _front_end(norm: str) -> tuple[list[ops.StridedConvLayer], list[int]]:
    shapes = [(10, 5), (3, 2), (3, 2), (2, 2)]
    layers, c_in = [], 1
    for index, (kernel, stride) in enumerate(shapes):
        kind = norm if norm == "layer" or index == 0 else "none"
        vectors = (numbers(20, seed=3 + index), numbers(20, seed=9 + index)) if kind != "none" else (None, None)
        weight = numbers(20, c_in, kernel, seed=index) * (c_in * kernel) ** -0.5
        layers.append(ops.StridedConvLayer(weight, stride, numbers(20, seed=20 + index), kind, *vectors))  # type: ignore[arg-type]
        c_in = 20
    return layers, [stride for _, stride in shapes]


def _prepacked(layers: list[ops.StridedConvLayer], format: Format, dtype: torch.dtype) -> list[ops.PrepackedConvLayer]:
    return [
        ops.PrepackedConvLayer(
            ops.prepack(layer.weight, layer.bias, format=format),
            layer.stride,
            None
            if layer.norm_weight is None or layer.norm_bias is None
            else ops.RowNorm(layer.norm_weight, layer.norm_bias, layer.eps),
            dtype,
        )
        for layer in layers[1:]
    ]


@pytest.mark.parametrize("backend", INFERENCE_BACKENDS["prepacked_conv"]["cpu"])
@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("lengths", [(9000,), (400, 0, 30_000, 33, 5000), (), (20,)])
def test_front_end_is_strided_conv_stack(backend: str, norm: str, lengths: tuple[int, ...]) -> None:
    layers, _ = _front_end(norm)
    layout = Layout.from_lengths(lengths)
    x = numbers(layout.total, 1)
    expected, expected_layout = ops.strided_conv_stack(x, layers, layout)
    for format in usable(backend):
        dtype = torch.float32 if format == "fp32" else torch.bfloat16
        found, out = ops.prepacked_front_end(
            x, layers[0], _prepacked(layers, format, dtype), layout, dtype=dtype, backend=backend
        )
        assert out.lengths == expected_layout.lengths
        assert off(found, expected) <= {"fp32": 1e-5, "bf16": 3e-2, "int8": 8e-2}[format]
        for index, sequence in enumerate(Packed(x, layout).unpack()):
            alone, _ = ops.prepacked_front_end(
                sequence,
                layers[0],
                _prepacked(layers, format, dtype),
                Layout.from_lengths([len(sequence)]),
                dtype=dtype,
                backend=backend,
            )
            if backend == "native":
                assert alone.equal(Packed(found, out).unpack()[index])


def test_bad_arguments() -> None:
    layout, x = Layout.from_lengths([5]), numbers(5, 4)
    packed = ops.prepack(numbers(3, 4), None, format="fp32")
    calls: dict[str, Callable[[], object]] = {
        "format: must be one of fp32, bf16, int8, got 'int4'": lambda: ops.prepack(x, format="int4"),  # type: ignore[arg-type]
        "weight: expected": lambda: ops.prepack(numbers(3), format="fp32"),
        "bias: expected \\(5,\\)": lambda: ops.prepack(x, numbers(4), format="fp32"),
        "weight: must be float32, bfloat16 or float16": lambda: ops.prepack(x.double(), format="fp32"),
        "weight: contains NaN": lambda: ops.prepack(x * float("nan"), format="int8"),
        "weight: int8 supports up to": lambda: ops.prepack(torch.zeros(1, 70_000), format="int8"),
        "x: expected \\(N, 4\\)": lambda: ops.prepacked_linear(numbers(5, 3), [packed]),
        "x: expected \\(N, 4\\) in float32 or bfloat16": lambda: ops.prepacked_linear(x.half(), [packed]),
        "dtype: must be": lambda: ops.prepacked_linear(x, [packed], dtype=torch.float16),
        "weights: expected one or more": lambda: ops.prepacked_linear(x, []),
        "weights: must have the same": lambda: ops.prepacked_linear(
            x, [packed, ops.prepack(numbers(3, 4), None, format="bf16")]
        ),
        "stride: must be 1": lambda: ops.prepacked_conv(x, packed, layout, stride=2, keep_length=True),
        "x: expected \\(5, C_in\\)": lambda: ops.prepacked_conv(numbers(4, 4), packed, layout),
        "norm: expected": lambda: ops.prepacked_conv(x, packed, layout, norm=ops.RowNorm(numbers(4), numbers(4), 0.0)),
        "x: prepacked weights run on the CPU only": lambda: ops.prepacked_linear(x.to("meta"), [packed]),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(UnavailableBackendError):
        ops.prepacked_linear(x, [packed], backend="triton")


@pytest.mark.parametrize("backend", INFERENCE_BACKENDS["prepacked_conv"]["cpu"])
@pytest.mark.parametrize(("weight", "bias"), [(4, 128), (128, 4)])
def test_a_norm_of_another_size_is_refused(backend: str, weight: int, bias: int) -> None:
    norm = ops.RowNorm(torch.ones(weight), torch.ones(bias), 1e-5)
    packed = ops.prepack(torch.randn(128, 8, 3), format="fp32")
    with pytest.raises(ValueError, match=r"norm: expected vectors \(128,\) in float32"):
        ops.prepacked_conv(torch.randn(10, 8), packed, Layout.from_lengths([10]), norm=norm, backend=backend)


@pytest.mark.parametrize("backend", INFERENCE_BACKENDS["prepacked_conv"]["cpu"])
def test_bytes_of_huge_frames_are_never_zero(backend: str) -> None:
    if "int8" not in usable(backend):
        pytest.skip("needs AVX512-VNNI")
    torch.manual_seed(0)
    weight = torch.randn(5, 8) * 1e-3
    rows = torch.randn(3, 8).clamp(-1, 1) * torch.tensor([[1e29], [1e31], [1e33]])
    (found,) = ops.prepacked_linear(rows, [ops.prepack(weight, format="int8")], backend=backend)
    expected = rows @ weight.T
    assert ((found - expected).abs().amax(1) <= 0.02 * expected.abs().amax(1)).all()
    rows[0, :2] = torch.tensor([3e38, -3e38])  # a range that fp32 cannot hold
    (found,) = ops.prepacked_linear(rows, [ops.prepack(weight, format="int8")], backend=backend)
    assert found[0].isnan().all()
    assert found[1:].isfinite().all()


def test_bytes_are_refused_where_the_processor_lacks_them(monkeypatch: pytest.MonkeyPatch) -> None:
    if "native" not in INFERENCE_BACKENDS["prepacked_conv"]["cpu"]:
        pytest.skip("needs the compiled kernel")
    packed = ops.prepack(torch.randn(5, 8), format="int8")
    monkeypatch.setattr("fastssl.kernels.prepacked_conv.op.multiplies_bytes", lambda: False)
    with pytest.raises(ValueError, match="weights: int8 needs a processor with AVX512-VNNI"):
        ops.prepacked_linear(torch.randn(3, 8), [packed], backend="native")


def test_rows_without_a_second_axis_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x: expected \(N, 8\), got \(\)"):
        ops.prepacked_linear(torch.tensor(1.0), [ops.prepack(torch.randn(5, 8), format="fp32")])

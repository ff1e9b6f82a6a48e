from collections.abc import Sequence
from typing import Any, Literal

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from fastssl.kernels.dispatch import BACKENDS
from fastssl.kernels.strided_conv import blocks
from fastssl.ops import StridedConvLayer, strided_conv, strided_conv_stack
from fastssl.packing import Layout, Packed
from tests.ops.common import (
    LENGTHS,
    cast,
    check_against_reference,
    compiler_for,
    gradients,
    implementations,
    layout_of,
    normal,
    randn,
)
from tests.ops.standard import Inputs, Mates, Standard

Norm = Literal["none", "group", "layer"]

#: Name -> (lengths, C_in, C_out, K, stride, options).
CASES: dict[str, tuple[tuple[int, ...], int, int, int, int, dict[str, Any]]] = {
    "first_layer": (LENGTHS["odd"], 1, 8, 10, 5, {"norm": "group"}),
    "middle_layer": (LENGTHS["odd"], 8, 6, 3, 2, {}),
    "last_layer": (LENGTHS["one_long"], 8, 8, 2, 2, {"bias": True}),
    "layer_norm": (LENGTHS["with_empty"], 8, 6, 3, 2, {"norm": "layer", "bias": True}),
    "group_norm_short": (LENGTHS["one_long"], 5, 7, 3, 2, {"norm": "group"}),
    "no_activation": (LENGTHS["odd"], 8, 6, 3, 1, {"activation": "none"}),
    "stride_over_kernel": (LENGTHS["odd"], 4, 4, 2, 3, {}),
    "all_too_short": (LENGTHS["single_frame"], 8, 6, 3, 2, {"norm": "group"}),
    "empty_batch": (LENGTHS["empty_batch"], 8, 6, 3, 2, {"norm": "layer"}),
}
#: Small cases for gradcheck, which perturbs every number of the inputs.
SMALL: dict[str, tuple[tuple[int, ...], int, int, int, int, dict[str, Any]]] = {
    "small, first_layer": ((21, 14), 1, 3, 10, 5, {"norm": "group"}),
    "small, layer_norm": ((0, 9, 0, 6), 2, 3, 3, 2, {"norm": "layer", "bias": True}),
    "small, group_norm_short": ((11, 3, 2, 1, 5, 4), 2, 3, 3, 2, {"norm": "group"}),
    "small, last_layer": ((9, 3, 2, 1, 5, 4), 2, 3, 2, 2, {"bias": True}),
    "small, all_too_short": (LENGTHS["single_frame"], 2, 3, 3, 2, {"norm": "group"}),
    "small, empty_batch": (LENGTHS["empty_batch"], 2, 3, 3, 2, {"norm": "layer"}),
}
EVERY_IMPLEMENTATION = pytest.mark.parametrize(("backend", "device"), implementations("strided_conv"))


def make_inputs(case: str, dtype: torch.dtype = torch.float32) -> Inputs:
    lengths, c_in, c_out, kernel, _, options = (CASES | SMALL)[case]
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    inputs = {"x": normal(sum(lengths), c_in), "weight": normal(c_out, c_in, kernel) / (c_in * kernel) ** 0.5}
    if options.get("bias"):
        inputs["bias"] = normal(c_out)
    if options.get("norm"):
        inputs |= {"norm_weight": 1 + normal(c_out) / 4, "norm_bias": normal(c_out)}
    return inputs


def run(case: str, inputs: Inputs, backend: str | None = None) -> Tensor:
    lengths, _, _, _, stride, options = (CASES | SMALL)[case]
    out, layout = strided_conv(
        inputs["x"],
        inputs["weight"],
        layout_of(lengths, inputs["x"].device.type),
        stride=stride,
        bias=inputs.get("bias"),
        norm=options.get("norm", "none"),
        norm_weight=inputs.get("norm_weight"),
        norm_bias=inputs.get("norm_bias"),
        activation=options.get("activation", "gelu"),
        backend=backend,
    )
    assert layout.total == len(out)
    return out


#: Name -> (lengths, C_in, channels, kernels, strides, norms, bias).
STACKS: dict[str, tuple[tuple[int, ...], int, list[int], list[int], list[int], list[Norm], bool]] = {
    "wav2vec2_group": ((431, 40, 290), 1, [16, 16, 16], [10, 3, 2], [5, 2, 2], ["group", "none", "none"], False),
    "wav2vec2_layer": ((431, 7, 290), 1, [16, 16, 16], [10, 3, 2], [5, 2, 2], ["layer"] * 3, True),
    "odd": ((50, 1, 0, 77, 9), 3, [5, 9, 4], [2, 7, 3], [3, 2, 1], ["none", "group", "layer"], True),
    "waveform_without_norm": ((31, 64), 1, [70, 5], [4, 1], [6, 1], ["none", "none"], True),
}


def make_stack(case: str, dtype: torch.dtype = torch.float32) -> Inputs:
    lengths, c_in, channels, kernels, _, norms, bias = STACKS[case]
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    inputs = {"x": normal(sum(lengths), c_in)}
    for index, (c_out, kernel, norm) in enumerate(zip(channels, kernels, norms, strict=True)):
        inputs[f"weight_{index}"] = normal(c_out, c_in, kernel) / (c_in * kernel) ** 0.5
        if bias:
            inputs[f"bias_{index}"] = normal(c_out)
        if norm != "none":
            inputs |= {f"norm_weight_{index}": 1 + normal(c_out) / 4, f"norm_bias_{index}": normal(c_out)}
        c_in = c_out
    return inputs


def run_stack(case: str, inputs: Inputs, backend: str | None = None, lengths: tuple[int, ...] | None = None) -> Tensor:
    batch, _, _, _, strides, norms, _ = STACKS[case]
    layers = [
        StridedConvLayer(
            inputs[f"weight_{index}"],
            stride,
            inputs.get(f"bias_{index}"),
            norm,
            inputs.get(f"norm_weight_{index}"),
            inputs.get(f"norm_bias_{index}"),
        )
        for index, (stride, norm) in enumerate(zip(strides, norms, strict=True))
    ]
    layout = layout_of(batch if lengths is None else lengths, inputs["x"].device.type)
    out, layout = strided_conv_stack(inputs["x"], layers, layout, backend=backend)
    assert layout.total == len(out)
    return out


def make_case_or_stack(case: str, dtype: torch.dtype = torch.float32) -> Inputs:
    return make_stack(case, dtype) if case in STACKS else make_inputs(case, dtype)


def run_case_or_stack(case: str, inputs: Inputs, backend: str | None = None) -> Tensor:
    """Run a layer or a stack; in one of the stacks the waveform needs no gradient."""
    if case in STACKS:
        frozen = {"x": inputs["x"].detach()} if case == "wav2vec2_group" else {}
        return run_stack(case, inputs | frozen, backend)
    return run(case, inputs, backend)


def frames(count: int) -> Inputs:
    return {"x": randn(count, 6), "weight": randn(8, 6, 3), "norm_weight": randn(8), "norm_bias": randn(8)}


def make_batch(lengths: Sequence[int], channels: int) -> Inputs:
    return normal(x=(sum(lengths), channels), weight=(24, channels, 3))


def mates_for(norm: Norm) -> Mates:
    def convolve(inputs: dict[str, Any], layout: Layout, backend: str) -> list[Packed]:
        return [Packed(*strided_conv(**inputs, layout=layout, stride=2, norm=norm, backend=backend))]

    return Mates(
        make=make_batch,
        call=convolve,
        lengths=st.lists(st.integers(0, 200), min_size=1, max_size=6),
        drawn=(st.sampled_from([1, 9, 16, 24]),),
        shared=("weight",),
        examples=20,
        shorten=lambda lengths: [length // 5 for length in lengths[:3]],
    )


def call(inputs: dict[str, Any], layout: Layout, backend: str) -> Tensor:
    return strided_conv(**inputs, layout=layout, stride=2, norm="group", backend=backend)[0]


X, WEIGHT = torch.randn(20, 4), torch.randn(6, 4, 3)
STANDARD = Standard(
    op="strided_conv",
    cases=CASES,
    make_inputs=make_case_or_stack,
    run=run_case_or_stack,
    mates={"none": mates_for("none"), "group": mates_for("group"), "layer": mates_for("layer")},
    good={"x": X, "weight": WEIGHT, "layout": layout_of((12, 8)), "stride": 2},
    bad={
        r"x: expected \(20, C_in\)": {"x": torch.randn(19, 4)},
        r"weight: expected \(C_out, 4, K\)": {"weight": torch.randn(6, 5, 3)},
        r"weight: dtype torch.float64": {"weight": WEIGHT.double()},
        "stride: must be": {"stride": 0},
        "norm: must be": {"norm": "batch"},
        "activation: must be": {"activation": "relu"},
        r"bias: expected \(6,\)": {"bias": torch.randn(5)},
        "norm_weight and norm_bias: given": {"norm_weight": torch.randn(6)},
        "backend='warp': not available for strided_conv on cpu .*; available: .*reference": {"backend": "warp"},
    },
    frames=frames,
    call=call,
    gradcheck_cases=SMALL,
    compile_cases=("first_layer",),
    compiler=compiler_for,
    opcheck_cases=("wav2vec2_group", "wav2vec2_layer", "odd"),
    interpreter_skips=("first_layer", "wav2vec2_group", "odd"),
)


@pytest.mark.parametrize("norm", ["none", "group", "layer"])
def test_forward_is_the_layer_of_torch(norm: Norm) -> None:
    torch.manual_seed(0)
    conv = torch.nn.Conv1d(8, 6, 3, stride=2)
    group_norm, layer_norm = torch.nn.GroupNorm(6, 6), torch.nn.LayerNorm(6)
    torch.nn.init.normal_(group_norm.weight), torch.nn.init.normal_(layer_norm.bias)
    lengths = (31, 9, 64)
    x = torch.randn(sum(lengths), 8)
    module = {"group": group_norm, "layer": layer_norm, "none": None}[norm]
    expected = []
    for sequence in x.split(lengths):
        frames = conv(sequence.t()[None])
        if norm == "group":
            frames = group_norm(frames)
        frames = frames[0].t()
        expected.append(torch.nn.functional.gelu(layer_norm(frames) if norm == "layer" else frames))
    out, layout = strided_conv(
        x,
        conv.weight,
        layout_of(lengths),
        stride=2,
        bias=conv.bias,
        norm=norm,
        norm_weight=None if module is None else module.weight,
        norm_bias=None if module is None else module.bias,
    )
    assert layout.lengths == (15, 4, 31)
    torch.testing.assert_close(out, torch.cat(expected), rtol=1e-5, atol=1e-5)


@EVERY_IMPLEMENTATION
def test_group_norm_undoes_a_bias(backend: str, device: str) -> None:
    inputs = cast(make_inputs("group_norm_short"), torch.float32, device)
    plain = run("group_norm_short", inputs, backend)
    bias = torch.linspace(-2, 2, 7, device=device, requires_grad=True)
    shifted = run("group_norm_short", inputs | {"bias": bias}, backend)
    torch.testing.assert_close(shifted, plain, rtol=0, atol=1e-4)
    (grad,) = gradients(shifted, [bias])
    assert grad.abs().max() < 1e-4


@pytest.mark.parametrize("c_in", [1, 3])
@EVERY_IMPLEMENTATION
def test_group_norm_of_one_frame_is_its_bias(backend: str, device: str, c_in: int) -> None:
    """A frame is its own mean, exactly; any rounding in its difference from the mean would grow by 1 / sqrt(eps)."""
    if backend == "native" and c_in == 1:
        pytest.skip("the C++ kernel rounds the frame and its mean differently")
    layout = Layout.from_lengths([12, 14, 10], device=device)
    inputs = normal(weight=(20, c_in, 10), norm_weight=(20,), norm_bias=(20,))
    inputs = {name: value.detach().to(device).requires_grad_() for name, value in inputs.items()}
    x = (3 * randn(layout.total, c_in) + 1).to(device, torch.float32)
    layer = StridedConvLayer(inputs["weight"], 5, None, "group", inputs["norm_weight"], inputs["norm_bias"])
    out, _ = strided_conv_stack(x, [layer], layout, backend=backend)
    assert layout.total == 36
    assert torch.equal(out, out[:1].expand(3, -1))
    grad_weight, grad_norm_weight, _ = gradients(out, list(inputs.values()))
    assert not grad_weight.any()
    assert not grad_norm_weight.any()


@pytest.mark.parametrize("case", STACKS)
@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("waveform_needs_grad", [False, True])
def test_stack(case: str, backend: str, device: str, dtype: torch.dtype, waveform_needs_grad: bool) -> None:
    inputs = make_stack(case)
    rest = {name: tensor for name, tensor in inputs.items() if name != "x"}
    check_against_reference(
        lambda tensors, name: run_stack(case, inputs_with_x(inputs, tensors), name),
        inputs if waveform_needs_grad else rest,
        backend=backend,
        device=device,
        dtype=dtype,
        backward=True,
        case=("strided_conv_stack", case),
    )


def inputs_with_x(inputs: Inputs, tensors: Inputs) -> Inputs:
    like = tensors["weight_0"]
    return {"x": inputs["x"].to(like.device, like.dtype)} | tensors


@pytest.mark.parametrize(("backend", "device"), implementations("strided_conv", compiled_only=True))
def test_compile_stack(backend: str, device: str) -> None:
    inputs = {name: tensor.to(device).requires_grad_() for name, tensor in make_stack("wav2vec2_group").items()}
    compiled = torch.compile(
        lambda tensors: run_stack("wav2vec2_group", tensors, backend), fullgraph=True, backend=compiler_for(backend)
    )
    outs = compiled(inputs), run_stack("wav2vec2_group", inputs, backend)
    results = [[out, *gradients(out, list(inputs.values()))] for out in outs]
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", ["wav2vec2_group", "wav2vec2_layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@EVERY_IMPLEMENTATION
def test_batch_mates_do_not_matter_to_a_stack(backend: str, device: str, case: str, dtype: torch.dtype) -> None:
    if device == "cuda":
        pytest.skip("equal bits are promised only on the CPU")
    lengths, _, _, kernels, strides, _, _ = STACKS[case]
    inputs, layout = cast(make_stack(case), dtype), layout_of(lengths)
    out = run_stack(case, inputs, backend)
    for kernel, stride in zip(kernels, strides, strict=True):
        layout = layout.after_conv(kernel, stride)
    for index, (together, sequence) in enumerate(
        zip(out.split(layout.lengths), inputs["x"].split(lengths), strict=True)
    ):
        alone = run_stack(case, inputs | {"x": sequence.clone()}, backend, (lengths[index],))
        assert torch.equal(together, alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("backend", "device"), implementations("strided_conv", compiled_only=True))
def test_a_stack_keeps_convolutions_only(backend: str, device: str, dtype: torch.dtype) -> None:
    inputs = cast(make_stack("wav2vec2_group"), dtype, device)
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run_stack("wav2vec2_group", inputs | {"x": inputs["x"].detach()}, backend)
    parameters = {tensor.data_ptr() for name, tensor in inputs.items()}
    sizes = [tensor.shape for pointer, tensor in kept.items() if pointer not in parameters and tensor.numel() > 4]
    lengths, _, channels, kernels, strides, _, _ = STACKS["wav2vec2_group"]
    layout, expected = layout_of(lengths), [torch.Size((2, len(lengths), channels[0]))]
    for index, (c, kernel, stride) in enumerate(zip(channels, kernels, strides, strict=True)):
        layout = layout.after_conv(kernel, stride)
        if index > 0:
            expected.append(torch.Size((layout.total, c)))
    assert sorted(sizes) == sorted(expected)


@pytest.mark.skipif("native" not in BACKENDS["strided_conv"]["cpu"], reason="the compiled module was not built")
@pytest.mark.parametrize("case", STACKS)
@pytest.mark.parametrize("waveform_needs_grad", [False, True])
def test_blocks_do_not_matter(case: str, waveform_needs_grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = cast(make_stack(case), torch.float32)
    inputs["x"].requires_grad_(waveform_needs_grad)
    names = [name for name, tensor in inputs.items() if tensor.requires_grad]
    results = []
    for numbers in (blocks._BLOCK_NUMBERS, 1):
        monkeypatch.setattr(blocks, "_BLOCK_NUMBERS", numbers)
        out = run_stack(case, inputs, "native")
        results.append((out, gradients(out, [inputs[name] for name in names])))
    (out, grads), (out_in_blocks, grads_in_blocks) = results
    assert torch.equal(out_in_blocks, out)
    for name, grad, found in zip(names, grads, grads_in_blocks, strict=True):
        # The gradient of a bias before a norm over time is zero up to rounding, so compare it on an absolute scale.
        scale = max(grad.abs().max().item(), 1e-2)
        assert (found - grad).abs().max() < 1e-5 * scale, name


@pytest.mark.skipif("native" not in BACKENDS["strided_conv"]["cpu"], reason="the compiled module was not built")
def test_frames_that_no_window_sees_have_gradients_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_BLOCK_NUMBERS", 1)
    # The last of the lower layer's 17 blocks lies between two windows of the upper layer.
    x, bias = torch.randn(272, 2, requires_grad=True), torch.randn(3, requires_grad=True)
    layers = [StridedConvLayer(torch.randn(3, 2, 1), 1, bias), StridedConvLayer(torch.randn(4, 3, 1), 17)]
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        out, _ = strided_conv_stack(x, layers, layout_of((272,)), backend="native")
        grad_x, grad_bias = gradients(out, [x, bias])
    finally:
        torch.use_deterministic_algorithms(False)
    assert grad_bias.isfinite().all()
    assert torch.equal(grad_x[256:], torch.zeros(16, 2))


@EVERY_IMPLEMENTATION
def test_any_strides_of_the_arguments(backend: str, device: str) -> None:
    inputs = cast(make_stack("odd"), torch.float32, device)
    strided = {name: torch.stack([tensor, -tensor], -1)[..., 0] for name, tensor in inputs.items()}
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    outs = run_stack("odd", inputs, backend), run_stack("odd", strided, backend)
    results = [[out, *gradients(out, list(inputs.values()))] for out in outs]
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("case", STACKS)
@pytest.mark.parametrize(("backend", "device"), implementations("strided_conv", compiled_only=True))
def test_same_bits_every_time(backend: str, device: str, case: str) -> None:
    if backend == "triton" and device == "cpu":
        pytest.skip("Triton's interpreter cannot have races; for GPUs see test_strided_conv_kernels.py")
    inputs = cast(make_stack(case), torch.float32, device)
    runs = []
    for _ in range(3):
        out = run_stack(case, inputs, backend)
        runs.append([out, *gradients(out, list(inputs.values()))])
    for again in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(runs[0], again, strict=True))


def test_autocast_reaches_the_arguments_and_not_the_op() -> None:
    inputs = make_inputs("first_layer")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run("first_layer", inputs)
    assert out.dtype == torch.bfloat16
    expected = run("first_layer", inputs | {"x": inputs["x"].bfloat16(), "weight": inputs["weight"].bfloat16()})
    assert torch.equal(out, expected)


def test_rejects_bad_stacks() -> None:
    layout = layout_of((12, 8))
    with pytest.raises(ValueError, match="layers: expected at least one"):
        strided_conv_stack(X, [], layout)
    with pytest.raises(ValueError, match=r"layers\[1\].weight: expected \(C_out, 6, K\)"):
        strided_conv_stack(X, [StridedConvLayer(WEIGHT, 2), StridedConvLayer(WEIGHT, 2)], layout)

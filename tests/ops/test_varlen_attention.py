import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn.attention import varlen
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

from fastssl.kernels import dispatch
from fastssl.kernels.randomness import kept_fraction
from fastssl.kernels.varlen_attention import reference
from fastssl.ops import varlen_attention
from fastssl.packing import Layout, Packed
from tests.ops.common import LENGTHS, check_against_reference, gradients, implementations, layout_of, normal, randn
from tests.ops.standard import Inputs, Mates, Standard

SEED = torch.tensor(-4242424242424242)

#: Name -> (lengths, H, E, options); "reach" is R of the distance bias.
CASES: dict[str, tuple[tuple[int, ...], int, int, dict[str, Any]]] = {
    "plain": (LENGTHS["odd"], 3, 8, {}),
    "one_long": (LENGTHS["one_long"], 2, 16, {}),
    "single_frame": (LENGTHS["single_frame"], 2, 8, {}),
    "with_empty": (LENGTHS["with_empty"], 2, 8, {}),
    "empty_batch": (LENGTHS["empty_batch"], 2, 8, {}),
    "scale": ((9, 14), 1, 5, {"scale": 0.7}),
    "distance_bias": (LENGTHS["odd"], 3, 8, {"reach": 50}),
    "gated": (LENGTHS["with_empty"], 3, 8, {"reach": 4, "gated": True}),
    "dropout": (LENGTHS["one_long"], 2, 8, {"dropout_p": 0.3}),
    "everything": ((9, 14), 3, 8, {"scale": 0.5, "reach": 4, "gated": True, "dropout_p": 0.3}),
    # Two heads: with one, the bias has only 81 gradients. Plain PyTorch's error in them sets the tolerance, and would
    # too often be small by luck.
    "many_blocks": ((150, 3, 70), 2, 20, {"reach": 40, "gated": True, "dropout_p": 0.2}),
    "everything_empty": (LENGTHS["empty_batch"], 3, 8, {"reach": 4, "gated": True, "dropout_p": 0.3}),
}
#: Cases for the CPU kernel, whose blocks have 48 queries and 192 keys in tiles of 6 by 16. Lengths and widths lie just
#: below, at and just above these sizes. "long" uses every option, on two blocks of keys and with distances beyond R.
BLOCK_CASES: dict[str, tuple[tuple[int, ...], int, int, dict[str, Any]]] = {
    "queries": ((47, 48, 49), 2, 64, {}),
    "keys": ((191, 192, 193), 1, 64, {"reach": 200, "gated": True}),
    "widths_odd": ((97, 5), 2, 33, {"reach": 30, "dropout_p": 0.2}),
    "widths_wide": ((50, 17), 1, 130, {"scale": -0.1}),
    "chunks": ((385,), 1, 16, {"reach": 3}),
    "long": ((300, 1), 2, 64, {"reach": 100, "gated": True, "dropout_p": 0.1}),
}
#: Small cases for gradcheck, which perturbs every number of the inputs.
SMALL: dict[str, tuple[tuple[int, ...], int, int, dict[str, Any]]] = {
    "small, plain": ((3, 1, 0, 2), 2, 2, {}),
    "small, dropout": ((3, 2), 2, 2, {"dropout_p": 0.4}),
    "small, distance_bias": ((3, 2), 2, 2, {"reach": 1}),
    "small, everything": ((4, 0, 1), 2, 2, {"reach": 2, "gated": True, "dropout_p": 0.4}),
}
ALL_CASES = CASES | BLOCK_CASES | SMALL


def make_inputs(case: str, dtype: torch.dtype = torch.float32) -> Inputs:
    lengths, heads, width, options = ALL_CASES[case]
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    inputs = {name: normal(sum(lengths), heads, width) for name in ("q", "k", "v")}
    if "dropout_p" in options:
        inputs["seed"] = SEED
    if "reach" in options:
        inputs["distance_bias"] = normal(heads, 2 * options["reach"] + 1)
    if "gated" in options:
        inputs["gate"] = 1 + normal(sum(lengths), heads)
    return inputs


def run(case: str, inputs: Inputs, backend: str | None = None) -> Tensor:
    lengths, _, _, options = ALL_CASES[case]
    return varlen_attention(
        inputs["q"],
        inputs["k"],
        inputs["v"],
        layout_of(lengths, inputs["q"].device.type),
        scale=options.get("scale"),
        dropout_p=options.get("dropout_p", 0.0),
        seed=inputs.get("seed"),
        distance_bias=inputs.get("distance_bias"),
        gate=inputs.get("gate"),
        backend=backend,
    )


def serves(case: str, backend: str, device: str, dtype: torch.dtype) -> bool:
    lengths, _, width, options = ALL_CASES[case]
    if backend != "torch":
        return backend != "triton" or dtype != torch.float64
    halves = dtype.itemsize == 2 and width % 8 == 0
    return halves and sum(lengths) > 0 and not options.keys() & {"scale", "reach", "dropout_p"}


def frames(count: int) -> Inputs:
    packed = {name: randn(count, 1, 32) + i for i, name in enumerate("qkv")}
    return packed | {"distance_bias": randn(1, 9), "gate": randn(count, 1), "seed": torch.tensor(3)}


def call(inputs: dict[str, Any], layout: Layout, backend: str) -> Tensor:
    return varlen_attention(**inputs, layout=layout, dropout_p=0.1, backend=backend)


def make_batch(lengths: Sequence[int], heads_and_width: tuple[int, int], dtype: torch.dtype) -> Inputs:
    packed = (sum(lengths), *heads_and_width)
    inputs = normal(q=packed, k=packed, v=packed, distance_bias=(heads_and_width[0], 21))
    return inputs | {name: inputs[name].to(dtype) for name in ("q", "k", "v")}


def attend_batch(inputs: Inputs, layout: Layout, backend: str) -> list[Packed]:
    q, k, v, bias = inputs.values()
    given = None if backend == "torch" else bias
    return [Packed(varlen_attention(q, k, v, layout, distance_bias=given, backend=backend), layout)]


Q, K, V, BIAS = *(torch.randn(20, 2, 4) for _ in range(3)), torch.randn(2, 5)
STANDARD = Standard(
    op="varlen_attention",
    cases=CASES,
    make_inputs=make_inputs,
    run=run,
    serves=serves,
    # PyTorch's backward is less precise than the reference, so it is tested by gradcheck and against SDPA instead.
    backward_of_others=("torch",),
    mates={
        "drawn": Mates(
            make=make_batch,
            call=attend_batch,
            lengths=st.lists(st.integers(0, 200), min_size=1, max_size=6),
            drawn=(
                st.sampled_from([(1, 1), (2, 13), (4, 16)]),
                st.sampled_from([torch.float32, torch.bfloat16]),
            ),
            shared=("distance_bias",),
            examples=25,
            on=lambda backend, device: backend != "torch",
            shorten=lambda lengths: [length // 5 for length in lengths],
            tolerance=(1e-2, 1e-2),
        ),
        "of_torch": Mates(
            make=make_batch,
            call=attend_batch,
            lengths=st.lists(st.integers(1, 201), min_size=1, max_size=6),
            drawn=(st.just((4, 16)), st.just(torch.bfloat16)),
            shared=("distance_bias",),
            examples=25,
            on=lambda backend, device: backend == "torch",
            tolerance=(1e-2, 1e-2),
        ),
    },
    good={"q": Q, "k": K, "v": V, "layout": layout_of((12, 8))},
    bad={
        r"q: expected \(20, H, E\)": {"q": torch.randn(19, 2, 4)},
        r"q: expected .* got \(20, 8\)": {"q": torch.randn(20, 8)},
        r"k: expected \(20, 2, 4\)": {"k": torch.randn(20, 1, 4)},
        "v: expected .* torch.float32 like q, got .* torch.float64": {"v": V.double()},
        "dropout_p: must be": {"dropout_p": 1.0},
        "randomness: must be from 1 to 2, got 0": {"randomness": 0},
        r"seed: expected \(\) torch.int64": {"dropout_p": 0.1, "seed": torch.tensor([1])},
        "seed: expected .* got .* torch.int32": {"dropout_p": 0.1, "seed": torch.tensor(1, dtype=torch.int32)},
        r"distance_bias: expected \(2, 2R\+1\), got \(2, 6\)": {"distance_bias": torch.randn(2, 6)},
        r"distance_bias: expected \(2, 2R\+1\), got \(3, 5\)": {"distance_bias": torch.randn(3, 5)},
        "gate: given, but": {"gate": torch.ones(20, 2)},
        r"gate: expected \(20, 2\)": {"distance_bias": BIAS, "gate": torch.ones(2, 20)},
        "backend='torch': .*no distance bias.*available: .*reference": {"distance_bias": BIAS, "backend": "torch"},
        "backend='torch': .*no dropout.*available: .*reference": {"dropout_p": 0.1, "backend": "torch"},
        "backend='triton': .*E up to 128, not 132.*available": dict.fromkeys("qkv", torch.randn(20, 2, 132))
        | {"backend": "triton"},
        "backend='triton': .*float32, float16 and bfloat16, not torch.float64.*available": dict.fromkeys(
            "qkv", Q.double()
        )
        | {"backend": "triton"},
        "backend='warp': not available for varlen_attention on cpu": {"backend": "warp"},
    },
    frames=frames,
    call=call,
    gradcheck_cases=SMALL,
    compile_cases=("everything", "plain"),
    opcheck_cases=("small, plain", "small, everything", "empty_batch", "everything_empty"),
)


native_cpu = pytest.mark.skipif(
    "native" not in dispatch.BACKENDS["varlen_attention"]["cpu"], reason="the compiled CPU module was not built"
)


@native_cpu
@pytest.mark.parametrize("case", BLOCK_CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blocks_of_the_cpu_kernel(case: str, dtype: torch.dtype) -> None:
    check_against_reference(
        lambda inputs, name: run(case, inputs, name),
        make_inputs(case),
        backend="native",
        device="cpu",
        dtype=dtype,
        backward=True,
    )


@native_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_matter(dtype: torch.dtype) -> None:
    """With more threads than heads, long sequences are split into tasks, with a different backward pass."""
    lengths, heads, width = (900, 31), 2, 24
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), heads, width, generator=generator, dtype=dtype) for _ in range(3))
    bias = torch.randn(heads, 101, generator=generator)
    gate = torch.randn(sum(lengths), heads, generator=generator)
    inputs = [x.requires_grad_() for x in (q, k, v, bias, gate)]
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 7):
            torch.set_num_threads(count)
            options: dict[str, Any] = {"dropout_p": 0.1, "seed": SEED, "distance_bias": bias, "gate": gate}
            out = varlen_attention(q, k, v, layout_of(lengths), **options, backend="native")
            results.append((out, *gradients(out, inputs)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@native_cpu
def test_a_single_frame_has_no_gradient() -> None:
    q, k, v = (torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(3))
    grad_q, grad_k, grad_v = gradients(varlen_attention(q, k, v, layout_of((1,)), backend="native"), [q, k, v])
    assert not grad_q.any()
    assert not grad_k.any()
    assert grad_v.all()


@pytest.mark.parametrize("namespace", ["fastssl_native", "fastssl_triton"])
@pytest.mark.parametrize("case", ["plain", "everything", "empty_batch"])
def test_fake_kernels_have_the_shapes_of_the_reference(case: str, namespace: str) -> None:
    inputs, op = make_inputs(case, torch.bfloat16), getattr(torch.ops, namespace)
    lengths, heads, _, options = ALL_CASES[case]
    layout, dropout_p = layout_of(lengths), options.get("dropout_p", 0.0)
    with FakeTensorMode() as mode:
        q, k, v, cu_seqlens = (mode.from_tensor(x) for x in (inputs["q"], inputs["k"], inputs["v"], layout.cu_seqlens))
        seed, bias, gate = (
            mode.from_tensor(inputs[name]) if name in inputs else None for name in ("seed", "distance_bias", "gate")
        )
        rest = (cu_seqlens, layout.max_length, 0.5, dropout_p, 2, seed, bias, gate)
        out, logsumexp = op.varlen_attention_fwd(q, k, v, *rest)
        grads = op.varlen_attention_bwd(torch.empty_like(out), q, k, v, out, logsumexp, *rest)
    expected = run(case, inputs)
    assert (out.shape, out.dtype) == (expected.shape, expected.dtype)
    assert (logsumexp.shape, logsumexp.dtype) == ((heads, sum(lengths)), torch.float32)
    for grad, x in zip(grads, (q, k, v, bias, gate), strict=True):
        assert grad.shape == ((0,) if x is None else x.shape)
        assert grad.dtype == torch.bfloat16


@pytest.mark.parametrize(("backend", "device"), implementations("varlen_attention"))
def test_equals_sdpa_of_each_sequence(backend: str, device: str) -> None:
    dtype, tolerance = (torch.bfloat16, 2e-2) if device == "cuda" else (torch.float32, 1e-5)
    inputs = {name: tensor.to(device, dtype).requires_grad_() for name, tensor in make_inputs("plain").items()}
    expected = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in qkv)).transpose(0, 1)
        for qkv in zip(*(inputs[name].split(LENGTHS["odd"]) for name in ("q", "k", "v")), strict=True)
    ]
    out = run("plain", inputs, backend)
    torch.testing.assert_close(out, torch.cat(expected), rtol=tolerance, atol=tolerance)
    grads, expected_grads = (gradients(x, list(inputs.values())) for x in (out, torch.cat(expected)))
    torch.testing.assert_close(grads, expected_grads, rtol=tolerance, atol=tolerance)


def test_gated_distance_bias_is_that_of_wavlm() -> None:
    # Imported here, because other tests import this module in processes that would wait seconds for Transformers.
    from transformers.models.wavlm.modeling_wavlm import WavLMAttention

    torch.manual_seed(0)
    lengths, heads, width, reach = (90, 7, 41), 4, 8, 40
    wavlm = WavLMAttention(embed_dim=heads * width, num_heads=heads, num_buckets=16, max_distance=reach)
    # The middle row of a (2R+1, 2R+1) bias contains every distance from -R to R.
    distance_bias = wavlm.compute_bias(2 * reach + 1, 2 * reach + 1)[:, reach].detach()
    q, k, v = (torch.randn(sum(lengths), heads, width) for _ in range(3))
    gate = 1 + torch.randn(sum(lengths), heads)
    expected = []
    for query, key, value, factor in zip(*(x.split(lengths) for x in (q, k, v, gate)), strict=True):
        dense = wavlm.compute_bias(len(query), len(query)) * factor.t().unsqueeze(2)
        query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        expected.append(F.scaled_dot_product_attention(query, key, value, attn_mask=dense).transpose(0, 1))
    out = varlen_attention(q, k, v, layout_of(lengths), distance_bias=distance_bias, gate=gate)
    torch.testing.assert_close(out, torch.cat(expected), rtol=1e-5, atol=1e-5)


def kept(
    lengths: tuple[int, ...], heads: int, dropout_p: float, seed: Tensor | None, randomness: int = 2
) -> list[Tensor]:
    """Return each sequence's (T, H, T) dropout mask, recovered with equal logits and with unit vectors as values."""
    zeros = torch.zeros(sum(lengths), heads, max(lengths))
    values = torch.cat([torch.eye(length, max(lengths)) for length in lengths]).unsqueeze(1).expand_as(zeros)
    out = varlen_attention(
        zeros, zeros, values, layout_of(lengths), dropout_p=dropout_p, seed=seed, randomness=randomness
    )
    masks = []
    for weights, length in zip(out.split(lengths), lengths, strict=True):
        weights = weights[:, :, :length] * length * kept_fraction(dropout_p, randomness)
        assert torch.all(torch.isclose(weights, weights.round(), atol=1e-5))
        masks.append(weights.round().bool())
    return masks


def keeps(seed: int, row: int, head: int, key: int, dropout_p: float, randomness: int) -> bool:
    """Compute the hash that the op's README.md specifies, in Python integers."""

    def product(x: int) -> int:
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        return (x ^ x >> 13) * 0xC2B2AE35 % 2**32

    def mix(x: int) -> int:
        return product(x) ^ product(x) >> 16

    state = mix(seed % 2**32 ^ 0x9E3779B9)
    for word in ((seed >> 32) % 2**32, row, head):
        state = mix(state ^ word)
    if randomness == 1:
        return mix(state ^ key) >= int(dropout_p * 2**32)
    second = key // 8 % 2
    shared = product(state ^ (key - 8 * second))
    draw = shared >> 16 if second else ((shared >> 16) + shared) % 2**16
    return draw >= min(math.floor(dropout_p * 2**16 + 0.5), 2**16 - 1)


@pytest.mark.parametrize("randomness", [1, 2])
@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 1234567890123456789])
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.999])
def test_dropout_keeps_what_the_hash_says(seed: int, dropout_p: float, randomness: int) -> None:
    lengths, heads = (5, 0, 19), 3
    masks = kept(lengths, heads, dropout_p, torch.tensor(seed), randomness)
    for begin, length, mask in zip((0, 5, 5), lengths, masks, strict=True):
        for row, head, key in torch.cartesian_prod(*(torch.arange(size) for size in (length, heads, length))).tolist():
            assert mask[row, head, key] == keeps(seed, begin + row, head, key, dropout_p, randomness)


@pytest.mark.parametrize("randomness", [1, 2])
def test_the_compiler_drops_the_same(randomness: int) -> None:
    rows = torch.arange(1000, 1037)

    def mask(seed: Tensor) -> Tensor:
        return reference.dropout_mask(seed, rows, heads=3, keys=41, dropout_p=0.3, randomness=randomness)

    assert torch.equal(torch.compile(mask, fullgraph=True)(SEED), mask(SEED))


@pytest.mark.parametrize(("randomness", "dropped"), [(1, 0.1), (2, 6554 / 2**16)])
@pytest.mark.parametrize(("backend", "device"), implementations("varlen_attention"))
def test_weights_are_scaled_by_the_probability_of_keeping_one(
    backend: str, device: str, randomness: int, dropped: float
) -> None:
    """Under version 2, that is a multiple of 2^-16."""
    if (backend, device) == ("torch", "cuda"):
        pytest.skip("PyTorch's kernel has no dropout with a reproducible mask")
    zeros, ones = (torch.full((300, 1, 16), value, device=device) for value in (0.0, 1.0))
    seed, rows = torch.tensor(1, device=device), torch.arange(300, device=device)
    keep = reference.dropout_mask(seed, rows, heads=1, keys=300, dropout_p=0.1, randomness=randomness)
    out = varlen_attention(
        *(zeros, zeros, ones, layout_of((300,), device)),
        dropout_p=0.1,
        seed=seed,
        randomness=randomness,
        backend=backend,
    )
    torch.testing.assert_close(out[:, 0, 0].double(), keep[0].double().mean(1) / (1 - dropped), rtol=2e-6, atol=0)


@pytest.mark.parametrize("randomness", [1, 2])
def test_dropout_drops_as_often_as_asked_and_nothing_together(randomness: int) -> None:
    (mask,) = kept((400,), 4, 0.2, SEED, randomness)
    dropped = 1 - mask.double()
    assert abs(dropped.mean() - 0.2) < 5 * 0.4 / dropped.numel() ** 0.5
    for dims in ((0, 1), (0, 2), (1, 2)):  # equally often for every key, head and row
        share = dropped.mean(dims)
        assert (share - 0.2).abs().max() < 5 * 0.4 / (dropped.numel() / share.numel()) ** 0.5
    centred = (dropped - 0.2) / 0.4
    other = 1 - kept((400,), 4, 0.2, SEED + 1, randomness)[0].double()
    same_hash = centred.unflatten(2, (-1, 2, 8)).flip(3).flatten(2)  # keys that share a hash under version 2
    for neighbour in (
        *(centred.roll(1, dim) for dim in range(3)),
        centred.roll((1, 1), (0, 2)),
        same_hash,
        same_hash.roll(1, 0),
        (other - 0.2) / 0.4,
    ):
        assert (centred * neighbour).mean().abs() < 5 / dropped.numel() ** 0.5


def test_dropout_of_a_row_does_not_depend_on_later_sequences() -> None:
    alone, together = kept((30,), 2, 0.3, SEED), kept((30, 12, 40), 2, 0.3, SEED)
    assert torch.equal(alone[0], together[0])
    assert not torch.equal(together[0][:12, :, :12], together[1])


def test_seed_comes_from_the_generator_when_none_is_given() -> None:
    torch.manual_seed(7)
    first, second = kept((20,), 2, 0.5, None), kept((20,), 2, 0.5, None)
    torch.manual_seed(7)
    again = kept((20,), 2, 0.5, None)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], second[0])


def test_checkpointing_repeats_the_mask() -> None:
    inputs = make_inputs("dropout")
    q, k, v = (inputs[name].requires_grad_() for name in ("q", "k", "v"))
    layout = layout_of(LENGTHS["one_long"])

    def attend(q: Tensor) -> Tensor:
        return varlen_attention(q, k, v, layout, dropout_p=0.3)

    torch.manual_seed(3)
    direct = torch.autograd.grad(attend(q).square().sum(), (q, v))
    torch.manual_seed(3)
    recomputed = torch.autograd.grad(checkpoint(attend, q, use_reentrant=False).square().sum(), (q, v))
    assert all(torch.equal(a, b) for a, b in zip(direct, recomputed, strict=True))


@pytest.mark.parametrize("case", ["plain", "everything"])
def test_low_precision_is_rounded_once(case: str) -> None:
    inputs = make_inputs(case)
    rounded = {name: x.bfloat16() if x.is_floating_point() else x for name, x in inputs.items()}
    precise = {name: x.float() if x.is_floating_point() else x for name, x in rounded.items()}
    assert torch.equal(run(case, rounded, "reference"), run(case, precise, "reference").bfloat16())


@pytest.mark.parametrize("case", ["plain", "everything"])
def test_autocast_reaches_the_arguments_and_not_the_op(case: str) -> None:
    inputs = make_inputs(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run(case, inputs)
    assert out.dtype == torch.bfloat16
    rounded = {name: inputs[name].bfloat16() for name in ("q", "k", "v")}
    assert torch.equal(out, run(case, inputs | rounded))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"dtype": torch.float32}, "supports float16 and bfloat16"),
        ({"width": 20}, "multiple of 8"),
        ({"width": 264}, "multiple of 8"),
        ({"scale": 0.5}, "default scale"),
        ({"lengths": ()}, "empty batch"),
        ({"capability": (7, 5)}, "compute capability"),
    ],
)
def test_cuda_calls_varlen_attn_where_it_serves(
    change: dict[str, Any], message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Needs no GPU: fake CUDA tensors get as far as PyTorch's fake kernel."""
    good: dict[str, Any] = {"dtype": torch.bfloat16, "width": 64, "lengths": (10, 0, 20), "capability": (8, 0)}
    case = good | change
    scale = case.get("scale")
    called = []

    def spy(*arguments: Any) -> Any:
        called.append(arguments)
        return varlen_attn(*arguments)

    major, minor = case["capability"]
    properties = SimpleNamespace(major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(varlen, "varlen_attn", spy)
    monkeypatch.setattr(dispatch, "DEFAULT_BACKEND", None)
    with FakeTensorMode():
        layout = layout_of(case["lengths"], "cuda")
        q = torch.empty(layout.total, 2, case["width"], dtype=case["dtype"], device="cuda")
        out = varlen_attention(q, q, q, layout, scale=scale)
        assert (out.shape, out.dtype, out.device) == (q.shape, q.dtype, q.device)
        if message is not None:
            with pytest.raises(ValueError, match=f"backend='torch': .*{message}.*available: reference"):
                varlen_attention(q, q, q, layout, scale=scale, backend="torch")
    assert bool(called) == (message is None)


@pytest.mark.parametrize(
    ("width", "biased", "expected"),
    [(64, False, "triton"), (128, True, "triton"), (256, False, "torch"), (256, True, "reference")],
)
def test_a_gpu_with_triton_takes_triton_up_to_its_widest_head(
    width: int, biased: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The README says so: PyTorch's kernel serves only what ours cannot."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=9, minor=0))
    monkeypatch.setattr(dispatch, "DEFAULT_BACKEND", None)
    monkeypatch.setitem(dispatch.BACKENDS["varlen_attention"], "cuda", ("triton", "torch", "reference"))
    chosen = []
    choose = dispatch.Op.choose

    def spy(op: Any, *arguments: Any) -> str:
        chosen.append(choose(op, *arguments))
        return chosen[-1]

    monkeypatch.setattr(dispatch.Op, "choose", spy)
    with FakeTensorMode():
        layout = layout_of((10, 20), "cuda")
        q = torch.empty(30, 2, width, dtype=torch.bfloat16, device="cuda")
        bias = torch.empty(2, 5, device="cuda") if biased else None
        varlen_attention(q, q, q, layout, distance_bias=bias)
    assert chosen == [expected]

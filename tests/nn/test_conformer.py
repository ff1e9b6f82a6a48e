"""Test that rotary positions and the Conformer equal the definition, and that nothing crosses utterances' borders."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.nn.conformer import Conformer, ConformerLayer, ConvolutionModule, RotarySelfAttention
from fastssl.nn.rotary import rotate, rotation
from fastssl.packing import Layout, Packed


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def make_conformer(*, layer_drop: float = 0.0, **dropouts: float) -> Conformer:
    torch.manual_seed(0)
    layers = [ConformerLayer(24, 40, 2, kernel=5, **({"dropout": 0.0} | dropouts)) for _ in range(6)]
    return Conformer(layers, head_width=12, layer_drop=layer_drop)


def test_products_of_rotated_frames_depend_on_the_distance_alone() -> None:
    turn = rotation(Layout.from_lengths([200]), 16)
    q, k = randn(2, 1, 3, 16).unbind(0)
    scores = torch.einsum("qhe,khe->hqk", rotate(q.expand(200, -1, -1), turn), rotate(k.expand(200, -1, -1), turn))
    for distance in (-150, -3, 0, 1, 60):
        diagonal = scores.diagonal(distance, 1, 2)
        torch.testing.assert_close(diagonal, diagonal[:, :1].expand_as(diagonal), rtol=0, atol=1e-4)
    assert (scores[:, 0, 1] - scores[:, 0, 2]).abs().min() > 1e-2, "the distance makes no difference"


def test_rotation_is_that_of_the_paper_and_begins_anew_in_each_sequence() -> None:
    layout = Layout.from_lengths([5, 0, 300])
    x = randn(305, 2, 8)
    found = rotate(x, rotation(layout, 8))
    positions = torch.cat([torch.arange(5), torch.arange(300)]).double()
    turns = torch.polar(torch.ones(305, 4).double(), torch.outer(positions, 10000.0 ** (-torch.arange(4) / 4)))
    pairs = torch.complex(x[..., :4].double(), x[..., 4:].double()) * turns.unsqueeze(1)
    torch.testing.assert_close(found, torch.cat([pairs.real, pairs.imag], 2).float(), rtol=0, atol=1e-5)
    assert torch.equal(found[:5], rotate(x[:5], rotation(Layout.from_lengths([5]), 8)))
    half = rotate(x.bfloat16(), rotation(layout, 8))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), found, rtol=2e-2, atol=2e-2)


def test_layer_is_the_definition() -> None:
    torch.manual_seed(0)
    layer = ConformerLayer(24, 40, 2, kernel=5, dropout=0.1, activation_dropout=0.1, attention_dropout=0.1).eval()
    layout = Layout.from_lengths([30, 9])
    x = randn(39, 24)

    def half_feed_forward(part: torch.nn.Module, frames: Tensor) -> Tensor:
        inner = F.silu(F.linear(frames, part.intermediate_dense.weight, part.intermediate_dense.bias))  # type: ignore[union-attr, arg-type]
        return 0.5 * F.linear(inner, part.output_dense.weight, part.output_dense.bias)  # type: ignore[union-attr, arg-type]

    for found, frames in zip(layer(x, layout).split([30, 9]), x.split([30, 9]), strict=True):
        frames = frames + half_feed_forward(layer.first_feed_forward, layer.first_norm(frames))
        turn = rotation(Layout.from_lengths([len(frames)]), 12)
        attention = layer.attention
        q, k, v = attention.qkv_proj(layer.attention_norm(frames)).view(-1, 3, 2, 12).unbind(1)
        q, k, v = (y.transpose(0, 1) for y in (rotate(q, turn), rotate(k, turn), v))
        heads = F.scaled_dot_product_attention(q, k, v)
        frames = frames + attention.out_proj(heads.transpose(0, 1).flatten(1))
        module = layer.convolution
        gated = F.glu(module.gated_proj(layer.convolution_norm(frames)))
        mixed = F.silu(module.layer_norm(module.depthwise_conv(gated.t()[None])[0].t()))
        frames = frames + module.out_proj(mixed)
        frames = frames + half_feed_forward(layer.second_feed_forward, layer.second_norm(frames))
        torch.testing.assert_close(found, layer.final_norm(frames), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", ["convolution", "attention", "layer"])
def test_nothing_crosses_the_borders_of_utterances(block: str) -> None:
    torch.manual_seed(0)
    layout = Layout.from_lengths([9, 5, 7])
    x = randn(21, 24).requires_grad_()
    turn = rotation(layout, 12)
    out = {
        "convolution": lambda: ConvolutionModule(24, kernel=31, eps=1e-5)(x, layout),
        "attention": lambda: RotarySelfAttention(24, 2, dropout=0.0)(x, layout, turn),
        "layer": lambda: ConformerLayer(24, 40, 2, kernel=31, dropout=0.0)(x, layout),
    }[block]()
    weights = torch.sin(torch.arange(5 * 24)).view(5, 24)
    (grad,) = torch.autograd.grad((out[9:14] * weights).sum(), x)
    assert grad[:9].eq(0).all()
    assert grad[14:].eq(0).all()
    assert grad[9:14].ne(0).all()


def test_layer_drop_follows_its_generator_and_rests_in_evaluation() -> None:
    conformer = make_conformer(layer_drop=0.5)
    frames = Packed(randn(20, 24), Layout.from_lengths([12, 8]))

    def skipped() -> list[bool]:
        states = conformer(frames, layer_drop=torch.Generator().manual_seed(0))
        return [torch.equal(a.values, b.values) for a, b in itertools.pairwise(states)]

    first = skipped()
    assert len(first) == 6
    assert first == skipped()
    assert 0 < sum(first) < 6
    with torch.device("meta"):  # as after `torch.set_default_device`
        assert first == skipped()
    conformer.eval()
    assert not any(skipped())


@pytest.mark.parametrize("option", ["dropout", "attention_dropout", "activation_dropout"])
def test_dropouts_act_in_training_alone(option: str) -> None:
    conformer = make_conformer(**{option: 0.5})
    frames = Packed(randn(20, 24), Layout.from_lengths([12, 8]))
    assert not torch.equal(conformer(frames)[-1].values, conformer(frames)[-1].values)
    conformer.eval()
    assert torch.equal(conformer(frames)[-1].values, conformer(frames)[-1].values)


def test_rejects_bad_input() -> None:
    with pytest.raises(ValueError, match=r"heads: .* must be an even whole number, got 24 / 8"):
        ConformerLayer(24, 40, 8, kernel=5, dropout=0.0)
    with pytest.raises(ValueError, match="kernel: must be odd"):
        ConformerLayer(24, 40, 2, kernel=4, dropout=0.0)
    with pytest.raises(ValueError, match=r"width: .* must be even, got 7"):
        rotation(Layout.from_lengths([3]), 7)

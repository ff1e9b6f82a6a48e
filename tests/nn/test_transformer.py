import itertools

import pytest
import torch

from fastssl.nn.feature_extractor import scale_gradient
from fastssl.nn.quantizer import GumbelQuantizer
from fastssl.nn.random import gumbel
from fastssl.nn.transformer import ConvolutionalPositionalEmbedding, Transformer
from fastssl.packing import Layout, Packed


def make_transformer(**changes: object) -> Transformer:
    torch.manual_seed(0)
    options = {
        "positional_kernel": 8,
        "positional_groups": 4,
        "pre_norm": False,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "layer_drop": 0.0,
        "eps": 1e-5,
    }
    return Transformer(6, 16, 32, 2, **(options | changes))  # type: ignore[arg-type]


def test_positional_convolution_does_not_leak_across_borders() -> None:
    torch.manual_seed(0)
    embedding = ConvolutionalPositionalEmbedding(16, kernel=8, groups=4)
    layout = Layout.from_lengths([9, 5, 7])
    x = torch.randn(21, 16, requires_grad=True)
    out = embedding(x, layout)
    (grad,) = torch.autograd.grad(out[9:14].square().sum(), x)
    assert grad[:9].eq(0).all()
    assert grad[14:].eq(0).all()
    assert grad[9:14].ne(0).all()


def test_layer_drop_follows_its_generator_and_rests_in_evaluation() -> None:
    transformer = make_transformer(layer_drop=0.5)
    frames = Packed(torch.randn(20, 16), Layout.from_lengths([12, 8]))

    def skipped() -> list[bool]:
        states = transformer(frames, layer_drop=torch.Generator().manual_seed(0))
        return [torch.equal(a.values, b.values) for a, b in itertools.pairwise(states)]

    first = skipped()
    assert first == skipped()
    assert 0 < sum(first) < 6
    transformer.eval()
    assert not any(skipped())


def test_hidden_states_are_inputs_of_layers_and_the_output() -> None:
    transformer = make_transformer(pre_norm=True).eval()
    frames = Packed(torch.randn(20, 16), Layout.from_lengths([12, 8]))
    states = transformer(frames)
    assert len(states) == 7
    again = transformer.layers[0](states[0].values, frames.layout)
    assert torch.equal(again, states[1].values)


def test_quantizer_gives_whole_codes_and_a_gradient() -> None:
    torch.manual_seed(0)
    quantizer = GumbelQuantizer(10, groups=2, codes=5, width=8)
    x = torch.randn(30, 10, requires_grad=True)
    noise = gumbel(torch.arange(30).unsqueeze(1), torch.arange(10), stream=3)
    quantized = quantizer(x, temperature=2.0, noise=noise)
    book = quantizer.codevectors.view(2, 5, 4)
    expected = torch.stack([book[group, quantized.codes[:, group]] for group in range(2)], 1).flatten(1)
    assert torch.equal(quantized.values, expected)
    logits = quantizer.weight_proj(x).view(30, 2, 5)
    assert torch.equal(quantized.codes, (logits + noise.view(30, 2, 5)).argmax(-1))
    (grad,) = torch.autograd.grad(quantized.values.square().sum(), x)
    assert grad.abs().sum() > 0


@pytest.mark.parametrize("factor", [0.0, 0.1, 1.0])
def test_scale_gradient(factor: float) -> None:
    x = torch.randn(5, requires_grad=True)
    y = scale_gradient(x * 2, factor)
    assert torch.equal(y, x * 2)
    if factor == 0.0:
        assert not y.requires_grad
        return
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, torch.full_like(x, 2 * factor))


def test_rejects_bad_input() -> None:
    with pytest.raises(ValueError, match=r"heads: must divide the width of .*, got 3"):
        Transformer(
            1,
            16,
            32,
            3,
            positional_kernel=8,
            positional_groups=4,
            pre_norm=False,
            dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
            layer_drop=0.0,
            eps=1e-5,
        )
    with pytest.raises(ValueError, match="width: 7 is not divisible"):
        GumbelQuantizer(10, groups=2, codes=5, width=7)

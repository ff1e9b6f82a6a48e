"""Test encoders under tools that look into models: dynamic quantisation, and hooks on the convolutions."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastssl import Packed
from fastssl.models.encoder import Encoder, EncoderConfig
from fastssl.nn import FeatureExtractor, with_plain_linears


def waveforms() -> Packed:
    generator = torch.Generator().manual_seed(0)
    return Packed.pack([torch.randn(length, 1, generator=generator) for length in (5000, 900)])


def quantised(model: nn.Module) -> tuple[Any, int]:
    """Quantise as scripts do; return the model, and how many of its linear layers were changed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        out = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    return out, sum(
        "quantized" in type(module).__module__ for module in out.modules()
    ) // 2  # each has a part with its parameters


@torch.no_grad()
def test_an_encoder_with_plain_linear_layers_can_be_quantised() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "conv_dim": (16,) * 7}
    positions: dict[str, Any] = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    encoder = Encoder(EncoderConfig(intermediate_size=64, **sizes, **positions)).eval()
    assert quantised(encoder)[1] == 0
    expected = encoder(waveforms()).features.values
    names = list(encoder.state_dict())
    assert with_plain_linears(encoder) is encoder
    assert list(encoder.state_dict()) == names
    torch.testing.assert_close(encoder(waveforms()).features.values, expected)
    smaller, count = quantised(encoder)
    assert count == sum(type(module) is nn.Linear for module in encoder.modules()) > 6
    found = smaller(waveforms()).features.values
    assert not torch.equal(found, expected)
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()


def test_hooks_on_convolutions_run_or_are_named() -> None:
    extractor = FeatureExtractor([16] * 3, [10, 3, 2], [5, 2, 2], bias=False, norm="group")
    expected = extractor(waveforms())
    seen: list[Tensor] = []
    hook = extractor.conv_layers[1].register_forward_hook(lambda module, args, out: seen.append(out.values))
    found = extractor(waveforms())
    assert len(seen) == 1
    assert seen[0].shape[1] == 16
    torch.testing.assert_close(found.values, expected.values)
    assert found.layout.lengths == expected.layout.lengths
    hook.remove()
    extractor.get_submodule("conv_layers.1.conv").register_forward_hook(lambda *args: pytest.fail("called"))
    with pytest.warns(UserWarning, match="on the `conv` of a ConvLayer never runs"):
        extractor(waveforms())

"""Test that the functional layer fuses plain modules and calls replaced or hooked ones, in our own modules too."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastssl.models.encoder import Encoder, EncoderConfig
from fastssl.nn import functional
from fastssl.nn.transformer import Transformer
from fastssl.packing import Layout, Packed
from tests.interop.tiny_models import BUCKETS, LARGE, TINY, waveforms_of


class Twice(nn.Module):
    """A replacement for a module, as adapters are; it doubles the module's output."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = 2 * self.base(x)
        return out


X, Y = torch.randn(2, 40, 24, generator=torch.Generator().manual_seed(0)).unbind(0)
#: Name -> a call of a function with a module, and the module.
CALLS: dict[str, tuple[Callable[[nn.Module], Tensor], nn.Module]] = {
    "linear": (lambda module: functional.linear(module, X), nn.Linear(24, 16)),
    "norm": (lambda module: functional.add_and_norm(X, Y, module), nn.LayerNorm(24)),
    "norm of the sum": (lambda module: functional.sum_and_norm(X, Y, module, nn.Dropout(0.0))[1], nn.LayerNorm(24)),
    "dropout": (lambda module: functional.dropout(module, X), nn.Dropout(0.0)),
    "dropout before a norm": (lambda module: functional.sum_and_norm(X, Y, nn.Identity(), module)[0], nn.Dropout(0.0)),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_hook_is_called_and_a_plain_module_gives_the_same(name: str) -> None:
    run, module = CALLS[name]
    plain, seen = run(module), []
    handle = module.register_forward_hook(lambda module, args, out: seen.append(out))
    torch.testing.assert_close(run(module), plain)
    handle.remove()
    assert len(seen) == 1


@pytest.mark.parametrize("name", ["linear", "norm", "norm of the sum"])
def test_a_module_in_its_place_is_called(name: str) -> None:
    run, module = CALLS[name]
    torch.testing.assert_close(run(Twice(module)), 2 * run(module))


@pytest.mark.parametrize("pre_norm", [False, True])
def test_hooks_see_the_norms_and_dropouts_of_our_layers(pre_norm: bool) -> None:
    torch.manual_seed(0)
    transformer = Transformer(
        2,
        24,
        32,
        2,
        positional_kernel=8,
        positional_groups=4,
        pre_norm=pre_norm,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        layer_drop=0.0,
        eps=1e-5,
    ).eval()
    frames = Packed(X, Layout.from_lengths([30, 10]))
    expected, calls = transformer(frames)[-1].values, []
    watched = [
        (name, module) for name, module in transformer.named_modules() if isinstance(module, (nn.LayerNorm, nn.Dropout))
    ]
    for name, module in watched:
        module.register_forward_hook(lambda module, args, out, name=name: calls.append(name))
    torch.testing.assert_close(transformer(frames)[-1].values, expected)
    assert {name for name, _ in watched} == set(calls)


@pytest.mark.parametrize("variant", ["base", "large"])
def test_gated_attention_of_no_frame_at_all(variant: str) -> None:
    settings = TINY | BUCKETS | (LARGE if variant == "large" else {})
    encoder = Encoder(EncoderConfig.from_dict(settings | {"model_type": "wavlm"})).eval()
    assert encoder(waveforms_of(399, 100)).features.values.shape == (0, 48)

"""Test the linear layer: it equals PyTorch's, its rows are independent of each other, and it can include a GELU."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastssl.nn.linear import PackedLinear
from fastssl.nn.transformer import FeedForward


@pytest.mark.parametrize("rows", [0, 1, 5, 40])
def test_equals_torch_and_rows_do_not_see_each_other(rows: int) -> None:
    layer, plain = PackedLinear(24, 16), nn.Linear(24, 16)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(rows, 24)
    torch.testing.assert_close(layer(x), plain(x))
    assert torch.equal(layer(torch.cat([x, torch.randn(64, 24)]))[:rows], layer(x))


@pytest.mark.parametrize("grad", [False, True])
def test_with_gelu(grad: bool) -> None:
    layer, x = PackedLinear(24, 16), torch.randn(40, 24)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(layer.with_gelu(x), F.gelu(layer(x)))


@pytest.mark.parametrize("hook", ["forward", "pre"])
def test_hooks_see_the_layer_within_the_feed_forward(hook: str) -> None:
    feed_forward = FeedForward(24, 48, activation_dropout=0.0).eval()
    x = torch.randn(40, 24)
    seen: list[torch.Tensor] = []
    if hook == "forward":
        feed_forward.intermediate_dense.register_forward_hook(lambda module, args, out: seen.append(out))
        expected = feed_forward.intermediate_dense(x)
    else:
        feed_forward.intermediate_dense.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        expected = x
    seen.clear()
    with torch.no_grad():
        feed_forward(x)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], expected)


def test_a_layer_in_its_place_is_called() -> None:
    class Double(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    feed_forward = FeedForward(24, 48, activation_dropout=0.0).eval()
    feed_forward.intermediate_dense = Double(24, 48)  # type: ignore[assignment]
    x = torch.randn(40, 24)
    with torch.no_grad():
        expected = feed_forward.output_dense(F.gelu(feed_forward.intermediate_dense(x)))
        torch.testing.assert_close(feed_forward(x), expected)

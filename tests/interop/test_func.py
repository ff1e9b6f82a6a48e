"""Test accelerated encoders under `torch.func`, forward-mode AD and second derivatives."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastssl
from fastssl import ops
from fastssl.kernels.dispatch import BACKENDS, UnavailableBackendError
from fastssl.nn import SequenceCompressor
from tests.interop.operators import Operators
from tests.interop.tiny_models import assert_close, padded_batch, transformers_model

pytest.importorskip("transformers")
VARIANTS = pytest.mark.parametrize("variant", ["wav2vec2 base", "wavlm large", "data2vec", "torchaudio"])
BIAS = "encoder.layers.1.final_layer_norm.bias"
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:Support for mismatched")


@pytest.fixture(autouse=True)
def _attention_with_second_derivatives() -> Iterator[None]:
    """PyTorch's fast attention, which the originals call, has neither second derivatives nor forward-mode AD."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def pair(variant: str) -> tuple[Any, Any]:
    """Return an original and an accelerated model."""
    if variant == "torchaudio":
        original = pytest.importorskip("tests.interop.tiny_torchaudio").make("wav2vec2 base")
    else:
        original = transformers_model(variant, apply_spec_augment=False)
    return original, fastssl.accelerate(copy.deepcopy(original))


def frames(out: Any) -> Tensor:
    found: Tensor = out[0] if isinstance(out, tuple) else out.last_hidden_state
    return found


def score(x: Tensor) -> Tensor:  # (B, F, D) -> ()
    return (x * torch.sin(torch.arange(x[0].numel())).view_as(x[0])).sum()


def parameters(model: nn.Module, factor: float = 1.0) -> dict[str, Tensor]:
    return {name: parameter.detach() * factor for name, parameter in model.named_parameters()}


@VARIANTS
def test_functional_calls_with_other_parameters_run_packed(variant: str) -> None:
    _, model = pair(variant)
    waveforms, _ = padded_batch([5000, 5000])
    other = copy.deepcopy(model)
    other.load_state_dict({**other.state_dict(), **parameters(model, 1.1)})
    with torch.no_grad():
        before = frames(model(waveforms))
        with Operators() as operators:
            found = frames(functional_call(model, parameters(model, 1.1), (waveforms,)))
        assert operators.calls
        assert torch.equal(found, frames(other(waveforms)))
        assert torch.equal(frames(model(waveforms)), before)
    assert not torch.equal(found, before)


@VARIANTS
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.filterwarnings("error:.*original code")
def test_gradients_of_torch_func(variant: str, training: bool) -> None:
    model = pair(variant)[1].train(training)
    waveforms, mask = padded_batch([5000, 900])
    given: Any = {"lengths": mask.sum(1)} if variant == "torchaudio" else {"attention_mask": mask}

    def loss(values: dict[str, Tensor], waveforms: Tensor, given: Any) -> Tensor:
        return score(frames(functional_call(model, values, (waveforms,), given)))

    found = grad(loss, argnums=(0, 1))(parameters(model), waveforms, given)
    waveforms.requires_grad_()
    score(frames(model(waveforms, **given))).backward()
    scale = max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            allowed = 1e-3 * float(parameter.grad.abs().max()) + 1e-6 * scale
            assert (found[0][name] - parameter.grad).abs().max() <= allowed, name
    assert waveforms.grad is not None
    assert_close(found[1], waveforms.grad, 1e-3)


@pytest.mark.parametrize("way", ["torch.func", "forward_ad"])
@pytest.mark.parametrize("variant", ["wav2vec2 large", "wavlm large", "torchaudio"])
@pytest.mark.filterwarnings("error:.*original code")
def test_forward_mode(variant: str, way: str) -> None:
    waveforms, _ = padded_batch([5000, 5000])
    direction = torch.randn(waveforms.shape, generator=torch.Generator().manual_seed(3))
    found = []
    for model in pair(variant):
        if way == "torch.func":
            found.append(jvp(lambda x, model=model: frames(model(x)), (waveforms,), (direction,))[1])
        else:
            with forward_ad.dual_level():
                out = frames(model(forward_ad.make_dual(waveforms, direction)))
                found.append(forward_ad.unpack_dual(out).tangent)
    assert_close(found[1], found[0], 2e-3)


@VARIANTS
def test_vmap_runs_the_original_code(variant: str) -> None:
    original, model = pair(variant)
    waveforms, _ = padded_batch([5000, 5000])

    def gradient(model: Any) -> Any:
        def loss(values: dict[str, Tensor], row: Tensor) -> Tensor:
            return score(frames(functional_call(model, values, (row.unsqueeze(0),))))

        return vmap(grad(loss), in_dims=(None, 0))(parameters(model), waveforms)

    with pytest.warns(UserWarning, match=r"torch\.func\.vmap runs the call on slices.*so the original code runs"):
        found = gradient(model)
    for name, expected in gradient(original).items():
        assert torch.equal(found[name], expected), name


def test_hessians_are_those_of_the_original() -> None:
    waveforms, _ = padded_batch([2000])

    def hessian_of(model: Any) -> Tensor:
        def loss(bias: Tensor) -> Tensor:
            return score(frames(functional_call(model, parameters(model) | {BIAS: bias}, (waveforms,))).sin())

        second: Tensor = hessian(loss)(parameters(model)[BIAS])
        return second

    original, model = pair("wav2vec2 base")
    with pytest.warns(UserWarning, match="so the original code runs"):
        found = hessian_of(model)
    assert_close(found, hessian_of(original), 1e-4)


@VARIANTS
def test_second_derivatives_name_restore(variant: str) -> None:
    model = pair(variant)[1]
    waveforms, _ = padded_batch([5000, 5000])

    def penalty() -> None:
        loss = score(frames(model(waveforms)).sin())
        gradients: Any = torch.autograd.grad(loss, [*model.parameters()], create_graph=True, allow_unused=True)
        torch.stack([one.square().sum() for one in gradients if one is not None]).sum().backward()

    with pytest.raises(RuntimeError, match=r"no second derivative; pass backend='reference'.*`fastssl\.restore`"):
        penalty()
    model.zero_grad()
    fastssl.restore(model)
    penalty()
    assert any(p.grad is not None for p in model.parameters())


def test_a_compressor_under_torch_func() -> None:
    model = pair("wav2vec2 base")[1]
    fastssl.accelerate(model, compressor=SequenceCompressor(48, kind="average", factor=2))
    waveforms, _ = padded_batch([5000, 900])
    found = grad(lambda x: score(frames(model(x))))(waveforms)
    waveforms.requires_grad_()
    score(frames(model(waveforms))).backward()
    assert waveforms.grad is not None
    assert_close(found, waveforms.grad, 1e-3)
    with pytest.raises(ValueError, match=r"vmap .* cannot apply the compressor.*`fastssl\.restore`"):
        vmap(lambda row: frames(model(row.unsqueeze(0))))(waveforms.detach())


def test_a_backend_that_was_asked_for_says_why_it_cannot_run() -> None:
    x = torch.randn(4, 8)
    wish = BACKENDS["bias_gelu_dropout"]["cpu"][0]
    if wish == "reference":
        pytest.skip("there is no other backend")
    with pytest.raises(UnavailableBackendError, match=r"transforms of torch\.func.*available: reference"):
        grad(lambda x: ops.bias_gelu_dropout(x, None, backend=wish).sum())(x)


def test_norms_without_weights_are_called() -> None:
    """Found here: the fused op needs weight and bias."""
    original, _ = pair("wav2vec2 large")
    for layer in original.encoder.layers:
        layer.layer_norm = nn.LayerNorm(48, elementwise_affine=False)
        layer.final_layer_norm = nn.LayerNorm(48, bias=False)
    model = fastssl.accelerate(copy.deepcopy(original))
    waveforms, _ = padded_batch([5000, 5000])
    with torch.no_grad(), Operators() as operators:
        found = frames(model(waveforms))
        assert operators.calls
        assert_close(found, frames(original(waveforms)), 2e-4)

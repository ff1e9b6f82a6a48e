"""Test that encoders keep the dtypes that PyTorch's autocast on CUDA gives the original, on tensors without storage.

Autocast on the CPU has other rules (layer norms and sums stay in bf16), so only CUDA tensors can show this. They are
fake here, and need no GPU: they have a shape, a dtype and a device.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import fastssl
from fastssl.models.encoder import Encoder, EncoderConfig
from fastssl.nn import functional
from fastssl.nn.conformer import Conformer, ConformerLayer
from fastssl.packing import Layout, Packed
from tests.interop.tiny_models import ACCELERATED, CONFORMERS, EVERY_ACCELERATED_VARIANT, LARGE, TINY, TRAINED, VARIANTS

transformers = pytest.importorskip("transformers")
WIDE, NARROW = torch.float32, torch.bfloat16


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make every new tensor a fake CUDA tensor, under bf16 autocast."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(functional, "_PLAIN_WEIGHTS", (*functional._PLAIN_WEIGHTS, FakeTensor))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"), torch.autocast("cuda", torch.bfloat16):
        yield


#: CUDA autocast's dtypes for bf16 frames x and fp32 frames w, by operator; ARCHITECTURE.md has the table.
POLICY: dict[str, tuple[Any, torch.dtype]] = {
    "linear": (lambda x, w: F.linear(w, w), NARROW),
    "convolution": (lambda x, w: F.conv1d(w[None], w[:, :, None]), NARROW),
    "layer norm": (lambda x, w: F.layer_norm(x, (4,)), WIDE),
    "group norm": (lambda x, w: F.group_norm(x[None], 4), WIDE),
    "softmax": (lambda x, w: x.softmax(1), WIDE),
    "sum over frames": (lambda x, w: x.sum(0), WIDE),
    "GELU": (lambda x, w: F.gelu(x), NARROW),
    "sigmoid": (lambda x, w: x.sigmoid(), NARROW),
    "dropout": (lambda x, w: F.dropout(x, 0.1), NARROW),
    "sum of two": (lambda x, w: x + w, WIDE),
    "sum of two in bf16": (lambda x, w: x + x, NARROW),
    "cosine": (lambda x, w: F.cosine_similarity(x, x), WIDE),
    "attention": (lambda x, w: F.scaled_dot_product_attention(w[None], w[None], w[None]), NARROW),
}


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("operator", POLICY)
def test_the_policy_of_pytorch_is_the_one_in_the_table(operator: str) -> None:
    function, expected = POLICY[operator]
    assert function(torch.empty(4, 4, dtype=NARROW), torch.empty(4, 4)).dtype == expected


@pytest.mark.usefixtures("gpu")
@EVERY_ACCELERATED_VARIANT
def test_an_accelerated_encoder_returns_the_dtypes_of_the_original(variant: str) -> None:
    prefix, changes = ACCELERATED[variant]
    config = getattr(transformers, f"{prefix}Config")(**(TINY | changes | {"apply_spec_augment": False}))
    model = getattr(transformers, f"{prefix}Model")(config).train(variant in TRAINED)

    def dtypes(model: Any) -> list[torch.dtype]:
        outputs = model(torch.empty(2, 8000), output_hidden_states=True)
        front_end = outputs.get("extract_features")
        found = [outputs.last_hidden_state, *outputs.hidden_states, *([] if front_end is None else [front_end])]
        return [x.dtype for x in found]

    original = dtypes(model)
    ends_with_norm = variant in VARIANTS or (variant in CONFORMERS and "adapter" not in variant)
    assert original[0] == (WIDE if ends_with_norm else NARROW)
    assert dtypes(fastssl.accelerate(model)) == original


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("changes", [{}, LARGE], ids=["post-norm", "pre-norm"])
def test_our_encoder_keeps_the_dtypes_of_transformers(changes: dict[str, Any]) -> None:
    encoder = Encoder(EncoderConfig.from_dict(TINY | changes)).eval()
    waveforms = Packed(torch.empty(11000, 1), Layout.from_lengths((8000, 3000), device="cuda"))
    inner = NARROW if changes else WIDE  # the residual of a pre-norm stack is a sum of bf16 frames
    assert [x.values.dtype for x in encoder(waveforms).hidden_states] == [inner, inner, inner, WIDE]


@pytest.mark.usefixtures("gpu")
def test_a_conformer_keeps_its_residual_in_fp32() -> None:
    layers = [ConformerLayer(48, 64, 4, kernel=5, dropout=0.1) for _ in range(2)]
    frames = Packed(torch.empty(50, 48, dtype=NARROW), Layout.from_lengths((30, 20), device="cuda"))
    states = Conformer(layers, head_width=12, layer_drop=0.0)(frames)
    assert [x.values.dtype for x in states] == [NARROW, WIDE, WIDE]

"""Test that `attn_implementation="fastssl"` equals Transformers' own attention on every frame that is not padding."""

import copy
from typing import Any
from unittest import mock

import pytest
import torch

import fastssl
from fastssl import ops

transformers = pytest.importorskip("transformers")

FAMILIES = ["Wav2Vec2", "Hubert", "Data2VecAudio", "UniSpeech", "UniSpeechSat"]
TINY = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": [32] * 7,
    "num_conv_pos_embeddings": 3,
    "num_conv_pos_embedding_groups": 4,
    "apply_spec_augment": False,
    "layerdrop": 0.0,
}


@pytest.fixture(autouse=True)
def registered() -> None:
    fastssl.register_attention()


def pair(family: str, **options: Any) -> tuple[Any, Any]:
    """Return a model with our attention, and the same model with Transformers' eager attention."""
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}Model")
    config = getattr(transformers, f"{family}Config")(**TINY | options)
    theirs = model._from_config(config, attn_implementation="eager").eval()
    ours = model._from_config(copy.deepcopy(config), attn_implementation="fastssl").eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_features_and_gradients_of_audio_are_the_same(family: str, masked: bool) -> None:
    ours, theirs = pair(family, feat_extract_norm="layer", conv_bias=True)
    waveforms = torch.randn(2, 6000)
    mask = torch.ones(2, 6000, dtype=torch.long)
    mask[1, 2500:] = 0
    frames = [18, (2500 - 400) // 320 + 1] if masked else [18, 18]
    outputs, grads = [], []
    for model in (ours, theirs):
        out = model(waveforms, attention_mask=mask if masked else None).last_hidden_state
        outputs.append([row[:length] for row, length in zip(out, frames, strict=True)])
        torch.cat(outputs[-1]).square().sum().backward()
        grads.append([p.grad for p in model.encoder.layers.parameters()])
    for found, expected in zip(outputs[0], outputs[1], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for found, expected in zip(grads[0], grads[1], strict=True):
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-4


def test_our_op_computes_it() -> None:
    ours, _ = pair("Wav2Vec2")
    with torch.no_grad(), mock.patch.object(ops, "varlen_attention", wraps=ops.varlen_attention) as attention:
        ours(torch.randn(1, 3000))
    assert attention.call_count == TINY["num_hidden_layers"]


def test_gradient_checkpointing_and_dropout() -> None:
    ours, _ = pair("Wav2Vec2")
    ours.train()
    mask = torch.ones(2, 4000, dtype=torch.long)
    mask[0, 2000:] = 0
    waveforms = torch.randn(2, 4000)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            ours.gradient_checkpointing_enable()
        ours.zero_grad()
        torch.manual_seed(1)
        ours(waveforms, attention_mask=mask).last_hidden_state.square().sum().backward()
        grads.append([p.grad.clone() for p in ours.encoder.layers.parameters()])
    torch.testing.assert_close(grads[0], grads[1])


def test_other_encoders_and_masks_with_holes() -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=50
    )
    theirs = transformers.BertModel._from_config(config, attn_implementation="eager").eval()
    ours = transformers.BertModel._from_config(copy.deepcopy(config), attn_implementation="fastssl").eval()
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(0, 50, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 3:5] = mask[1, :4] = 0
    with torch.no_grad():
        found, expected = (m(ids, attention_mask=mask).last_hidden_state for m in (ours, theirs))
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)


def test_what_is_not_served_is_named() -> None:
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=50)
    model = transformers.GPT2Model._from_config(config, attn_implementation="fastssl").eval()
    with pytest.raises(ValueError, match="only bidirectional self-attention"):
        model(torch.randint(0, 50, (1, 5)))


def test_attention_weights_are_not_promised() -> None:
    ours, _ = pair("Wav2Vec2")
    with torch.no_grad(), pytest.warns(UserWarning, match="no attention weights"):
        ours(torch.randn(1, 3000), output_attentions=True)

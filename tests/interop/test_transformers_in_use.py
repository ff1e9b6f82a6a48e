"""Test accelerated Transformers encoders in typical scripts: speech, CTC, autocast, torch.compile and PEFT."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import fastssl
from tests.interop.tiny_models import EVERY_ACCELERATED_VARIANT, assert_close, padded_batch, transformers_model

transformers = pytest.importorskip("transformers")


@EVERY_ACCELERATED_VARIANT
def test_batch_mates_do_not_matter_to_speech(variant: str, speech: list[Any]) -> None:
    """Outputs are equal bit for bit, with Transformers' feature extractor and the public call."""
    model = fastssl.accelerate(transformers_model(variant))
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    batch = extractor(speech, sampling_rate=16_000, padding=True, return_tensors="pt")
    with torch.no_grad():
        together = model(**batch, output_hidden_states=True)
        for row, waveform in enumerate(speech):
            alone = model(**extractor(waveform, sampling_rate=16_000, return_tensors="pt"), output_hidden_states=True)
            for found, expected in zip(together.hidden_states, alone.hidden_states, strict=True):
                assert torch.equal(found[row, : expected.shape[1]], expected[0])
            last = alone.last_hidden_state[0]
            assert torch.equal(together.last_hidden_state[row, : len(last)], last)


def ctc_script(model: Any, speech: list[Any]) -> tuple[float, list[Tensor]]:
    """Run a typical fine-tuning step: feature extraction, forward, CTC loss, backward."""
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    inputs = extractor(speech, sampling_rate=16_000, padding=True, return_tensors="pt")
    labels = torch.tensor([[1, 2, 3, 4], [5, 6, 7, -100], [8, 9, -100, -100], [1, 1, 2, -100], [10, -100, -100, -100]])
    model.train()
    model.freeze_feature_encoder()
    model.zero_grad()
    loss = model(inputs.input_values, attention_mask=inputs.attention_mask, labels=labels).loss
    loss.backward()
    return float(loss.detach()), [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("variant", ["wav2vec2 large", "hubert large", "wavlm large", "unispeech large"])
def test_the_same_script_before_and_after(variant: str, speech: list[Any]) -> None:
    """Values match for variants whose outputs ignore padding: layer norm and a single positional convolution."""
    model = transformers_model(variant, "ForCTC", apply_spec_augment=False)
    loss, grads = ctc_script(model, speech)
    grads = [grad.clone() for grad in grads]
    found_loss, found_grads = ctc_script(fastssl.accelerate(model), speech)
    assert found_loss == pytest.approx(loss, rel=1e-4)
    scale = max(float(grad.abs().max()) for grad in grads)
    for found, expected in zip(found_grads, grads, strict=True):
        assert (found - expected).abs().max() <= 2e-3 * expected.abs().max() + 1e-5 * scale


@EVERY_ACCELERATED_VARIANT
@pytest.mark.parametrize("way", ["weights in bf16", "autocast"])
def test_half_precision_by_the_two_times_rule(variant: str, way: str) -> None:
    """Each hidden state is, in max norm, at most twice as far from fp64 as the original's in the same precision."""
    original = transformers_model(variant)
    exact = copy.deepcopy(original).double()
    if way == "weights in bf16":
        original = original.bfloat16()
        exact.load_state_dict(original.state_dict())
    model = fastssl.accelerate(copy.deepcopy(original))
    waveforms, mask = padded_batch([5000, 900, 3300])
    waveforms = waveforms.bfloat16()
    inputs = waveforms if way == "weights in bf16" else waveforms.float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        found = model(inputs, attention_mask=mask, output_hidden_states=True).hidden_states
        for row, samples in enumerate(mask.sum(1).tolist()):
            plain = original(inputs[row : row + 1, :samples], output_hidden_states=True).hidden_states
            with torch.autocast("cpu", enabled=False):
                alone = exact(waveforms[row : row + 1, :samples].double(), output_hidden_states=True).hidden_states
            for ours, theirs, right in zip(found, plain, alone, strict=True):
                assert ours.dtype == theirs.dtype
                allowed = 2 * (theirs - right).abs().max() + 4 * torch.finfo(torch.bfloat16).eps * right.abs().max()
                assert (ours[row, : right.shape[1]] - right[0]).abs().max() <= allowed


def test_gradients_in_bf16_by_the_two_times_rule() -> None:
    original = transformers_model("wav2vec2 large", apply_spec_augment=False).bfloat16().train()
    exact = copy.deepcopy(original).double()
    model = fastssl.accelerate(copy.deepcopy(original))
    waveforms, _ = padded_batch([5000, 5000])
    waveforms = waveforms.bfloat16()
    for m in (original, exact, model):
        out = m(waveforms.to(next(m.parameters()).dtype)).last_hidden_state
        (out * torch.sin(torch.arange(out.numel(), dtype=torch.float64)).view_as(out).to(out.dtype)).sum().backward()
    for (name, found), plain, right in zip(
        model.named_parameters(), original.parameters(), exact.parameters(), strict=True
    ):
        if right.grad is not None and not name.endswith("k_proj.bias"):  # whose exact gradient is zero
            eps = torch.finfo(torch.bfloat16).eps
            allowed = 2 * (plain.grad - right.grad).abs().max() + 4 * eps * right.grad.abs().max()
            assert (found.grad - right.grad).abs().max() <= allowed, name


@pytest.mark.parametrize("variant", ["wav2vec2 base", "sew base", "conformer base"])
def test_torch_compile_does_not_trace_an_accelerated_encoder(variant: str) -> None:
    """New lengths must not trigger recompilation. Modules around the encoder are still compiled."""
    model = fastssl.accelerate(transformers_model(variant))
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    class Head(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.linear = model, torch.nn.Linear(48, 3)

        def forward(self, waveforms: Tensor, mask: Tensor) -> Tensor:
            out: Tensor = self.linear(self.encoder(waveforms, attention_mask=mask).last_hidden_state)
            return out

    head = Head()
    compiled = torch.compile(head, backend=backend)
    with torch.no_grad():
        for lengths in ([5000, 900], [5000, 1700], [5000, 4000]):
            waveforms, mask = padded_batch(lengths)
            assert torch.equal(compiled(waveforms, mask), head(waveforms, mask))
    assert len(graphs) == 1
    assert len(list(graphs[0].graph.nodes)) < 10


@pytest.mark.parametrize("first", ["accelerate", "peft"])
def test_peft(first: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj", "output_dense"], init_lora_weights=False, r=2)
    original = transformers_model("wav2vec2 large", "ForCTC")
    model = copy.deepcopy(original)
    torch.manual_seed(1)
    expected_model = peft.get_peft_model(original, config)
    torch.manual_seed(1)
    if first == "accelerate":
        model = peft.get_peft_model(fastssl.accelerate(model), config)
    else:
        model = fastssl.accelerate(peft.get_peft_model(model, config))
    waveforms, mask = padded_batch([5000, 2000])
    labels = torch.tensor([[1, 2, 3], [4, 5, -100]])
    found, expected = (m(waveforms, attention_mask=mask, labels=labels) for m in (model, expected_model))
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-4, atol=0)
    found.loss.backward()
    expected.loss.backward()
    trained = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    right = {n: p.grad for n, p in expected_model.named_parameters() if p.grad is not None}
    assert trained.keys() == right.keys()
    assert all("lora_" in name for name in trained)
    for name, grad in trained.items():
        assert_close(grad, right[name], 1e-3, name)
    merged = model.merge_and_unload()
    with torch.no_grad():
        logits = merged(waveforms, attention_mask=mask).logits
        assert_close(logits, found.logits.detach(), 1e-4)

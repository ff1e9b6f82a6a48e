"""Test that accelerated `Wav2Vec2ForPreTraining` has the original's losses, outputs and gradients for equal draws."""

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import fastssl
from fastssl import ops
from tests.interop.tiny_models import padded_batch, transformers_model

modeling = pytest.importorskip("transformers.models.wav2vec2.modeling_wav2vec2")


def pair(variant: str, **options: Any) -> tuple[Any, Any]:
    original = transformers_model(variant, "ForPreTraining", num_negatives=20, **options)
    original.set_gumbel_temperature(1.3)
    return fastssl.accelerate(copy.deepcopy(original)), original


def batch(lengths: list[int]) -> dict[str, Tensor]:
    """Return a batch with a mask and negatives, drawn the way Transformers' example script does."""
    waveforms, mask = padded_batch(lengths)
    frames = [(length - 400) // 320 + 1 for length in lengths]
    shape = (len(lengths), max(frames))
    valid = torch.arange(max(frames)) < torch.tensor(frames).unsqueeze(1)
    with mock.patch.object(modeling.np.random, "rand", return_value=modeling.np.array([0.5])):
        masked = modeling._compute_mask_indices(shape, 0.6, 3, attention_mask=valid.long(), min_masks=2)
    negatives = modeling._sample_negative_indices(shape, 20, masked)
    return {
        "input_values": waveforms,
        "attention_mask": mask,
        "mask_time_indices": torch.from_numpy(masked),
        "sampled_negative_indices": torch.from_numpy(negatives),
    }


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("variant", "lengths"), [("wav2vec2 base", [9000, 9000]), ("wav2vec2 large", [9000, 5000])])
def test_losses_outputs_and_gradients_are_those_of_the_original(
    variant: str, lengths: list[int], training: bool
) -> None:
    model, original = pair(variant)
    inputs = batch(lengths)
    outputs = []
    for m in (model, original):
        m.train(training)
        torch.manual_seed(5)  # Gumbel noise
        outputs.append(m(**inputs))
        outputs[-1].loss.backward()
    found, expected = outputs
    assert type(found) is type(expected)
    assert found.keys() == expected.keys()
    masked = inputs["mask_time_indices"]
    for key in ("loss", "contrastive_loss", "diversity_loss", "codevector_perplexity"):
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=0)
    for key in ("projected_states", "projected_quantized_states"):
        assert (found[key] - expected[key])[masked].abs().max() <= 2e-4 * expected[key].abs().max()
    scale = max(float(p.grad.abs().max()) for p in original.parameters() if p.grad is not None)
    for (name, ours), theirs in zip(model.named_parameters(), original.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            allowed = 1e-3 * float(theirs.grad.abs().max()) + 1e-5 * scale
            assert (ours.grad - theirs.grad).abs().max() <= allowed, name


def test_codes_that_coincide_are_no_negatives() -> None:
    """With two codes per group, most negatives have the positive's code and must be left out."""
    model, original = pair("wav2vec2 base", num_codevectors_per_group=2)
    inputs = batch([9000, 9000])
    with torch.no_grad():
        found, expected = (m(**inputs).contrastive_loss for m in (model, original))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_without_negatives_or_mask_and_as_tuples() -> None:
    model, original = pair("wav2vec2 base")
    inputs = batch([9000, 9000])
    masked = {name: inputs[name] for name in ("input_values", "mask_time_indices")}
    with torch.no_grad():
        for given in ({"input_values": inputs["input_values"]}, masked, inputs):
            found, expected = (m(**given, return_dict=False, output_hidden_states=True) for m in (model, original))
            assert isinstance(found, tuple)
            assert [type(one) for one in found] == [type(one) for one in expected]
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-4)
    with pytest.raises(ValueError, match="mask_time_indices: missing"):
        model(inputs["input_values"], sampled_negative_indices=inputs["sampled_negative_indices"])


def test_our_ops_compute_it_until_restored() -> None:
    model, _ = pair("wav2vec2 base")
    inputs = batch([9000])
    with (
        mock.patch.object(ops, "contrastive_loss", wraps=ops.contrastive_loss) as contrastive_loss,
        mock.patch.object(ops, "gumbel_quantize", wraps=ops.gumbel_quantize) as gumbel_quantize,
    ):
        model(**inputs)
        assert contrastive_loss.call_count == 1
        # One call for the masked frames, whose codes are counted, and one for the other frames.
        assert gumbel_quantize.call_count == 2
        model(**inputs, output_hidden_states=True)
        fastssl.restore(model)
        model(**inputs)
        assert contrastive_loss.call_count == 2
    assert type(model) is modeling.Wav2Vec2ForPreTraining
    assert type(model.quantizer) is modeling.Wav2Vec2GumbelVectorQuantizer


@pytest.mark.parametrize("training", [False, True])
def test_dtypes_in_bf16_are_those_of_the_original(training: bool) -> None:
    inputs = batch([9000, 9000])
    inputs["input_values"] = inputs["input_values"].bfloat16()
    found, expected = (m.bfloat16().train(training)(**inputs) for m in pair("wav2vec2 base"))
    keys = ("loss", "contrastive_loss", "diversity_loss", "codevector_perplexity", "projected_quantized_states")
    assert [found[key].dtype for key in keys] == [expected[key].dtype for key in keys]

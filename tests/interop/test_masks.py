"""Test masks with holes, under `norm="padded"`, and padding on the left, in encoders and in heads."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastssl
from tests.interop.tiny_models import (
    EVERY_ACCELERATED_VARIANT,
    EVERY_FAMILY,
    EVERY_VARIANT,
    FAMILIES,
    assert_close,
    padded_batch,
    transformers_model,
)

transformers = pytest.importorskip("transformers")
#: Samples of each row, and whether it is padded on the left. One row is full, one has no frames, one no samples.
LENGTHS, LEFT = [9000, 3500, 6000, 300, 5999, 0], [False, True, False, True, True, False]
FRAMES = [max(0, (length - 400) // 320 + 1) for length in LENGTHS]


def batch_on_sides() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return waveforms and mask padded on the right, and the same utterances padded on the sides of `LEFT`.

    The padding is noise, which must not matter.
    """
    waveforms, mask = padded_batch(LENGTHS)
    noise = torch.randn(waveforms.shape, generator=torch.Generator().manual_seed(9))
    moved, moved_mask = noise.clone(), mask.clone()
    for row, (length, left) in enumerate(zip(LENGTHS, LEFT, strict=True)):
        place = slice(9000 - length, 9000) if left else slice(0, length)
        moved[row, place] = waveforms[row, :length]
        if left:
            moved_mask[row] = mask[row].flip(0)
    return torch.where(mask.bool(), waveforms, noise), mask, moved, moved_mask


def run(model: Any, *args: Any, **options: Any) -> Any:
    """Call a model with the same random draws each time."""
    np.random.seed(3)  # noqa: NPY002 (the generator that Transformers draws from)
    torch.manual_seed(3)
    return model(*args, **options)


def score(x: Tensor) -> Tensor:
    return (x * torch.sin(torch.arange(x.numel())).view_as(x)).sum()


def assert_same_gradients(model: nn.Module, expected: nn.Module, relative: float) -> None:
    scale = max(float(p.grad.abs().max()) for p in expected.parameters() if p.grad is not None)
    for (name, found), parameter in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert (found.grad is None) == (parameter.grad is None), name
        if parameter.grad is not None and found.grad is not None:
            # Attention is invariant to a bias on the keys: only rounding remains of its gradient.
            allowed = relative * float(parameter.grad.abs().max()) + 1e-3 * relative * scale
            assert (found.grad - parameter.grad).abs().max() <= allowed, name


def any_mask() -> Tensor:  # (4, 9000)
    """Return rows with holes, with padding on the left, on both sides, and on the right."""
    mask = torch.ones(4, 9000, dtype=torch.long)
    mask[0, 1000:1700] = mask[0, 5000] = mask[0, 8000:] = 0
    mask[1, :4000] = 0
    mask[2, :2500] = mask[2, 7000:] = 0
    mask[3, 5300:] = 0
    return mask


@pytest.mark.parametrize("training", [False, True])
@EVERY_VARIANT
def test_over_padding_any_mask_gives_what_the_original_gives(variant: str, training: bool) -> None:
    original = transformers_model(variant, mask_time_prob=0.3).train(training)
    if not variant.startswith("wavlm"):  # WavLM's config lacks mask_feature_min_masks
        original.config.mask_feature_prob, original.config.mask_feature_length = 0.2, 4
    model = fastssl.accelerate(copy.deepcopy(original), norm="padded")
    waveforms, mask = torch.randn(4, 9000, generator=torch.Generator().manual_seed(1)), any_mask()
    frames = ((mask.sum(1) - 400) // 320 + 1).tolist()
    found, expected = (run(m, waveforms, attention_mask=mask, output_hidden_states=True) for m in (model, original))
    loss, expected_loss = torch.zeros(()), torch.zeros(())
    for row, count in enumerate(frames):
        for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
            assert_close(ours[row, :count], theirs[row, :count], 2e-4)
        last, expected_last = found.last_hidden_state[row, :count], expected.last_hidden_state[row, :count]
        assert_close(last, expected_last, 2e-4)
        loss, expected_loss = loss + score(last), expected_loss + score(expected_last)
    loss.backward()
    expected_loss.backward()
    assert_same_gradients(model, original, 1e-3)
    right = torch.arange(9000) < mask.sum(1, keepdim=True)
    same = run(model, waveforms, attention_mask=right).last_hidden_state
    assert torch.equal(same, found.last_hidden_state)


def test_over_padding_masks_have_any_type_and_only_two_values() -> None:
    model = fastssl.accelerate(transformers_model("wav2vec2 base"), norm="padded")
    waveforms, mask = torch.randn(4, 9000), any_mask()
    with torch.no_grad():
        expected = model(waveforms, attention_mask=mask).last_hidden_state
        for kind in (torch.bool, torch.uint8, torch.float16):
            assert torch.equal(model(waveforms, attention_mask=mask.to(kind)).last_hidden_state, expected)
    for wrong in (2.0, 0.5, -1.0, float("nan")):
        bad = mask.float()
        bad[2, 3000] = wrong
        with pytest.raises(ValueError, match="attention_mask: must be 1"):
            model(waveforms, attention_mask=bad)


@EVERY_ACCELERATED_VARIANT
def test_padded_on_the_left_an_utterance_has_its_own_features_at_the_end_of_its_row(variant: str) -> None:
    model = fastssl.accelerate(transformers_model(variant))
    waveforms, mask, moved, moved_mask = batch_on_sides()
    with torch.no_grad():
        right = model(waveforms, attention_mask=mask, output_hidden_states=True)
        found = model(moved, attention_mask=moved_mask, output_hidden_states=True)
        alone = model(moved[1:2, 5500:], output_hidden_states=True)
    assert torch.equal(found.last_hidden_state[1:2, -alone.last_hidden_state.shape[1] :], alone.last_hidden_state)
    pairs = [("hidden state", *pair) for pair in zip(found.hidden_states, right.hidden_states, strict=True)]
    if "extract_features" in found:
        pairs.append(("extract features", found.extract_features, right.extract_features))
    pairs.append(("last", found.last_hidden_state, right.last_hidden_state))
    for what, ours, theirs in pairs:
        total = ours.shape[1]
        assert ours.shape == theirs.shape
        for row, (length, left) in enumerate(zip(LENGTHS, LEFT, strict=True)):
            squeezed = what == "hidden state" and hasattr(model.config, "squeeze_factor")
            count = FRAMES[row] // model.config.squeeze_factor if squeezed else FRAMES[row]
            if what == "last" and total < max(FRAMES):  # after a convolutional adapter
                count = int(model._get_feat_extract_output_lengths(length, add_adapter=True)) if count else 0
            if not left:
                assert torch.equal(ours[row], theirs[row]), (what, row)
                continue
            assert torch.equal(ours[row, total - count :], theirs[row, :count]), (what, row)
            padding = ours[row, : total - count]
            nearest = ours[row, total - count] if what == "last" and count else torch.zeros(ours.shape[2])
            assert torch.equal(padding, nearest.expand_as(padding)), (what, row)


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float32])
def test_masks_of_any_type_may_have_padding_on_the_left(kind: torch.dtype) -> None:
    model = fastssl.accelerate(transformers_model("wav2vec2 base"))
    _, _, moved, mask = batch_on_sides()
    with torch.no_grad():
        expected = model(moved, attention_mask=mask).last_hidden_state
        assert torch.equal(model(moved, attention_mask=mask.to(kind)).last_hidden_state, expected)


@EVERY_FAMILY
def test_in_training_the_side_of_the_padding_changes_no_draw_and_no_gradient(variant: str) -> None:
    model = fastssl.accelerate(transformers_model(variant, mask_time_prob=0.5, layerdrop=0.3).train())
    other = copy.deepcopy(model)
    waveforms, mask, moved, moved_mask = batch_on_sides()
    moved.requires_grad_()
    right = run(model, waveforms.requires_grad_(), attention_mask=mask).last_hidden_state
    found = run(other, moved, attention_mask=moved_mask).last_hidden_state
    total = right.shape[1]
    loss, expected_loss = torch.zeros(()), torch.zeros(())
    for row, (count, left) in enumerate(zip(FRAMES, LEFT, strict=True)):
        own = found[row, total - count :] if left else found[row, :count]
        assert torch.equal(own, right[row, :count])
        loss, expected_loss = loss + score(own), expected_loss + score(right[row, :count])
    (loss + 1e6 * found[1, 0].sum() + 1e6 * found[3].sum()).backward()  # padding passes no gradient back
    expected_loss.backward()
    assert_same_gradients(other, model, 1e-5)
    assert moved.grad is not None
    assert waveforms.grad is not None
    assert torch.equal(moved.grad != 0, (moved.grad != 0) & moved_mask.bool())
    assert_close(moved.grad[1, 5500:], waveforms.grad[1, :3500], 1e-5)


def test_given_time_masks_are_for_the_rows_as_they_are() -> None:
    model = fastssl.accelerate(transformers_model("wav2vec2 base").train())
    waveforms, mask, moved, moved_mask = batch_on_sides()
    chosen = torch.rand(len(LENGTHS), max(FRAMES), generator=torch.Generator().manual_seed(2)) < 0.4
    there = chosen.clone()
    for row, (count, left) in enumerate(zip(FRAMES, LEFT, strict=True)):
        if left:
            there[row] = chosen[row].roll(-count)
    with torch.no_grad():
        right = model(waveforms, attention_mask=mask, mask_time_indices=chosen).last_hidden_state
        found = model(moved, attention_mask=moved_mask, mask_time_indices=there).last_hidden_state
    for row, (count, left) in enumerate(zip(FRAMES, LEFT, strict=True)):
        assert torch.equal(found[row, len(found[row]) - count :] if left else found[row, :count], right[row, :count])


def test_a_compressor_takes_batches_padded_on_the_left() -> None:
    compressor = fastssl.nn.SequenceCompressor(48, kind="average", factor=2)
    model = fastssl.accelerate(transformers_model("wav2vec2 base"), compressor=compressor)
    waveforms, mask, moved, moved_mask = batch_on_sides()
    with torch.no_grad():
        right = model(waveforms, attention_mask=mask).last_hidden_state
        found = model(moved, attention_mask=moved_mask).last_hidden_state
    assert torch.equal(found[1, -FRAMES[1] :], right[1, : FRAMES[1]])


COUNTING_HEADS = [
    *((variant, head) for variant in FAMILIES for head in ("ForCTC", "ForSequenceClassification")),
    *((variant, "ForXVector") for variant in ("wav2vec2 base", "wavlm base", "data2vec", "unispeech-sat large")),
]


def labelled(head: str, rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randint(1, 5, (rows, 3) if head == "ForCTC" else (rows,), generator=generator)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("variant", "head"), COUNTING_HEADS)
def test_heads_give_the_loss_and_logits_of_each_utterance_alone(variant: str, head: str, weighted: bool) -> None:
    """Such a head counts the frames, and uses the first ones of each row."""
    options = {"ctc_loss_reduction": "sum", "use_weighted_layer_sum": weighted}
    options["tdnn_dilation"] = [1, 1, 1]  # with others, Transformers counts frames of the head that see padding
    model = fastssl.accelerate(transformers_model(variant, head, **options))
    rows = [row for row, count in enumerate(FRAMES) if count > 5]  # a head for speakers needs some frames
    waveforms, mask, moved, moved_mask = (x[rows] for x in batch_on_sides())
    labels = labelled(head, len(rows))
    with torch.no_grad():
        found = model(moved, attention_mask=moved_mask, labels=labels, output_hidden_states=True)
        right = model(waveforms, attention_mask=mask, labels=labels, output_hidden_states=True)
        losses = []
        for place, row in enumerate(rows):
            alone = model(waveforms[place : place + 1, : LENGTHS[row]], labels=labels[place : place + 1])
            losses.append(alone.loss)
            logits = found.logits[place, : alone.logits.shape[1]] if head == "ForCTC" else found.logits[place]
            assert_close(logits, alone.logits[0], 1e-5)
    expected = torch.stack(losses).sum() if head == "ForCTC" else torch.stack(losses).mean()
    torch.testing.assert_close(found.loss, expected, rtol=1e-5, atol=0)
    assert torch.equal(found.logits, right.logits)
    assert all(torch.equal(a, b) for a, b in zip(found.hidden_states, right.hidden_states, strict=True))


@pytest.mark.parametrize("how", ["encoder accelerated", "compiled", "hooks of Accelerate"])
def test_however_a_head_is_used_its_frames_are_first(how: str) -> None:
    model = transformers_model("wav2vec2 large", "ForCTC", ctc_loss_reduction="sum")
    fastssl.accelerate(model.wav2vec2 if how == "encoder accelerated" else model)
    call = model
    if how == "compiled":
        call = torch.compile(model, backend="eager")
    if how == "hooks of Accelerate":
        hooks = pytest.importorskip("accelerate.hooks")
        hooks.add_hook_to_module(model, hooks.ModelHook())
        hooks.add_hook_to_module(model.wav2vec2, hooks.ModelHook())
    waveforms, mask, moved, moved_mask = (x[:3] for x in batch_on_sides())
    labels = labelled("ForCTC", 3)
    with torch.no_grad():
        expected = model(waveforms, attention_mask=mask, labels=labels).loss
        assert torch.equal(call(moved, attention_mask=moved_mask, labels=labels).loss, expected)
        encoded = model.wav2vec2(moved, attention_mask=moved_mask).last_hidden_state  # no head calls
        first = model.wav2vec2(waveforms, attention_mask=mask).last_hidden_state
    assert torch.equal(encoded[1, -FRAMES[1] :], first[1, : FRAMES[1]])


def test_the_head_for_pre_training_gives_the_same_loss() -> None:
    model = fastssl.accelerate(transformers_model("wav2vec2 base", "ForPreTraining", num_negatives=20))
    waveforms, mask, moved, moved_mask = batch_on_sides()
    frames = model._get_feature_vector_attention_mask(max(FRAMES), mask[:3])
    chosen = frames & (torch.rand(frames.shape, generator=torch.Generator().manual_seed(2)) < 0.5)
    negatives = torch.randint(0, FRAMES[1], (*frames.shape, 20), generator=torch.Generator().manual_seed(3))
    options = {"mask_time_indices": chosen, "sampled_negative_indices": negatives}
    with torch.no_grad():
        expected = model(waveforms[:3], attention_mask=mask[:3], **options).loss
        assert torch.equal(model(moved[:3], attention_mask=moved_mask[:3], **options).loss, expected)


def test_a_head_that_labels_frames_finds_them_where_the_samples_are() -> None:
    """It counts no frames, and its labels are for the rows as they are."""
    model = fastssl.accelerate(transformers_model("wav2vec2 base", "ForAudioFrameClassification"))
    waveforms, mask, moved, moved_mask = batch_on_sides()
    with torch.no_grad():
        right = model(waveforms, attention_mask=mask).logits
        found = model(moved, attention_mask=moved_mask).logits
    assert torch.equal(found[1, -FRAMES[1] :], right[1, : FRAMES[1]])


@EVERY_FAMILY
def test_the_mask_of_frames_that_an_encoder_gives_is_that_of_its_frames(variant: str) -> None:
    """Modules around an encoder ask it which frames to use, such as your own head, or `SpeechEncoderDecoderModel`."""

    class Mean(nn.Module):
        def __init__(self, encoder: Any) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, waveforms: Tensor, mask: Tensor) -> Tensor:
            hidden = self.encoder(waveforms, attention_mask=mask).last_hidden_state
            used = self.encoder._get_feature_vector_attention_mask(hidden.shape[1], mask)
            return torch.stack([frames[chosen].sum(0) for frames, chosen in zip(hidden, used, strict=True)])

    original = transformers_model(variant)
    model = Mean(fastssl.accelerate(copy.deepcopy(original)))
    rows = [row for row, count in enumerate(FRAMES) if count]
    waveforms, mask, moved, moved_mask = (x[rows] for x in batch_on_sides())
    with torch.no_grad():
        assert torch.equal(model(moved, moved_mask), model(waveforms, mask))
    ask = "_get_feature_vector_attention_mask"
    for given in (mask, mask.bool()):
        assert torch.equal(getattr(model.encoder, ask)(27, given), getattr(original, ask)(27, given))
    fastssl.accelerate(model, norm="padded")
    assert torch.equal(getattr(model.encoder, ask)(27, moved_mask), getattr(original, ask)(27, moved_mask))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("asked", ["head", "encoder"])
def test_a_head_of_your_own_gets_the_same_frames_from_its_own_mask_and_from_that_of_the_encoder(
    asked: str, compiled: bool
) -> None:
    """It is derived from a class of Transformers, so it counts frames, which are then first in each row."""

    class Mean(transformers.Wav2Vec2ForCTC):  # type: ignore[misc, name-defined]
        def forward(self, waveforms: Tensor, mask: Tensor) -> Tensor:
            hidden = self.wav2vec2(waveforms, attention_mask=mask).last_hidden_state
            of = self if asked == "head" else self.wav2vec2
            used = of._get_feature_vector_attention_mask(hidden.shape[1], mask).unsqueeze(2)
            return torch.sum(hidden * used, 1)

    model = Mean(transformers_model("wav2vec2 large", "ForCTC").config).eval()
    fastssl.accelerate(model)
    rows = [row for row, count in enumerate(FRAMES) if count]
    waveforms, mask, moved, moved_mask = (x[rows] for x in batch_on_sides())
    call = torch.compile(model, backend="eager") if compiled else model
    with torch.no_grad():
        assert_close(call(moved, moved_mask), model(waveforms, mask), 1e-6)


def test_in_the_wrapper_of_peft_an_encoder_returns_frames_where_its_mask_says() -> None:
    """The wrapper answers for the encoder's attributes, but it is no head that counts frames."""
    peft = pytest.importorskip("peft")
    model = fastssl.accelerate(transformers_model("wav2vec2 large"))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).eval()
    _, _, moved, moved_mask = batch_on_sides()
    with torch.no_grad():
        found = wrapped(moved, attention_mask=moved_mask).last_hidden_state
        assert torch.equal(found, model(moved, attention_mask=moved_mask).last_hidden_state)
        first = fastssl.accelerate(wrapped)(moved[1:2, -LENGTHS[1] :]).last_hidden_state[0]
    used = wrapped._get_feature_vector_attention_mask(found.shape[1], moved_mask)[1].bool()
    assert_close(found[1, used], first, 1e-6)


def test_a_decoder_uses_the_frames_of_the_utterance() -> None:
    config = transformers.BertConfig(
        vocab_size=11,
        hidden_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        is_decoder=True,
        add_cross_attention=True,
    )
    torch.manual_seed(0)
    decoder = transformers.BertLMHeadModel(config)
    model = transformers.SpeechEncoderDecoderModel(encoder=transformers_model("wav2vec2 base"), decoder=decoder).eval()
    fastssl.accelerate(model)
    rows = [row for row, count in enumerate(FRAMES) if count]
    waveforms, mask, moved, moved_mask = (x[rows] for x in batch_on_sides())
    letters = torch.randint(1, 11, (len(rows), 4))
    with torch.no_grad():
        expected = model(waveforms, attention_mask=mask, decoder_input_ids=letters).logits
        found = model(moved, attention_mask=moved_mask, decoder_input_ids=letters).logits
    assert_close(found, expected, 1e-5)


def test_padding_on_both_sides_and_holes_are_refused() -> None:
    model = fastssl.accelerate(transformers_model("wav2vec2 base"))
    mask = any_mask()
    for rows in ([0, 3], [3, 2, 1], [1, 1, 0]):
        bad = next(place for place, row in enumerate(rows) if row in (0, 2))
        with pytest.raises(ValueError, match=rf'row {bad} has padding between samples or.*norm="padded"'):
            model(torch.randn(len(rows), 9000), attention_mask=mask[rows])
    with torch.no_grad():
        assert model(torch.randn(1, 9000), attention_mask=mask[1:2]).last_hidden_state.shape == (1, 27, 48)

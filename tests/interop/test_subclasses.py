"""Test encoders whose class is a user's subclass of a library's: one that only adds to it, or one that overrides."""

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastssl
from fastssl.nn import SequenceCompressor
from tests.interop.operators import Operators, is_packed
from tests.interop.tiny_models import FAMILIES, VARIANTS, padded_batch, transformers_model

transformers: Any = pytest.importorskip("transformers")


class Pooling:
    """What a user's class adds to an encoder."""

    scale = 2.0

    def pool(self: Any, waveforms: Tensor) -> Tensor:  # (B, T) -> (B, D)
        out: Tensor = self(waveforms).last_hidden_state.mean(1) * self.scale
        return out


class MyWav2Vec2(Pooling, transformers.Wav2Vec2Model):  # type: ignore[misc]
    pass


class MyData2Vec(transformers.Data2VecAudioModel, Pooling):  # type: ignore[misc]
    pass


class MyCTC(transformers.Data2VecAudioForCTC):  # type: ignore[misc]
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.data2vec_audio = MyData2Vec(config)
        self.post_init()


class Calling(transformers.Wav2Vec2Model):  # type: ignore[misc]
    """Overrides `forward`, and calls that of its base."""

    def forward(self, waveforms: Tensor, factor: float = 3.0) -> Tensor:
        out: Tensor = factor * super().forward(waveforms).last_hidden_state
        return out


class Ignoring(transformers.Wav2Vec2Model):  # type: ignore[misc]
    """Overrides `forward`, and does not call that of its base."""

    def forward(self, waveforms: Tensor) -> Tensor:
        out: Tensor = self.feature_extractor(waveforms)
        return out


class Masking(transformers.Wav2Vec2Model):  # type: ignore[misc]
    """Overrides a method that the original forward calls."""

    def _mask_hidden_states(self, hidden_states: Tensor, **options: Any) -> Tensor:
        return torch.zeros_like(hidden_states)


class OwnLoss(transformers.Wav2Vec2ForPreTraining):  # type: ignore[misc]
    @staticmethod
    def compute_contrastive_loss(target: Tensor, negatives: Tensor, predicted: Tensor, temperature: float = 0.1) -> Any:
        return torch.ones(len(negatives) + 1, *predicted.shape[:-1])


def made(kind: Any, variant: str = "wav2vec2 base", **options: Any) -> Any:
    """Return a tiny model of a subclass."""
    base = transformers_model(variant, "ForCTC" if "CTC" in kind.__name__ else "Model", **options)
    model = kind(base.config).eval()
    model.load_state_dict(base.state_dict())
    return model


def silently(function: Any, *args: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return function(*args)


@pytest.mark.parametrize("variant", FAMILIES)
def test_a_subclass_of_every_architecture_is_accelerated(variant: str) -> None:
    base = getattr(transformers, f"{VARIANTS[variant][0]}Model")
    kind: Any = type("Mine", (Pooling, base), {"__module__": __name__})
    model = silently(fastssl.accelerate, made(kind, variant))
    waveforms, mask = padded_batch([5000, 900])
    expected = fastssl.accelerate(transformers_model(variant))
    with torch.no_grad():
        found = silently(lambda: model(waveforms, attention_mask=mask).last_hidden_state)
        assert torch.equal(found, expected(waveforms, attention_mask=mask).last_hidden_state)
        assert torch.equal(model.pool(waveforms), 2 * expected(waveforms).last_hidden_state.mean(1))
    assert is_packed(model)
    assert isinstance(model, kind)
    assert (type(model).__name__, type(model).__module__) == ("Mine", __name__)
    assert fastssl.restore(model) is model
    assert type(model) is kind
    assert not is_packed(model)
    assert not [name for name in vars(model) if "fastssl" in name]


@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
@pytest.mark.parametrize("kind", [MyData2Vec, MyCTC])
def test_copies_of_subclasses_are_accelerated(kind: Any, way: str) -> None:
    model = fastssl.accelerate(made(kind, "data2vec"), norm="padded")
    again = pickle.loads(pickle.dumps(model)) if way == "pickle" else copy.deepcopy(model)
    waveforms, _ = padded_batch([5000, 900])
    with torch.no_grad():
        assert torch.equal(again(waveforms)[0], model(waveforms)[0])
    assert is_packed(again)
    assert [type(module) for module in again.modules()] == [type(module) for module in model.modules()]
    assert again.base_model._fastssl_norm == "padded"
    fastssl.restore(again)
    assert type(again) is kind
    assert not is_packed(again)


def test_a_class_that_pickle_does_not_find_is_named() -> None:
    class Local(transformers.Data2VecAudioModel):  # type: ignore[misc]
        pass

    with pytest.raises((pickle.PicklingError, AttributeError), match="Local"):
        pickle.dumps(fastssl.accelerate(made(Local, "data2vec")))


def test_subclasses_under_heads_are_accelerated() -> None:
    model = silently(fastssl.accelerate, made(MyCTC, "data2vec"))
    expected = fastssl.accelerate(transformers_model("data2vec", "ForCTC"))
    waveforms, mask = padded_batch([5000, 900])
    with torch.no_grad():
        found = model(waveforms, attention_mask=mask).logits
        assert torch.equal(found, expected(waveforms, attention_mask=mask).logits)
    assert isinstance(model.data2vec_audio, MyData2Vec)
    assert is_packed(model)


def test_the_forward_of_a_subclass_calls_ours() -> None:
    model = silently(fastssl.accelerate, made(Calling))
    waveforms, _ = padded_batch([5000, 900])
    with torch.no_grad():
        found = silently(model, waveforms)
        expected = fastssl.accelerate(transformers_model("wav2vec2 base"))(waveforms).last_hidden_state
        assert torch.equal(found, 3 * expected)
        assert torch.equal(model(waveforms, factor=1.0), expected)
    assert is_packed(model)
    compressor = SequenceCompressor(48, kind="average", factor=2)
    fastssl.accelerate(model, compressor=compressor)
    assert model.fastssl_compressor is compressor


def test_a_forward_that_does_not_call_ours_is_named() -> None:
    model = made(Ignoring)
    with pytest.warns(UserWarning, match=r"class Ignoring overrides `forward` without `super\(\)`.*call `super\(\)"):
        fastssl.accelerate(model)
    assert not is_packed(model)
    compressor = SequenceCompressor(48, kind="average", factor=2)
    with pytest.raises(ValueError, match=r"compressor: the class Ignoring overrides `forward`"):
        fastssl.accelerate(model, compressor=compressor)


def test_an_overridden_method_that_only_the_original_calls_is_called() -> None:
    original = made(Masking)
    model = fastssl.accelerate(copy.deepcopy(original))
    waveforms, _ = padded_batch([5000])
    with torch.no_grad(), pytest.warns(UserWarning, match="replaced `_mask_hidden_states`, so the original code runs"):
        assert torch.equal(model(waveforms).last_hidden_state, original(waveforms).last_hidden_state)
    fastssl.accelerate(model, norm="padded")
    with pytest.warns(UserWarning, match="replaced `_mask_hidden_states`"):
        assert not is_packed(model)


def test_attention_weights_of_a_subclass_come_from_the_original_code() -> None:
    original = made(MyWav2Vec2, attn_implementation="eager")
    model = fastssl.accelerate(copy.deepcopy(original))
    waveforms, _ = padded_batch([5000])
    with torch.no_grad(), pytest.warns(UserWarning, match="attention weights"):
        found = model(waveforms, output_attentions=True).attentions
    assert len(found) == 3
    torch.testing.assert_close(found, original(waveforms, output_attentions=True).attentions)


def test_a_subclass_with_its_own_loss_computes_it() -> None:
    original = OwnLoss(transformers_model("wav2vec2 base", "ForPreTraining").config).eval()
    model = fastssl.accelerate(copy.deepcopy(original))
    waveforms, _ = padded_batch([5000])
    masked = torch.zeros(1, 15, dtype=torch.bool)
    masked[0, 3:7] = True
    negatives = torch.zeros(1, 15, 2, dtype=torch.long)
    given = {"mask_time_indices": masked, "sampled_negative_indices": negatives}
    with torch.no_grad(), pytest.warns(UserWarning, match="replaced `compute_contrastive_loss`, so the original"):
        found, expected = (float(one(waveforms, **given).loss) for one in (model, original))
    assert found == pytest.approx(expected, rel=1e-3)


def test_a_subclass_without_the_parts_of_its_base_is_named() -> None:
    model = made(MyWav2Vec2)
    model.encoder = nn.Sequential(nn.Linear(48, 48))
    with pytest.raises(ValueError, match=r"MyWav2Vec2 has no `encoder\.pos_conv_embed`"):
        fastssl.accelerate(model)
    assert type(model) is MyWav2Vec2
    fastssl.restore(model)


def test_a_subclass_of_torchaudio_is_accelerated() -> None:
    tiny = pytest.importorskip("tests.interop.tiny_torchaudio")
    base = tiny.make("wav2vec2 base")
    expected = fastssl.accelerate(copy.deepcopy(base))

    class Mine(type(base)):  # type: ignore[misc]
        def mean(self, waveforms: Tensor, lengths: Tensor) -> Tensor:
            out: Tensor = self.extract_features(waveforms, lengths)[0][-1].mean(1)
            return out

    class Doubling(Mine):
        def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> Tensor:
            out: Tensor = 2 * super().forward(waveforms, lengths)[0]
            return out

    waveforms, lengths = tiny.batch_of([5000, 900])
    for kind, factor in ((Mine, 1), (Doubling, 2)):
        model = copy.deepcopy(base)
        model.__class__ = kind
        silently(fastssl.accelerate, model)
        assert isinstance(model, kind)
        with torch.no_grad(), Operators() as operators:
            out = model(waveforms, lengths)
            out = out[0] if isinstance(out, tuple) else out
            assert torch.equal(out, factor * expected(waveforms, lengths)[0])
            once = operators.calls
            assert torch.equal(
                model.mean(waveforms, lengths), expected.extract_features(waveforms, lengths)[0][-1].mean(1)
            )
        assert 0 < once < operators.calls
        assert type(fastssl.restore(model)) is kind

"""Test that accelerated methods can be asked and called like the originals."""

import copy
import inspect
import typing
from pathlib import Path
from typing import Any

import pytest
import torch

import fastssl
from tests.interop.tiny_models import (
    ACCELERATED,
    ACCELERATED_FAMILIES,
    EVERY_ACCELERATED_FAMILY,
    assert_close,
    padded_batch,
    transformers_model,
)

transformers = pytest.importorskip("transformers")


def methods() -> list[tuple[Any, Any]]:
    """Return every method that acceleration replaces, with the original's."""
    from fastssl.interop import conformer, pretraining_head, sew
    from fastssl.interop import transformers as ours

    served = (ours.CLASSES, sew.CLASSES, conformer.CLASSES, pretraining_head.CLASSES)
    classes = [one.by_name(name) for one in served for name in one.sources]
    try:
        from fastssl.interop import torchaudio as audio

        classes.append(audio.CLASSES.by_name("Wav2Vec2Model"))
    except (ImportError, OSError, RuntimeError):  # torchaudio does not load with some versions of torch
        pass
    pairs = []
    for cls in classes:
        parent = cls.__mro__[1]
        replaced = [name for name, value in vars(cls).items() if inspect.isfunction(value) and hasattr(parent, name)]
        assert "forward" in replaced
        pairs += [(getattr(cls, name), getattr(parent, name)) for name in replaced if not name.startswith("__")]
    assert len(pairs) >= len(ACCELERATED_FAMILIES) + 2
    return pairs


def test_signature_annotations_and_documentation_are_those_of_the_original() -> None:
    for found, original in methods():
        assert found is not original
        assert inspect.signature(found) == inspect.signature(original)
        named = [p.name for p in inspect.signature(original).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert inspect.getfullargspec(found).args == named
        assert found.__doc__ == original.__doc__
        assert found.__annotations__ == original.__annotations__
        assert (found.__name__, found.__qualname__) == (original.__name__, original.__qualname__)
        try:
            hints = typing.get_type_hints(original)
        except NameError:  # Transformers imports some names for type checkers only
            continue
        assert typing.get_type_hints(found) == hints


@EVERY_ACCELERATED_FAMILY
def test_every_parameter_can_be_given_by_position(variant: str) -> None:
    original = transformers_model(variant)
    model = fastssl.accelerate(copy.deepcopy(original))
    waveforms, mask = padded_batch([5000, 5000])
    by_position = {
        "input_values": waveforms,
        "attention_mask": mask,
        "mask_time_indices": torch.arange(30).view(2, 15) % 7 == 0,
        "output_attentions": None,
        "output_hidden_states": True,
        "return_dict": False,
    }
    parameters = list(inspect.signature(original.forward).parameters.values())
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert names[:3] == list(by_position)[:3]
    given = [by_position[name] for name in names]
    with torch.no_grad():
        found = model(*given)
        assert_close(found[0], original(*given)[0], 2e-4)
    if "return_dict" in names:
        # Transformers 5.23 forgets hidden states that are asked for by position. They are there if asked for by name.
        assert isinstance(found, tuple)
        expected = original(**dict(zip(names, given, strict=True)))
        assert [len(part) for part in found] == [len(part) for part in expected] == [2, 4]


def test_attentions_asked_for_by_position_are_returned() -> None:
    """HuBERT of Transformers 5.23 names `output_attentions`, so a call may give it by position."""
    original = transformers_model("hubert large", attn_implementation="eager")
    names = list(inspect.signature(original.forward).parameters)
    if "output_attentions" not in names:
        pytest.skip("this version of Transformers takes output_attentions by name only")
    model = fastssl.accelerate(copy.deepcopy(original))
    waveforms, mask = padded_batch([5000])
    given = [waveforms, mask, None, True][: names.index("output_attentions") + 1]
    with torch.no_grad(), pytest.warns(UserWarning, match="only the original code computes attention weights"):
        assert len(model(*given).attentions) == 3


def test_wrong_calls_are_refused_as_by_the_original() -> None:
    original = transformers_model("wav2vec2 base", "ForPreTraining")
    model = fastssl.accelerate(copy.deepcopy(original))
    waveforms, _ = padded_batch([5000])
    wrong: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((), {}),
        ((), {"attention_mask": None}),
        ((waveforms,), {"input_values": waveforms}),
        ((waveforms, None, None, None, None), {}),
    ]
    for m in (model, model.wav2vec2, original, original.wav2vec2):
        for args, kwargs in wrong:
            with pytest.raises(TypeError):
                m(*args, **kwargs)
    with pytest.raises(TypeError):
        model.quantizer(torch.randn(1, 15, 32), frames=15)


@pytest.mark.parametrize("head", ["Model", "ForPreTraining"])
@EVERY_ACCELERATED_FAMILY
def test_the_trainer_keeps_the_same_columns(variant: str, head: str, tmp_path: Path) -> None:
    """`Trainer` drops the columns of a data set that the model's `forward` does not name."""
    pytest.importorskip("accelerate")
    if not hasattr(transformers, ACCELERATED[variant][0] + head):
        pytest.skip("there is no such model")
    original = transformers_model(variant, head)
    kept = []
    for model in (original, fastssl.accelerate(copy.deepcopy(original))):
        settings = transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
        trainer = transformers.Trainer(model=model, args=settings)
        trainer._set_signature_columns_if_needed()
        kept.append((trainer._signature_columns, trainer.label_names, trainer.can_return_loss))
    assert kept[0] == kept[1]
    assert {"input_values", "attention_mask"} <= set(kept[0][0])


def test_tools_that_look_at_a_class_see_the_original() -> None:
    generic: Any = pytest.importorskip("transformers.utils.generic")
    for head in ("Model", "ForPreTraining"):
        original = transformers_model("wav2vec2 base", head)
        model = fastssl.accelerate(copy.deepcopy(original))
        assert generic.find_labels(type(model)) == generic.find_labels(type(original))
        assert generic.can_return_loss(type(model)) == generic.can_return_loss(type(original))

"""Checks of what keeps a model: folders, state dicts, pickles and copies, and of changes to its head."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastssl
from tests.interop.conformance.cases import EQUAL, MIXED, Case, assert_alike, assert_equal, call, outcome


def plain_class(case: Case) -> Any:
    import transformers

    return getattr(transformers, f"{case.family}{case.head}")


@torch.no_grad()
def folders(case: Case, tmp_path: Path) -> None:
    """`save_pretrained` writes the original's files, which open as an accelerated and as a plain model."""
    model, original = case.pair()
    for name, one in (("ours", model), ("theirs", original)):
        one.save_pretrained(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == files
    assert "model.safetensors" in files
    for name in files:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name
    plain = plain_class(case).from_pretrained(tmp_path / "ours")
    assert type(plain) is plain_class(case)
    assert_equal(call(plain, case.inputs()), call(original, case.inputs()))
    loaded = type(model).from_pretrained(tmp_path / "ours")  # the class of an accelerated encoder makes such encoders
    assert not loaded.training
    assert type(loaded.base_model) is (type(model) if case.head == "Model" else type(original.base_model))
    for one in (loaded, plain):
        assert_equal(call(fastssl.accelerate(one), case.inputs()), call(model, case.inputs()))


@torch.no_grad()
def folders_in_shards_and_in_another_dtype(case: Case, tmp_path: Path) -> None:
    model, _ = case.pair()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = fastssl.accelerate(plain_class(case).from_pretrained(tmp_path))
    assert_equal(call(loaded, case.inputs(MIXED)), call(model, case.inputs(MIXED)))
    narrow, plain = (kind.from_pretrained(tmp_path, dtype=torch.bfloat16) for kind in (type(model), plain_class(case)))
    dtypes = [{name: one.dtype for name, one in each.named_parameters()} for each in (narrow, plain)]
    assert dtypes[0] == dtypes[1]
    assert torch.bfloat16 in dtypes[0].values()
    given = case.inputs()
    given["input_values"] = given["input_values"].bfloat16()
    assert_equal(*(call(fastssl.accelerate(one), given) for one in (narrow, plain)))


@torch.no_grad()
def state_dicts(case: Case, tmp_path: Path) -> None:
    """A state dict goes either way between an accelerated and a plain model, strictly."""
    model, original = case.pair()
    with torch.no_grad():
        for one in model.parameters():
            one.mul_(1.01)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    other, _ = case.pair()
    for one in (other, original):
        assert not any(one.load_state_dict(saved))
    assert_equal(call(other, case.inputs()), call(model, case.inputs()))
    assert_alike(call(original, case.inputs()), call(model, case.inputs()), relative=1e-3)


@torch.no_grad()
def copies(case: Case, tmp_path: Path) -> None:
    """A copy is accelerated, too; so is a pickle, where the original can be pickled."""
    model, original = case.pair()
    ways: list[Callable[[Any], Any]] = [copy.deepcopy, lambda one: copy.deepcopy(copy.deepcopy(one))]
    if case.family == "Data2VecAudio":  # the others have weight norm, which PyTorch cannot pickle
        ways += [lambda one: pickle.loads(pickle.dumps(one)), _saved_whole]
    else:
        assert all(isinstance(outcome(pickle.dumps, one), Exception) for one in (model, original))
    expected = call(model, case.inputs(MIXED))
    for way in ways:
        other = way(model)
        assert type(other) is type(model)
        assert type(other.base_model) is type(model.base_model)
        assert_equal(call(other, case.inputs(MIXED)), expected)
        for one in other.parameters():
            one.zero_()
    assert_equal(call(model, case.inputs(MIXED)), expected)  # copies share nothing


def _saved_whole(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@torch.no_grad()
def another_number_of_labels(case: Case, tmp_path: Path) -> None:
    """A folder opens with a head of another size, as for fine-tuning on other labels."""
    model, original = case.pair()
    model.save_pretrained(tmp_path)
    size = {"vocab_size": 17} if case.head == "ForCTC" else {"num_labels": 7}
    if case.head == "ForXVector":
        size = {"xvector_output_dim": 9}
    torch.manual_seed(1)
    plain = plain_class(case).from_pretrained(tmp_path, ignore_mismatched_sizes=True, **size)
    model = fastssl.accelerate(copy.deepcopy(plain))
    found, expected = (call(one, case.inputs()) for one in (model, plain))
    assert_alike(found, expected, relative=1e-3)
    assert found.logits.shape[-1] in size.values()
    assert found.logits.shape != call(original, case.inputs()).logits.shape


def a_new_head_in_place(case: Case, tmp_path: Path) -> None:
    """Replacing the head of an accelerated model by a larger one changes the logits' width; it trains."""
    model, original = case.pair()
    name = "lm_head" if case.head == "ForCTC" else "classifier"
    torch.manual_seed(2)
    head = nn.Linear(getattr(model, name).in_features, 13)
    for one in (model, original):
        setattr(one, name, copy.deepcopy(head))
        one.config.vocab_size = one.config.num_labels = 13
        one.num_labels = 13
        one.train()
        call(one, case.inputs(EQUAL, labels=True)).loss.backward()
    ours, theirs = (getattr(one, name).weight.grad for one in (model, original))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    assert_alike(*(call(one.eval(), case.inputs()) for one in (model, original)), relative=1e-3)


@torch.no_grad()
def the_class_makes_models(case: Case, tmp_path: Path) -> None:
    """The class of an accelerated encoder makes accelerated models, with the initial weights of the original."""
    model, original = case.pair()
    models = []
    for one in (model.base_model, original.base_model):
        torch.manual_seed(3)
        models.append(type(one)(one.config).eval())
    for (name, ours), theirs in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    waveforms = case.inputs()["input_values"]
    assert_alike(*(one(waveforms) for one in models), relative=1e-3)
    assert type(fastssl.restore(models[0])) is type(original.base_model)


CHECKS = [
    folders,
    folders_in_shards_and_in_another_dtype,
    state_dicts,
    copies,
    another_number_of_labels,
    a_new_head_in_place,
    the_class_makes_models,
]

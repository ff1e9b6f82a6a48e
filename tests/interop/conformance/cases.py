"""The models of the conformance run: every architecture with every head, in both layouts, and batches for them."""

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import fastssl
from tests.interop.tiny_models import ACCELERATED, CONFORMERS, WITH_ADAPTERS, padded_batch, transformers_model

#: Prefix of Transformers' class names -> the heads that there are for it, besides the model itself.
HEADS = {
    "Wav2Vec2": ["ForCTC", "ForSequenceClassification", "ForAudioFrameClassification", "ForXVector", "ForPreTraining"],
    "Hubert": ["ForCTC", "ForSequenceClassification"],
    "WavLM": ["ForCTC", "ForSequenceClassification", "ForAudioFrameClassification", "ForXVector"],
    "Data2VecAudio": ["ForCTC", "ForSequenceClassification", "ForAudioFrameClassification", "ForXVector"],
    "UniSpeech": ["ForCTC", "ForSequenceClassification", "ForPreTraining"],
    "UniSpeechSat": [
        "ForCTC",
        "ForSequenceClassification",
        "ForAudioFrameClassification",
        "ForXVector",
        "ForPreTraining",
    ],
    "SEW": ["ForCTC", "ForSequenceClassification"],
    "Wav2Vec2Conformer": [
        "ForCTC",
        "ForSequenceClassification",
        "ForAudioFrameClassification",
        "ForXVector",
    ],
}
#: Those with "base" layout (group norm, post-norm) and "large" (layer norm, pre-norm), and one with adapters.
LAYOUTS = (
    *("wav2vec2 base", "wav2vec2 large", "hubert base", "hubert large", "wavlm base", "wavlm large", "data2vec"),
    *("unispeech base", "unispeech large", "unispeech-sat base", "unispeech-sat large", "sew base", "conformer base"),
)
EQUAL, MIXED = (9000, 9000), (9000, 5000, 7000)


class Case(NamedTuple):
    """One model.

    Attributes:
        variant: Name of the architecture and layout in `tiny_models`.
        head: What follows the architecture in the class's name.
    """

    variant: str
    head: str

    def __str__(self) -> str:
        return f"{self.variant} {self.head}"

    @property
    def family(self) -> str:
        return ACCELERATED[self.variant][0]

    @property
    def trains(self) -> bool:
        """Whether our code also runs in training mode."""
        return self.variant not in CONFORMERS

    @property
    def has_labels(self) -> bool:
        return self.head not in ("Model", "ForPreTraining")

    def original(self, **options: Any) -> Any:
        """Return the original in evaluation mode."""
        defaults = {"apply_spec_augment": False, "num_negatives": 8}
        return transformers_model(self.variant, self.head, **defaults | options)

    def pair(self, **options: Any) -> tuple[Any, Any]:
        """Return an accelerated model and an original with the same weights."""
        original = self.original(**options)
        return fastssl.accelerate(copy.deepcopy(original)), original

    def inputs(self, lengths: tuple[int, ...] = EQUAL, *, labels: bool = False, mask: bool = False) -> dict[str, Any]:
        """Return the arguments of a call on a batch of these numbers of samples.

        Args:
            lengths: Samples of each utterance.
            labels: Whether to ask for a loss, if the model has one.
            mask: Whether to give an attention mask even if nothing is padded.
        """
        waveforms, attention_mask = padded_batch(list(lengths))
        given: dict[str, Any] = {"input_values": waveforms}
        if mask or len(set(lengths)) > 1:
            given["attention_mask"] = attention_mask
        frames = [(length - 400) // 320 + 1 for length in lengths]
        if labels and self.has_labels:
            given["labels"] = self._labels(frames)
        if labels and (self.family, self.head) == ("Wav2Vec2", "ForPreTraining"):
            given |= _masks_and_negatives(frames)
        return given

    def _labels(self, frames: list[int]) -> Tensor:
        batch = len(frames)
        if self.head == "ForCTC":
            return torch.tensor([[1, 2, 3], [4, 5, -100], [6, -100, -100]])[:batch]
        if self.head == "ForAudioFrameClassification":
            return nn.functional.one_hot(torch.arange(batch * max(frames)) % 5, 5).view(batch, -1, 5)
        return torch.arange(batch) % 5


def _masks_and_negatives(frames: list[int]) -> dict[str, Tensor]:
    from transformers.models.wav2vec2 import modeling_wav2vec2 as modeling

    generator = torch.Generator().manual_seed(0)
    masked = torch.rand(len(frames), max(frames), generator=generator) < 0.5
    masked &= torch.arange(max(frames)) < torch.tensor(frames).unsqueeze(1)
    state = np.random.get_state()  # noqa: NPY002 (the generator that Transformers draws from)
    np.random.seed(0)  # noqa: NPY002
    negatives = modeling._sample_negative_indices(masked.shape, 8, masked.numpy())
    np.random.set_state(state)  # noqa: NPY002
    return {"mask_time_indices": masked, "sampled_negative_indices": torch.from_numpy(negatives)}


def cases() -> Iterator[Case]:
    """Yield every model."""
    for variant in LAYOUTS:
        for head in ("Model", *HEADS[ACCELERATED[variant][0]]):
            yield Case(variant, head)
    for variant in WITH_ADAPTERS:
        for head in ("Model", "ForCTC"):
            yield Case(variant, head)


#: Check -> the cases that it is for, where it is not for all.
ONLY: dict[str, Callable[[Case], bool]] = {
    # The head draws at random which frames to replace.
    "a_row_is_as_if_alone": lambda case: (case.family, case.head) != ("UniSpeech", "ForPreTraining"),
    "another_number_of_labels": lambda case: case.has_labels,
    "a_new_head_in_place": lambda case: case.head in ("ForCTC", "ForSequenceClassification"),
    "gradients_of_hidden_states_in_a_padded_batch": lambda case: case.head == "Model" and "adapter" not in case.variant,
}


def tensors(output: Any, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors of an output by their place in it, those in tuples too."""
    items = output.items() if hasattr(output, "items") else enumerate(output)
    found: dict[str, Tensor] = {}
    for name, value in items:
        if isinstance(value, Tensor):
            found[f"{prefix}{name}"] = value
        elif isinstance(value, tuple):
            found |= tensors(value, f"{prefix}{name}.")
    return found


def assert_alike(found: Any, expected: Any, *, relative: float = 2e-4) -> None:
    """Assert that two outputs have the same structure, and values that are equal up to rounding."""
    assert type(found) is type(expected)
    if hasattr(expected, "keys"):
        assert list(found.keys()) == list(expected.keys())
    else:
        assert len(found) == len(expected)
    ours, theirs = tensors(found), tensors(expected)
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert ours[name].shape == tensor.shape, name
        error, norm = (ours[name] - tensor).detach().abs().max(), tensor.detach().abs().max()
        assert error <= relative * max(float(norm), 1e-3), f"{name}: {error} of {norm}"


def assert_equal(found: Any, expected: Any) -> None:
    """Assert that two outputs are equal bit for bit."""
    ours, theirs = tensors(found), tensors(expected)
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def call(model: Any, given: dict[str, Any], seed: int = 0, **options: Any) -> Any:
    """Call a model with the random generator in a known state: heads for pre-training draw in evaluation, too."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    return model(**given, **options)


def score(output: Any) -> Tensor:
    """Return a number that depends on all that is trained: the loss, or else a weighted sum of the first outputs."""
    if getattr(output, "loss", None) is not None:
        loss: Tensor = output.loss
        return loss.sum()
    total = torch.zeros(())
    for name, tensor in tensors(output).items():
        if name in ("last_hidden_state", "extract_features", "logits", "projected_states") and tensor.requires_grad:
            weights = torch.sin(torch.arange(tensor[0].numel(), dtype=torch.float32)).view_as(tensor[0])
            total = total + (tensor * weights).float().mean()
    return total


def gradients(model: Any, given: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """Run a training step and return the gradients by name."""
    model.zero_grad()
    score(call(model, given, **options)).backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], *, relative: float = 2e-3) -> None:
    """Assert that the same parameters have gradients, equal up to rounding."""
    assert found.keys() == expected.keys()
    assert found
    scale = max(float(one.abs().max()) for one in expected.values())
    for name, one in expected.items():
        # Attention is invariant to a bias on the keys, so its exact gradient is zero: only rounding remains.
        assert (found[name] - one).abs().max() <= relative * one.abs().max() + 1e-5 * scale, name


def outcome(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Return what a function returns, or the error that it raises."""
    try:
        return function(*arguments, **options)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        return error


def parameters_of(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)

"""Run copies of an encoder for `validate`: the original, the original in a wider dtype, and the accelerated one."""

import copy
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from fastssl.interop.classes import CALLS, NORM, AcceleratedClasses
from fastssl.interop.wrapped import KEPT_BY_ACCELERATE, REPLACED

#: What others store on an encoder itself; it may refer to the given encoder, so copies go without.
OWN = ("forward", "extract_features", "_hf_hook", REPLACED, *KEPT_BY_ACCELERATE)
#: Numbers of modules and configs that make a training step random.
_RANDOM = ("dropout", "layerdrop", "layer_drop", "mask_time_prob", "mask_feature_prob")


class Results(NamedTuple):
    """What an encoder returned.

    Attributes:
        states: Name -> the frames (F, C) of each utterance, in the order in which they are computed.
        gradients: Name of a parameter -> its gradient, None if it got none; empty without training.
    """

    states: dict[str, list[Tensor]]
    gradients: dict[str, Tensor | None]


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Leave modes of the caller that forbid gradients; afterwards, put back the states of random generators."""
    python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (Transformers draws from this generator)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(of_numpy)  # noqa: NPY002
            if torch.is_autocast_enabled(device.type):
                torch.clear_autocast_cache()  # of casts of the copies' parameters


def original_copy(encoder: Any, classes: AcceleratedClasses, dtype: torch.dtype | None = None) -> Any:
    """Return a copy of an encoder with its original code and nothing random; every parameter needs a gradient.

    Args:
        encoder: The encoder, accelerated or not; it does not change.
        classes: Its classes.
        dtype: Dtype of the copy; None keeps the encoder's. The copy shares the memory of parameters of that dtype.
    """
    memo: dict[int, Any] = {}

    def converted(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        tensor = tensor.clone() if tensor.is_inference() else tensor  # autograd saves no inference tensors
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

    for module in encoder.modules():
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in memo:  # not a second time, if modules share it
                memo[id(parameter)] = nn.Parameter(converted(parameter))
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            memo |= {id(hook): hook for hook in hooks.values()}  # a method's object may be anything, and large
        others = [*module._buffers.values(), *vars(module).values()]
        memo |= {id(one): converted(one).clone() for one in others if isinstance(one, Tensor)}
    shell = object.__new__(type(encoder))
    vars(shell).update({name: value for name, value in vars(encoder).items() if name not in OWN})
    made = copy.deepcopy(shell, memo)
    classes.take_off(made)
    _make_certain(made)
    return made


def _make_certain(encoder: nn.Module) -> None:
    for module in encoder.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        if "_gradient_checkpointing_func" in vars(module):
            # The original WavLM never ends with re-entrant checkpointing, which gives the same numbers.
            vars(module)["_gradient_checkpointing_func"] = partial(checkpoint, use_reentrant=False)
        config = vars(module).get("config")
        for owner in (module, config):
            for name in _RANDOM:
                if isinstance(getattr(owner, "__dict__", {}).get(name), (int, float)):
                    setattr(owner, name, 0.0)
        if config is not None and hasattr(config, "apply_spec_augment"):
            config.apply_spec_augment = False


def accelerate_copy(made: Any, encoder: Any, classes: AcceleratedClasses) -> None:
    """Accelerate a copy as the given encoder is, or by default if it is not accelerated."""
    classes.put_on(made, getattr(encoder, NORM, "valid"), getattr(encoder, CALLS, False))


def run(
    encoder: Any,
    classes: AcceleratedClasses,
    batches: Sequence[Sequence[Tensor]],  # of (T,)
    *,
    training: bool,
    frames: dict[str, list[int]] | None = None,
) -> Results:
    """Run an encoder in evaluation and, if wanted, one training step over all batches, if its classes train.

    Args:
        encoder: The encoder.
        classes: Its classes.
        batches: Each has the waveforms of its utterances; those of several utterances are padded.
        training: Whether to compute gradients.
        frames: For each state, the number of frames of each utterance, to cut off padding; None keeps all frames.

    Raises:
        ValueError: The encoder is accelerated, but its original code ran.
    """
    states: dict[str, list[Tensor]] = {}
    gradients: dict[str, Tensor | None] = {}
    call = _torchaudio if classes.home.endswith(".torchaudio") else _transformers
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        encoder.eval()
        with torch.no_grad():
            for waveforms in batches:
                for name, rows in call(encoder, *_padded(waveforms), True).items():
                    counts = [len(row) for row in rows] if frames is None else frames[name][-len(rows) :]
                    states.setdefault(name, []).extend(row[:n] for row, n in zip(rows, counts, strict=True))
        if training:
            encoder.train(classes.trains)
            done = 0
            for waveforms in batches:
                ((name, last),) = call(encoder, *_padded(waveforms), False).items()
                utterances = range(done, done + len(waveforms))
                last.backward(_cotangent(last, utterances, [len(states[name][one]) for one in utterances]))
                done += len(waveforms)
            for name, parameter in encoder.named_parameters():
                gradients[name], parameter.grad = parameter.grad, None
    for one in caught:
        if "so the original code runs" in (message := str(one.message)):
            raise ValueError(f"model: {message}; there is nothing to compare")
    return Results(states, gradients)


def _padded(waveforms: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:  # (B, T), (B,)
    """Return a batch and its lengths; one utterance alone needs no lengths."""
    if len(waveforms) == 1:
        return waveforms[0].unsqueeze(0), None
    lengths = torch.tensor([len(one) for one in waveforms], device=waveforms[0].device)
    return pad_sequence(list(waveforms), batch_first=True), lengths


def _transformers(encoder: Any, waveforms: Tensor, lengths: Tensor | None, all_states: bool) -> dict[str, Tensor]:
    mask = None
    if lengths is not None:
        mask = (torch.arange(waveforms.shape[1], device=waveforms.device) < lengths.unsqueeze(1)).long()
    options = {"output_hidden_states": all_states, "output_attentions": False, "return_dict": True}
    output = encoder(waveforms, attention_mask=mask, **options)
    states: dict[str, Tensor] = {}
    if all_states:
        if (front_end := getattr(output, "extract_features", None)) is not None:
            states["front end"] = front_end
        first, *others = output.hidden_states
        states["input of encoder.layers.0"] = first
        states |= {f"output of encoder.layers.{index}": state for index, state in enumerate(others)}
    return states | {"last hidden state": output.last_hidden_state}


def _torchaudio(encoder: Any, waveforms: Tensor, lengths: Tensor | None, all_states: bool) -> dict[str, Tensor]:
    if not hasattr(type(encoder), NORM):  # the original with WavLM's attention takes no lengths
        lengths = None
    states: dict[str, Tensor] = {}
    if all_states:
        layers, _ = encoder.extract_features(waveforms, lengths)
        states = {f"output of encoder.transformer.layers.{index}": state for index, state in enumerate(layers)}
    return states | {"output of the encoder" if encoder.aux is None else "logits": encoder(waveforms, lengths)[0]}


def _cotangent(last: Tensor, utterances: Sequence[int], frames: Sequence[int]) -> Tensor:  # (B, F, C)
    """Return the gradient with respect to the last state: random signs on frames, 0 on padding.

    Divided by about the square root of the number of frames, so that sums over frames do not overflow in fp16. As the
    divisor is a power of 2, the numbers are the same in every dtype.
    """
    out = torch.zeros(last.shape, device="cpu")
    for row, utterance, count in zip(out, utterances, frames, strict=True):
        generator = torch.Generator().manual_seed(utterance)
        signs = torch.randint(0, 2, (count, last.shape[2]), generator=generator, device="cpu") * 2 - 1
        row[:count] = signs * 2.0 ** -round(np.log2(max(count, 1)) / 2)
    return out.to(last)

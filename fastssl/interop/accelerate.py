"""`accelerate` and `restore`: which encoders a model has, and whose code runs them."""

import sys
from types import ModuleType
from typing import Literal, TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)
Norm = Literal["valid", "padded"]


def accelerate(model: Model, *, norm: Norm = "valid") -> Model:
    """Run the speech encoders in a model packed and fused, in place: parameters, state dict and calls stay the same.

    Args:
        model: A Transformers or torchaudio encoder, or any module that holds one: a head, a pipeline's wrapper, a
            PEFT model, your own.
        norm: What the group norm of a padded batch is over: "valid", the samples of each utterance, so that batch mates
            do not matter; or "padded", the padding too, as the original does it.

    Returns:
        The model itself. Accelerating it again only sets `norm`.

    Raises:
        ValueError: There is no encoder in it that is known here, or one has a part that is not served; nothing is
            changed then.
    """
    if norm not in ("valid", "padded"):
        raise ValueError(f"norm: must be 'valid' or 'padded', got {norm!r}")
    found = [(module, library) for module in model.modules() for library in _libraries() if library.knows(module)]
    if not found:
        known = ", ".join([*_transformers().KNOWN, *_torchaudio().KNOWN])
        raise ValueError(f"model: {type(model).__name__} has no encoder that can be accelerated; known: {known}")
    for module, library in found:
        library.check(module)
    for module, library in found:
        library.accelerate(module, norm)
    return model


def restore(model: Model) -> Model:
    """Give a model its own code back; its parameters are what they have become.

    Returns:
        The model itself; one that was never accelerated is left as it is.
    """
    for module in model.modules():
        for library in _libraries():
            library.restore(module)
    return model


def _libraries() -> list[ModuleType]:
    """Ours for the libraries that are in use: a model of another one cannot be there."""
    libraries = [_transformers(), _pretraining_head()] if "transformers" in sys.modules else []
    # torchaudio does not import beside every torch, so whether it does is left to who has a model of it.
    return [*libraries, _torchaudio()] if _torchaudio().MODULE in sys.modules else libraries


def _transformers() -> ModuleType:
    from fastssl.interop import transformers

    return transformers


def _pretraining_head() -> ModuleType:
    from fastssl.interop import pretraining_head

    return pretraining_head


def _torchaudio() -> ModuleType:
    from fastssl.interop import torchaudio

    return torchaudio

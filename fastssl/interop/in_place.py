"""`accelerate` and `restore`: which encoders a model has, and whose code runs them."""

import sys
from types import ModuleType
from typing import Literal, TypeVar

from torch import nn

from fastssl.models.folder import ACCELERATED_COMPRESSOR
from fastssl.nn.compression import SequenceCompressor

Model = TypeVar("Model", bound=nn.Module)
Norm = Literal["valid", "padded"]


def accelerate(model: Model, *, norm: Norm = "valid", compressor: SequenceCompressor | None = None) -> Model:
    """Run the speech encoders in a model packed and fused, in place: parameters, state dict and calls stay the same.

    With a compressor the transformer layers see fewer frames, which costs less, and their outputs are repeated for the
    frames that went into each, so that heads and what counts frames work as before. It takes the projected frames,
    becomes a submodule of the encoder (`fastssl_compressor`), learns with it, and is in its state dict, but in no
    folder that Transformers opens again: keep `compressor.state_dict()` beside it. `compressor.rate` and
    `compressor.frame_period_ms` say how much. An encoder that never met fewer frames in training serves them badly.

    Args:
        model: A Transformers or torchaudio encoder, or any module that holds one: a head, a pipeline's wrapper, a
            PEFT model, your own.
        norm: What the group norm of a padded batch is over: "valid", the samples of each utterance, so that batch mates
            do not matter; or "padded", the padding too, as the original does it.
        compressor: Of as many channels as the encoder is wide; None leaves the one that it may have.

    Returns:
        The model itself. Accelerating it again only sets `norm` and, where given, the compressor.

    Raises:
        ValueError: There is no encoder in it that is known here, or one has a part that is not served, or the
            compressor does not fit, or there are several for one; nothing is changed then.
    """
    if norm not in ("valid", "padded"):
        raise ValueError(f"norm: must be 'valid' or 'padded', got {norm!r}")
    found = [(module, library) for module in model.modules() for library in _libraries() if library.knows(module)]
    if not found:
        known = ", ".join([*_transformers().KNOWN, *_torchaudio().KNOWN])
        raise ValueError(f"model: {type(model).__name__} has no encoder that can be accelerated; known: {known}")
    for module, library in found:
        library.check(module)
    if compressor is not None:
        encoders = [(module, library) for module, library in found if hasattr(library, "width")]
        if len(encoders) != 1:
            raise ValueError(f"compressor: is for one encoder, and {type(model).__name__} has {len(encoders)}")
        ((encoder, library),) = encoders
        if compressor.channels != library.width(encoder):
            raise ValueError(
                f"compressor: is of {compressor.channels} channels, and the encoder {library.width(encoder)} wide"
            )
        like = next(encoder.parameters())
        compressor.to(device=like.device, dtype=like.dtype).train(encoder.training)
        setattr(encoder, ACCELERATED_COMPRESSOR, compressor)
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

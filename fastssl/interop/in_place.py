"""`accelerate` and `restore`: which encoders a model has, and whose code runs them."""

import sys
from typing import Literal, TypeVar

from torch import nn

from fastssl.interop.classes import AcceleratedClasses
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
    found = [(module, classes) for module in model.modules() for classes in _in_use() if classes.original(module)]
    if not found:
        sources = [source for classes in _served() if classes.width for source in classes.sources.items()]
        known = ", ".join(f"{module.partition('.')[0]}.{name}" for name, module in sources)
        raise ValueError(f"model: {type(model).__name__} has no encoder that can be accelerated; known: {known}")
    for module, classes in found:
        if classes.check:
            classes.check(module)
    if compressor is not None:
        encoders = [(module, classes.width(module)) for module, classes in found if classes.width]
        if len(encoders) != 1:
            raise ValueError(f"compressor: is for one encoder, and {type(model).__name__} has {len(encoders)}")
        ((encoder, width),) = encoders
        if compressor.channels != width:
            raise ValueError(f"compressor: is of {compressor.channels} channels, and the encoder {width} wide")
        like = next(encoder.parameters())
        compressor.to(device=like.device, dtype=like.dtype).train(encoder.training)
        setattr(encoder, ACCELERATED_COMPRESSOR, compressor)
    for module, classes in found:
        classes.put_on(module, norm)
    return model


def restore(model: Model) -> Model:
    """Give a model its own code back; its parameters are what they have become.

    Returns:
        The model itself; one that was never accelerated is left as it is.
    """
    for module in model.modules():
        for classes in _in_use():
            classes.take_off(module)
    return model


def _served() -> list[AcceleratedClasses]:
    from fastssl.interop import pretraining_head, torchaudio, transformers

    return [transformers.CLASSES, pretraining_head.CLASSES, torchaudio.CLASSES]


def _in_use() -> list[AcceleratedClasses]:
    """Those of libraries that somebody has imported: a model of another one cannot exist."""
    # torchaudio does not import beside every torch, so whether it does is left to whoever has a model of it.
    return [classes for classes in _served() if any(source in sys.modules for source in classes.sources.values())]

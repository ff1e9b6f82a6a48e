"""`accelerate` and `restore`: switch the encoders in a model between fastssl's code and their original code."""

import sys
from typing import Literal, TypeVar

from torch import nn

from fastssl.interop.classes import AcceleratedClasses
from fastssl.models.folder import ACCELERATED_COMPRESSOR
from fastssl.nn.compression import SequenceCompressor

Model = TypeVar("Model", bound=nn.Module)
Norm = Literal["valid", "padded"]


def accelerate(model: Model, *, norm: Norm = "valid", compressor: SequenceCompressor | None = None) -> Model:
    """Make the speech encoders in a model run packed and fused, in place; parameters and calls stay the same.

    A compressor shortens the projected frames, so the transformer layers process fewer frames at less cost. Each output
    is then repeated for the frames that were merged into it, so heads and code that counts frames work as before. The
    compressor becomes a submodule of the encoder (`fastssl_compressor`), is trained with it and appears in its state
    dict. Transformers does not load it again, so save `compressor.state_dict()` separately. Set the amount of
    compression with `compressor.rate` or `compressor.frame_period_ms`. An encoder that was not trained on compressed
    frames performs poorly on them.

    On a GPU, the host waits once per call if it gets a mask or lengths that are on the GPU, and not at all without
    them. Compression by integrate-and-fire, and the quantiser of `Wav2Vec2ForPreTraining` if it gets a mask, wait once
    more.

    Args:
        model: A Transformers or torchaudio encoder, or any module that contains one: a model with a head, a pipeline's
            wrapper, a PEFT model, your own module.
        norm: What the statistics of a group norm in the convolutions cover. "valid" takes only the samples of each
            utterance, so results do not depend on the rest of the batch. "padded" includes the padding, as the
            original does.
        compressor: Compressor whose `channels` equal the encoder's width; None keeps the compressor that the encoder
            has, if any.

    Returns:
        The same model. Accelerating it again only sets `norm` and, if given, the compressor.

    Raises:
        ValueError: `norm` is unknown, the model contains no supported encoder, an encoder has an unsupported part, the
            compressor's width is not the encoder's, or a compressor is given for a model with several encoders. The
            model is then unchanged.
    """
    if norm not in ("valid", "padded"):
        raise ValueError(f"norm: must be 'valid' or 'padded', got {norm!r}")
    found = [(module, classes) for module in model.modules() for classes in _in_use() if classes.original(module)]
    if not found:
        sources = [source for classes in _served() if classes.width for source in classes.sources.items()]
        known = ", ".join(f"{module.partition('.')[0]}.{name}" for name, module in sources)
        raise ValueError(
            f"model: {type(model).__name__} has no encoder that can be accelerated; expected one of {known}"
        )
    for module, classes in found:
        if classes.check:
            classes.check(module)
    if compressor is not None:
        encoders = [(module, classes.width(module)) for module, classes in found if classes.width]
        if len(encoders) != 1:
            raise ValueError(
                f"compressor: expected a model with one encoder, but {type(model).__name__} has {len(encoders)}; "
                "accelerate each encoder with its own compressor"
            )
        ((encoder, width),) = encoders
        if compressor.channels != width:
            raise ValueError(f"compressor: has {compressor.channels} channels, but the encoder's width is {width}")
        like = next(encoder.parameters())
        compressor.to(device=like.device, dtype=like.dtype).train(encoder.training)
        setattr(encoder, ACCELERATED_COMPRESSOR, compressor)
    for module, classes in found:
        classes.put_on(module, norm)
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate` in place: the encoders run their original code again, and compressors are removed.

    Parameters keep their current values.

    Args:
        model: Any module; parts that were never accelerated do not change.

    Returns:
        The same model.
    """
    for module in model.modules():
        for classes in _in_use():
            classes.take_off(module)
    return model


def _served() -> list[AcceleratedClasses]:
    from fastssl.interop import pretraining_head, torchaudio, transformers

    return [transformers.CLASSES, pretraining_head.CLASSES, torchaudio.CLASSES]


def _in_use() -> list[AcceleratedClasses]:
    """Return the classes whose library has been imported; a model of any other library cannot exist yet."""
    # Importing torchaudio here could fail, because it does not work with every version of torch.
    return [classes for classes in _served() if any(source in sys.modules for source in classes.sources.values())]

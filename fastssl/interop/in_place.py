"""`accelerate` and `restore`: switch the encoders in a model between fastssl's code and their original code."""

import sys
import warnings
from functools import cache
from typing import Literal, TypeVar

from torch import nn

from fastssl.interop import read_only
from fastssl.interop.classes import NORM, AcceleratedClasses
from fastssl.kernels.gpus import is_unproven
from fastssl.kernels.prepacked_conv.weights import Format
from fastssl.models.folder import ACCELERATED_COMPRESSOR
from fastssl.models.inference import check_format, is_prepacked, prepack_encoder, unpack_encoder
from fastssl.nn.compression import SequenceCompressor
from fastssl.nn.prepacked import Prepacked

Model = TypeVar("Model", bound=nn.Module)
Norm = Literal["valid", "padded"]
#: Attribute that only encoders with prepacked weights have: the names of the parameters that needed gradients before.
_LEARNED = "_fastssl_learned"


def accelerate(
    model: Model,
    *,
    norm: Norm = "valid",
    compressor: SequenceCompressor | None = None,
    call_projections: bool = False,
    inference: Format | None = None,
) -> Model:
    """Make the speech encoders in a model run packed and fused, in place; parameters and calls stay the same.

    A compressor shortens the projected frames, so the transformer layers process fewer frames at less cost. Each output
    is then repeated for the frames that were merged into it, so heads and code that counts frames work as before. The
    compressor becomes a submodule of the encoder (`fastssl_compressor`), is trained with it and appears in its state
    dict. Transformers does not load it again, so save `compressor.state_dict()` separately. Set the amount of
    compression with `compressor.rate` or `compressor.frame_period_ms`. An encoder that was not trained on compressed
    frames performs poorly on them.

    An `attention_mask` of Transformers may pad each row on the right or on the left. The L frames of an utterance are
    computed from its samples alone. They are the first L of the F frames of its row, or the last L if it is padded on
    the left. In `last_hidden_state`, padding repeats the utterance's last frame, or on the left its first one; in
    `hidden_states` and `extract_features` it is zero. The encoder's `_get_feature_vector_attention_mask` marks the same
    L frames. Heads of Transformers that count frames (for CTC, sequence classification, x-vectors and pre-training)
    always use the first L of a row. While such a head calls the encoder, all frames are therefore at the beginning of
    their rows. Any other mask needs `norm="padded"`. If a feature extractor of Transformers both pads on the left and
    normalises, it overwrites samples: set its `do_normalize=False`, and normalise each utterance yourself.

    On a GPU, the host waits once per call if it gets a mask or lengths that are on the GPU, and not at all without
    them. Compression by integrate-and-fire, and the quantiser of `Wav2Vec2ForPreTraining` if it gets a mask, wait once
    more.

    Of Transformers' Conformer, only evaluation is accelerated: in training, its batch norms use the statistics of the
    whole batch. A call in training mode runs the original code, and the first one warns.

    If somebody else's `forward` is on an encoder itself (Accelerate's `prepare` or device hooks, a partial), fastssl's
    code runs inside it. A warning says where that cannot be done.

    An encoder of a subclass, your own or one that a tool made, keeps all that its class adds. A `forward` that the
    subclass overrides runs as it is, and `super().forward` in it is fastssl's code.

    The first model on a GPU on which the kernels have not been run yet comes with a warning: compare it with the
    original with `fastssl.validate(model)`.

    Args:
        model: A Transformers or torchaudio encoder, or any module that contains one: a model with a head, a pipeline's
            wrapper, a PEFT model, your own module.
        norm: What the statistics of a group norm in the convolutions cover. "valid" takes only the samples of each
            utterance, so results do not depend on the rest of the batch. "padded" includes the padding, as the
            original does, and computes data2vec's positional embedding over padding, too. It takes any
            `attention_mask` of zeros and ones as the original does: as right padding of the same sum.
            With "padded", SEW also averages an utterance's last frames with the zeros after it, as the original does in
            a padded batch (see `fastssl.interop.sew`).
        compressor: Compressor whose `channels` equal the encoder's width; None keeps the compressor that the encoder
            has, if any. In SEW, it shortens the squeezed frames.
        call_projections: Whether to call the modules that an original only reads: `q_proj`, `k_proj`, `v_proj` and
            `out_proj` of Transformers' WavLM. By default they are only read here too, so LoRA on them has no effect, as
            in the original; a warning says so. If they are called, LoRA on them is trained and applied, but only while
            the model is accelerated, or after it was merged into the weights. Other encoders call these modules anyway.
        inference: Lay out the encoders' weights for inference on the CPU, in place of the parameters, as
            `load_encoder` does: "fp32", "bf16" or "int8". Heads stay as they are. The encoders then run in evaluation
            mode only, and their parameters need no gradients. `restore` brings the layers back, with the values that
            were computed with. None leaves the weights as they are.

    Returns:
        The same model. Accelerating it again only sets `norm`, `call_projections` and, if given, the compressor.

    Raises:
        ValueError: `norm` is unknown, the model contains no supported encoder, an encoder has an unsupported part or is
            in an unsupported mode, the compressor's width is not the encoder's, a compressor is given for a model with
            several encoders, or for one with a `forward` of somebody else in which fastssl's does not run, or
            `call_projections` is given for torchaudio's WavLM, which has no such modules; or `inference` is unknown,
            not available on this processor, or asked for on a GPU, in another precision than fp32, a second time with
            another value, with norm "padded", or for an encoder in which fastssl's code does not run. The model is then
            unchanged.
    """
    if norm not in ("valid", "padded"):
        raise ValueError(f"norm: must be 'valid' or 'padded', got {norm!r}")
    found = served_modules(model)
    encoders = [module for module, classes in found if classes.width]
    if inference is not None:
        check_format(inference)
        for encoder in encoders:
            _check_prepacking(encoder, inference)
    for module, classes in found:
        if classes.check:
            classes.check(module)
        if call_projections and classes.layers:
            read_only.check_callable(module, classes.layers(module))
    hidden = [(module, *why) for module, classes in found if (why := _why_hidden(module, classes))]
    if inference is not None or any(map(is_prepacked, encoders)):
        if norm == "padded":
            raise ValueError("inference: prepacked weights need norm='valid', because norm='padded' runs original code")
        for _, reason, cure in hidden:
            raise ValueError(f"inference: {reason}, which cannot compute with prepacked weights; {cure}")
    for module, reason, cure in hidden:
        if compressor is not None or hasattr(module, ACCELERATED_COMPRESSOR):
            raise ValueError(f"compressor: {reason}, which cannot apply the compressor; {cure}")
    if compressor is not None:
        widths = [(module, classes.width(module)) for module, classes in found if classes.width]
        if len(widths) != 1:
            raise ValueError(
                f"compressor: expected a model with one encoder, but {type(model).__name__} has {len(widths)}; "
                "accelerate each encoder with its own compressor"
            )
        ((encoder, width),) = widths
        if compressor.channels != width:
            raise ValueError(f"compressor: has {compressor.channels} channels, but the encoder's width is {width}")
        like = next(encoder.parameters())
        compressor.to(device=like.device, dtype=like.dtype).train(encoder.training)
        setattr(encoder, ACCELERATED_COMPRESSOR, compressor)
    for module, classes in found:
        classes.put_on(module, norm, call_projections)
        if classes.layers:
            read_only.warn_once(module, classes.layers(module), again=True)
    for encoder in encoders:
        if inference is not None and not is_prepacked(encoder):
            named = encoder.named_parameters(remove_duplicate=False)  # weights that are tied now will not be later
            setattr(encoder, _LEARNED, [name for name, one in named if one.requires_grad])
            prepack_encoder(encoder, inference)
    for _, reason, cure in hidden:
        warnings.warn(f"{reason}, without acceleration; {cure}", stacklevel=2)
    if any(is_unproven(parameter.device) for module, _ in found for parameter in module.parameters()):
        _warn_of_unproven_kernels()
    return model


def _check_prepacking(encoder: nn.Module, format: Format) -> None:
    """Raise ValueError if the weights of an encoder cannot be prepacked in a format."""
    kind = type(encoder).__name__
    if formats := {part.packed.format for part in encoder.modules() if isinstance(part, Prepacked)}:
        if (before := "int8" if "int8" in formats else formats.pop()) != format:
            raise ValueError(
                f"inference: the weights of this {kind} are prepacked as {before!r} already; load the model again"
            )
        return
    kinds = {f"{parameter.dtype} on {parameter.device.type}" for parameter in encoder.parameters()}
    if kinds != {"torch.float32 on cpu"}:
        raise ValueError(
            f"inference: expected a {kind} in torch.float32 on the CPU, got {', '.join(sorted(kinds))}; call "
            "`model.float().cpu()` first"
        )


def _why_hidden(module: nn.Module, classes: AcceleratedClasses) -> tuple[str, str] | None:
    """Return why the accelerated code of a module will not run, and what to do about it; None if it will."""
    kind = type(module).__name__
    if name := classes.hidden(module):
        own = vars(module)[name]
        what = getattr(own, "__qualname__", type(own).__qualname__)
        return (
            f"a {kind} has its own `{name}` ({what}), which hides fastssl's, so the original code runs",
            "call `fastssl.accelerate` before what put it there, such as `Accelerator.prepare`, or remove it",
        )
    if name := classes.overridden(module):
        return (
            f"the class {kind} overrides `{name}` without `super()`, so its own code runs",
            f"call `super().{name}` in it to get fastssl's",
        )
    return None


def served_modules(model: nn.Module) -> list[tuple[nn.Module, AcceleratedClasses]]:
    """Return the modules in a model that `accelerate` changes, accelerated or not, with the classes of each.

    Raises:
        ValueError: There is none.
    """
    found = [(module, classes) for module in model.modules() for classes in _in_use() if classes.original(module)]
    if not found:
        sources = [source for classes in _served() if classes.width for source in classes.sources.items()]
        known = ", ".join(f"{module.partition('.')[0]}.{name}" for name, module in sources)
        raise ValueError(
            f"model: {type(model).__name__} has no encoder that can be accelerated; expected one of {known}"
        )
    return found


@cache
def _warn_of_unproven_kernels() -> None:
    """Warn once per process."""
    warnings.warn(
        "fastssl's kernels have not been run on a GPU of this kind yet: compare the model with the original with "
        "`fastssl.validate(model)`, and run `fastssl check`, which tests every kernel",
        stacklevel=3,
    )


def restore(model: Model) -> Model:
    """Undo `accelerate` in place: the encoders run their original code again, and compressors are removed.

    Parameters keep their current values. A warning names adapters that the original code ignores, where
    `call_projections` was set.

    Args:
        model: Any module; parts that were never accelerated do not change.

    Returns:
        The same model.
    """
    for module in model.modules():
        for classes in _in_use():
            layers = classes.layers if classes.original(module) and hasattr(type(module), NORM) else None
            if layers and (lost := read_only.lost(module, layers(module))):
                warnings.warn(f"{lost}; merge them into the weights before (PEFT: `merge_and_unload`)", stacklevel=2)
            if classes.original(module) and hasattr(module, _LEARNED):
                unpack_encoder(module)
                learned = set(vars(module).pop(_LEARNED))
                for name, parameter in module.named_parameters():
                    parameter.requires_grad_(name in learned)
            classes.take_off(module)
    return model


def _served() -> list[AcceleratedClasses]:
    from fastssl.interop import conformer, pretraining_head, sew, torchaudio, transformers

    return [transformers.CLASSES, sew.CLASSES, conformer.CLASSES, pretraining_head.CLASSES, torchaudio.CLASSES]


def _in_use() -> list[AcceleratedClasses]:
    """Return the classes whose library has been imported; a model of any other library cannot exist yet."""
    # Importing torchaudio here could fail, because it does not work with every version of torch.
    return [classes for classes in _served() if any(source in sys.modules for source in classes.sources.values())]

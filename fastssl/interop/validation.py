"""`validate`: compare an accelerated model with the original, on the machine, the device and the dtype it runs on."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastssl.interop import read_only
from fastssl.interop.classes import NORM, AcceleratedClasses
from fastssl.interop.in_place import served_modules
from fastssl.interop.speech_like import speech_like
from fastssl.interop.validation_report import Comparison, ValidationError, ValidationReport
from fastssl.interop.validation_runs import OWN, Results, accelerate_copy, original_copy, run, undisturbed
from fastssl.kernels.precision import fp32_precision
from fastssl.models.folder import ACCELERATED_COMPRESSOR
from fastssl.nn import linear

_RATE_HZ = 16_000
_SHORTEST_S = 0.1
#: The band: multiples of the original's rounding error, and of the dtype's eps at the largest value.
_ROUNDINGS, _UNITS = 5, 8


def validate(
    model: nn.Module, *, seconds: Iterable[float] = (0.4, 1.7, 4.0, 10.0), training: bool = True
) -> ValidationReport:
    """Compare the encoders in a model with their original code, and raise an error if they differ.

    Both run on the same synthesised, speech-like utterances, on the model's device, in its dtype or under the autocast
    that is active. Compared are every hidden state in evaluation, and the gradients of all parameters of the encoder
    after one training step over all utterances, without dropout, layer drop and SpecAugment. Adapters (LoRA) within the
    encoder are included, and frozen parameters get gradients, too. A Conformer gets them in evaluation. The accelerated
    encoder runs twice: on each utterance alone, where it must agree with the original, and on one padded batch, whose
    rows must agree with the original on each utterance alone.

    How much may they differ? The original itself differs from exact arithmetic by rounding. That error is measured: the
    original runs once more in a wider dtype (fp64 for a model in fp32, full fp32 for one in bf16 or fp16). Let r be the
    largest difference that this makes to a state, and m the largest absolute value in the state. The accelerated code
    takes the same sums in another order, so its own error is of the same size. `fastssl check` allows 4 r + 8 eps m
    (eps of the dtype). The original is r away from the exact result, so both are at most 5 r + 8 eps m apart: that is
    the band. Because r is measured at the same depth, the band grows from layer to layer as rounding does. Of a
    parameter's gradient, r is its own, and m is the largest gradient in its layer: the bias of attention's keys, for
    one, has no gradient but what the rounding of larger terms leaves. Gradients are sums over all frames of a call.
    In bf16 and fp16, their rounding grows with the number of frames, so r is measured on a padded batch, too.

    The model is not changed: parameters, buffers, gradients, hooks, modes, and whether it is accelerated. Random
    generators get their states back. Copies run, which share the parameters' memory. With what the wider dtype and
    gradients need, a model in fp32 takes about seven times the memory of its weights (3 GB at base size, 9 GB at large
    size), and that of activations. Hooks on modules within the encoder are called.

    Args:
        model: A Transformers or torchaudio encoder, or any module that contains some, as for `accelerate`; accelerated
            or not. Parts outside the encoders are not compared.
        seconds: Lengths of the utterances. Time and memory grow with them.
        training: Whether to compare gradients, which takes most of the time and memory.

    Returns:
        The report; `print` it for a table.

    Raises:
        ValidationError: They differ by more than rounding. The error names the state where this begins, and has the
            report.
        ValueError: There is no length, or one below 0.1 s; or the model cannot be compared: it has no supported
            encoder, is in fp64, is quantised, sharded, without storage or on several devices, the original ignores
            adapters that `call_projections` calls, or the original code runs in any case, because of a hook or a
            foreign module.
    """
    seconds = tuple(seconds)
    lengths = [round(length * _RATE_HZ) if math.isfinite(length) else 0 for length in seconds]
    if not lengths or min(lengths) < _SHORTEST_S * _RATE_HZ:
        raise ValueError(f"seconds: expected lengths of {_SHORTEST_S} s or more, got {seconds}")
    subjects = _subjects(model)
    notes, comparisons = [], []
    for name, subject in subjects.items():
        notes += subject.notes(name, model)
        with undisturbed(subject.device):
            waveforms = [torch.from_numpy(speech_like(length, seed=n)) for n, length in enumerate(lengths)]
            found = subject.compared([one.to(subject.device) for one in waveforms], training=training)
        comparisons += [one._replace(name=f"{name}: {one.name}") if len(subjects) > 1 else one for one in found]
    first = next(iter(subjects.values()))
    device, dtype, exact = (str(one).removeprefix("torch.") for one in (first.device, first.dtype, first.exact_dtype))
    report = ValidationReport(device, dtype, exact, seconds, tuple(notes), tuple(comparisons))
    if report.wrong:
        raise ValidationError(report)
    return report


def _subjects(model: nn.Module) -> dict[str, "_Subject"]:
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(module)]: _Subject(module, classes) for module, classes in served_modules(model) if classes.width}


class _Band(NamedTuple):
    """The largest absolute value of a tensor, the original's rounding error, and the difference that is allowed."""

    norm: float
    rounding: float
    allowed: float


class _Subject:
    """One encoder to compare.

    Attributes:
        device: Where its parameters are.
        dtype: What it computes in.
        exact_dtype: The wider dtype.
    """

    def __init__(self, encoder: Any, classes: AcceleratedClasses) -> None:
        self.encoder, self.classes = encoder, classes
        _refuse(encoder, classes)
        self.device: torch.device = next(encoder.parameters()).device
        self.dtype = _dtype(encoder, self.device)
        self.exact_dtype = torch.float64 if self.dtype == torch.float32 else torch.float32

    def notes(self, name: str, model: nn.Module) -> list[str]:
        """Say in one sentence each what is compared and what is not."""
        original = self.classes.original(self.encoder)
        kind = f"{original.__name__} of {original.__module__.partition('.')[0]}"
        inside = f", `{name}` of a {type(model).__name__}; parts outside it are not compared" if name else ""
        notes = [f"compared: {kind}{inside}"]
        if any(not other.width for _, other in served_modules(model)):
            notes.append(
                "left out: the quantiser and the loss, which are accelerated too; `fastssl check` runs their ops"
            )
        if hasattr(self.encoder, ACCELERATED_COMPRESSOR):
            notes.append("left out: the compressor, which the original does not have; the layers get all frames")
        if not self._has_rows_of_its_own:
            notes.append('left out: a padded batch, because with norm="padded" its rows depend on the padding')
        if not self.classes.trains:
            notes.append("left out: training, which the original code runs; gradients are those of evaluation")
        if any(one in vars(self.encoder) for one in OWN):
            notes.append("left out: the `forward` that others put on the encoder; enter its autocast yourself")
        return notes

    @property
    def _has_rows_of_its_own(self) -> bool:
        return bool(getattr(self.encoder, NORM, "valid") == "valid")

    def compared(self, waveforms: Sequence[Tensor], *, training: bool) -> list[Comparison]:  # of (T,)
        """Run the original in both dtypes and the accelerated encoder, and compare them."""
        encoder, classes = self.encoder, self.classes
        rounded = [one.to(_input_dtype(encoder)) for one in waveforms]
        alone = [[one] for one in rounded]
        batches = [alone]
        if training and self.exact_dtype == torch.float32 and self._has_rows_of_its_own:
            batches.append([rounded])
        plain = [run(original_copy(encoder, classes), classes, one, training=training) for one in batches]
        with (
            torch.autocast(self.device.type, enabled=False),
            fp32_precision(convolutions="ieee", matrix_products="ieee"),
        ):
            made = original_copy(encoder, classes, self.exact_dtype)
            wide = [[[one.to(self.exact_dtype) for one in several] for several in batch] for batch in batches]
            exact = [run(made, classes, one, training=training) for one in wide]
        bands = self._bands(plain, exact)
        del exact, plain[1:]
        made = original_copy(encoder, classes)
        accelerate_copy(made, encoder, classes)
        found = [_differences(plain[0], run(made, classes, alone, training=training))]
        if self._has_rows_of_its_own:
            frames = {name: [len(one) for one in states] for name, states in plain[0].states.items()}
            found.append(_differences(plain[0], run(made, classes, [rounded], training=training, frames=frames)))
        states = [_of_state(name, bands, found) for name in plain[0].states]
        return states + _of_layers(list(plain[0].gradients), bands, found)

    def _bands(self, plain: Sequence[Results], exact: Sequence[Results]) -> dict[str, _Band]:
        """Return the band of each state and gradient.

        Args:
            plain: Results of the original on each utterance alone, and maybe of gradients in a padded batch.
            exact: The same in the wider dtype.
        """
        unit = torch.finfo(self.dtype).eps
        norms = {name: _greatest(map(_largest, states)) for name, states in exact[0].states.items()}
        in_layer: dict[str, float] = {}
        for name, gradient in exact[0].gradients.items():
            in_layer[_layer(name)] = _greatest((in_layer.get(_layer(name), 0.0), _largest(gradient)))
        norms |= {name: in_layer[_layer(name)] for name in exact[0].gradients}
        bands = {}
        roundings = [_differences(*pair) for pair in zip(plain, exact, strict=True)]
        for name, norm in norms.items():
            used = roundings if name in exact[0].gradients else roundings[:1]
            rounding = _greatest(one[name] for one in used)
            bands[name] = _Band(norm, rounding, _ROUNDINGS * rounding + _UNITS * unit * norm)
        return bands


def _differences(expected: Results, found: Results) -> dict[str, float]:
    """Return the largest absolute difference of each state and of each parameter's gradient, by name."""
    states = {
        name: _greatest(_difference(*pair) for pair in zip(states, found.states[name], strict=True))
        for name, states in expected.states.items()
    }
    return states | {name: _difference(one, found.gradients[name]) for name, one in expected.gradients.items()}


def _difference(x: Tensor | None, y: Tensor | None) -> float:
    if x is None or y is None:
        return 0.0 if x is y else math.inf
    if x.shape != y.shape:
        return math.inf
    return _largest(x.double() - y.double())


def _greatest(numbers: Iterable[float]) -> float:
    """Return the greatest number, or NaN if there is one, which `max` may leave out."""
    found = list(numbers)
    return math.nan if any(map(math.isnan, found)) else max(found)


def _largest(x: Tensor | None) -> float:
    return 0.0 if x is None or not x.numel() else float(x.abs().max())


def _of_state(name: str, bands: dict[str, _Band], found: list[dict[str, float]]) -> Comparison:
    norm, rounding, allowed = bands[name]
    alone, *batch = (_share(one[name], norm) for one in found)
    return Comparison(name, alone, batch[0] if batch else None, _share(rounding, norm), _share(allowed, norm))


def _share(x: float, norm: float) -> float:
    return x / norm if norm else math.copysign(math.inf, x) if x else 0.0


def _of_layers(names: list[str], bands: dict[str, _Band], found: list[dict[str, float]]) -> list[Comparison]:
    """Return the gradients of each layer, of which the worst parameter counts; the last layer comes first."""
    layers: dict[str, list[Comparison]] = {}
    for name in reversed(names):
        one = _of_state(name, bands, found)
        if bands[name].norm or not one.is_right:  # not where no parameter of a layer has a gradient
            layers.setdefault(_layer(name), []).append(one._replace(name=f"gradients of {_layer(name)}", worst=name))
    return [max(several, key=_badness) for several in layers.values()]


def _badness(one: Comparison) -> tuple[bool, float]:
    found = max(one.difference, one.in_a_batch or 0.0)
    return not one.is_right, found / one.allowed if one.allowed else found


def _layer(parameter: str) -> str:
    """Return the name of the layer that has a parameter: up to the first number, or else two parts of the name."""
    parts = parameter.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[: min(2, max(1, len(parts) - 1)) if number is None else number + 1])


def _input_dtype(encoder: Any) -> torch.dtype:
    dtype: torch.dtype = encoder.feature_extractor.conv_layers[0].conv.weight.dtype
    return dtype


def _dtype(encoder: nn.Module, device: torch.device) -> torch.dtype:
    """Return the dtype that an encoder computes in: autocast's, or the coarsest of its parameters."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return max({one.dtype for one in encoder.parameters()}, key=lambda dtype: torch.finfo(dtype).eps)


def _refuse(encoder: Any, classes: AcceleratedClasses) -> None:
    """Raise ValueError if an encoder cannot be compared with its original."""
    if classes.check:
        classes.check(encoder)
    if classes.layers and (lost := read_only.lost(encoder, classes.layers(encoder))):
        raise ValueError(f"model: {lost}; merge them into the weights, or validate with call_projections=False")
    for name, module in encoder.named_modules():
        if type(module).__module__.startswith("torch.ao.nn.quantized"):
            raise ValueError(f"model: {name} is quantised, so its rounding cannot be measured; validate before that")
    device = next(encoder.parameters()).device
    for name, parameter in encoder.named_parameters():
        kind = type(parameter)
        fault = (
            f"is a {kind.__module__}.{kind.__name__}, which may be quantised or sharded"
            if kind not in linear.ORDINARY
            else "has no storage"
            if parameter.is_meta
            else f"is in {parameter.dtype}"
            if not parameter.is_floating_point() or parameter.dtype == torch.float64
            else f"is on {parameter.device}, and others on {device}"
            if parameter.device != device
            else ""
        )
        if fault:
            raise ValueError(
                f"model: the parameter {name} {fault}; expected ordinary parameters in fp32, bf16 or fp16 on one device"
            )

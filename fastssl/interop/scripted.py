"""What `torch.jit.script` compiles of an accelerated torchaudio encoder: the original, utterance by utterance.

TorchScript can compile neither our ops nor packed batches. The original's own `forward` would give other numbers for a
padded batch than the accelerated model does, so a script calls the original's modules on each utterance alone.
"""

# TorchScript reads the source of `forward` and `extract_features` and looks names up in this Python module. It knows
# only older names of types, no comprehension over modules, and no function of a module.
# ruff: noqa: UP006, UP035, UP045, PERF401, SIM102

import functools
import threading
from collections.abc import Callable
from typing import Any, List, Optional, Tuple

import torch
from torch import Tensor

from fastssl.interop.lengths import frame_lengths, frames_after, valid_samples


class _Here(threading.local):
    """Whether Python runs the code for scripts on purpose."""

    runs = False


_here = _Here()


def forward_in_python(model: Any, waveforms: Tensor, lengths: Tensor | None) -> Any:
    """Run `forward` as a script would."""
    _here.runs = True
    try:
        return forward(model, waveforms, lengths)
    finally:
        _here.runs = False


def _repeat_last(x: Tensor, length: int) -> Tensor:  # (1, F, D) -> (1, length, D)
    return torch.cat([x, x[:, -1:].detach().expand(x.shape[0], length - x.shape[1], x.shape[2])], 1)


def without_empty_rows(x: Tensor, counts: List[int], length: int) -> Tensor:
    """Put zeros into the rows of utterances without frames, if `x` has a row of `length` frames for each utterance."""
    if 0 in counts and x.shape[:2] == torch.Size([len(counts), length]):
        empty = torch.tensor(counts, device=x.device) == 0
        x = x.masked_fill(empty.view([-1] + [1] * (x.dim() - 1)), 0.0)
    return x


def forward(self: Any, waveforms: Tensor, lengths: Optional[Tensor] = None) -> Tuple[Tensor, Optional[Tensor]]:
    """Return what the accelerated `forward` returns."""
    # The condition is alone, so that TorchScript leaves out what it cannot compile.
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        if not _here.runs:  # `Accelerator.unwrap_model` follows `__wrapped__`, and put this function on the model
            return type(self).forward(self, waveforms, lengths)  # type: ignore[no-any-return]
    if lengths is None:
        x = self.encoder(self.feature_extractor(waveforms, None)[0], None)
        if self.aux is not None:
            x = self.aux(x)
        return x, lengths
    if waveforms.dim() != 2:
        raise ValueError("waveforms: expected (B, T) samples")
    convolutions: List[Tuple[int, int]] = []
    for layer in self.feature_extractor.conv_layers:
        convolutions.append((layer.kernel_size, layer.stride))
    frames = frame_lengths(lengths, convolutions)
    samples = valid_samples(lengths, frames, waveforms.shape[1], convolutions).expand(waveforms.shape[0])
    length = frames_after(waveforms.shape[1], convolutions)
    width: int = self.encoder.feature_projection.projection.out_features
    whole = waveforms.new_zeros([0])
    if self._fastssl_norm == "padded" and length > 0:
        whole = self.feature_extractor(waveforms, None)[0]
    rows: List[Tensor] = []
    counts: List[int] = []
    valid: List[int] = samples.tolist()
    for row, used in enumerate(valid):
        count = frames_after(used, convolutions)
        counts.append(count)
        if count == 0:
            rows.append(waveforms.new_zeros([1, length, width]))
        else:
            if self._fastssl_norm == "padded":
                features = whole[row : row + 1, :count]
            else:
                features = self.feature_extractor(waveforms[row : row + 1, :used], None)[0]
            rows.append(_repeat_last(self.encoder(features, None), length))
    if len(rows) == 0:
        rows.append(waveforms.new_zeros([0, length, width]))
    if self.aux is not None:
        for row in range(len(rows)):  # a quantised head has a scale for each call
            rows[row] = self.aux(rows[row])
    return without_empty_rows(torch.cat(rows), counts, length), frames


def extract_features(
    self: Any,
    waveforms: Tensor,
    lengths: Optional[Tensor] = None,
    num_layers: Optional[int] = None,
) -> Tuple[List[Tensor], Optional[Tensor]]:
    """Return what the accelerated `extract_features` returns."""
    if lengths is None:
        return self.encoder.extract_features(self.feature_extractor(waveforms, None)[0], None, num_layers), lengths
    if waveforms.dim() != 2:
        raise ValueError("waveforms: expected (B, T) samples")
    convolutions: List[Tuple[int, int]] = []
    for layer in self.feature_extractor.conv_layers:
        convolutions.append((layer.kernel_size, layer.stride))
    frames = frame_lengths(lengths, convolutions)
    samples = valid_samples(lengths, frames, waveforms.shape[1], convolutions).expand(waveforms.shape[0])
    length = frames_after(waveforms.shape[1], convolutions)
    width: int = self.encoder.feature_projection.projection.out_features
    whole = waveforms.new_zeros([0])
    if self._fastssl_norm == "padded" and length > 0:
        whole = self.feature_extractor(waveforms, None)[0]
    layers = len(self.encoder.transformer.layers)
    if num_layers is not None:
        if not 0 < num_layers <= layers:
            raise ValueError("num_layers: must be from 1 to the number of layers")
        layers = num_layers
    states: List[List[Tensor]] = []
    for _ in range(layers):
        states.append([waveforms.new_zeros([0, length, width])])
    valid: List[int] = samples.tolist()
    for row, used in enumerate(valid):
        count = frames_after(used, convolutions)
        if count == 0:
            for state in states:
                state.append(waveforms.new_zeros([1, length, width]))
        else:
            if self._fastssl_norm == "padded":
                features = whole[row : row + 1, :count]
            else:
                features = self.feature_extractor(waveforms[row : row + 1, :used], None)[0]
            found = self.encoder.extract_features(features, None, num_layers)
            for index, x in enumerate(found):
                states[index].append(torch.nn.functional.pad(x, [0, 0, 0, length - count]))
    out: List[Tensor] = []
    for state in states:
        out.append(torch.cat(state))
    return out, frames


_SCRIPTS: dict[str, Callable[..., Any]] = {"forward": forward, "extract_features": extract_features}


def scriptable(name: str, method: Any) -> Any:
    """Return a method that does as the given one in Python, and as this Python module says in TorchScript.

    Args:
        name: "forward" or "extract_features" of torchaudio's `Wav2Vec2Model`.
        method: The accelerated method, with the original's signature in `__signature__`.
    """

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(self, *args, **kwargs)

    vars(call)["__wrapped__"] = _SCRIPTS[name]  # where TorchScript finds the source; it has the names from here
    return call

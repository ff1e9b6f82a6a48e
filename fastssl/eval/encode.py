"""Encode recordings chunk by chunk; one batch may contain chunks of several recordings."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from lhotse.cut import Cut
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from fastssl.data.audio import SAMPLE_RATE_HZ, AudioError
from fastssl.data.recordings import Chunk, FrameGrid, read_chunks
from fastssl.data.workers import end_if_unable_to_send
from fastssl.interop import load_encoder
from fastssl.kernels.prepacked_conv.weights import Format
from fastssl.models.config import SpeechEncoderConfig
from fastssl.models.speech_encoder import SpeechEncoder
from fastssl.nn.compression import Compressed
from fastssl.packing import Packed
from fastssl.reading import read_json

#: Seconds of audio per batch; the features do not depend on it.
_BATCH_S = 60.0


class Reading(NamedTuple):
    """How to read recordings.

    Args:
        chunk_s: Length of a chunk in seconds; a longer recording is cut into overlapping chunks.
        overlap_s: Audio that neighbouring chunks share, in seconds.
        channel: The channel to read, counted from 0; None averages all channels.
        num_workers: Number of processes that decode audio; 0 decodes in the calling process.
    """

    chunk_s: float = 60.0
    overlap_s: float = 6.0
    channel: int | None = None
    num_workers: int = 0


def choose_device(device: str) -> torch.device:
    """Return the torch device with this name.

    Args:
        device: A name that `torch.device` accepts, or "auto": the GPU if CUDA is available, else the CPU.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def open_encoder_at(
    model: str | Path,
    *,
    device: str = "auto",
    rate: float | None = None,
    frame_period_ms: float | None = None,
    normalize: bool | None = None,
    inference: Format | None = None,
) -> SpeechEncoder:
    """Load an encoder onto a device and, if asked, set the rate or the frame period of its sequence compressor.

    Args:
        model: Any model that `load_encoder` opens: a run, a Transformers folder, a Hub name or a fairseq checkpoint.
        device: Device name, as for `choose_device`.
        rate: Rate of the compressor (lambda of arXiv:2211.02332), from 0 to 2.
        frame_period_ms: Mean frame period to aim for, in milliseconds, instead of a rate.
        normalize: Whether recordings are scaled to zero mean and unit variance; None does what the model's config says.
        inference: Format of the weights for inference on the CPU, as for `load_encoder`.

    Raises:
        ValueError: The model cannot be loaded, it has no integrate-and-fire compressor, the value is out of range, both
            `rate` and `frame_period_ms` are given, or `inference` and another device than the CPU.
    """
    if inference is not None and device not in ("auto", "cpu"):
        raise ValueError(f"--inference: {inference} runs on the CPU only, got --device {device}; leave one of them out")
    encoder = load_encoder(model, normalize=normalize, inference=inference)
    encoder = encoder.to(choose_device(device if inference is None else "cpu"))
    if rate is None and frame_period_ms is None:
        return encoder
    if encoder.compressor is None:
        raise ValueError(
            f"--rate and --frame_period_ms: {model} has no compressor; leave both out, or choose a model that has one"
        )
    try:
        encoder.compressor.check(rate=rate, frame_period_ms=frame_period_ms)
    except ValueError as error:
        raise ValueError(f"--{error}") from None
    encoder.compressor.rate, encoder.compressor.frame_period_ms = rate, frame_period_ms
    return encoder


def continue_unrecorded(encoder: SpeechEncoder, settings_file: Path) -> None:
    """Set `encoder.normalize` to continue a folder of features or labels that does not record the setting.

    Args:
        encoder: Encoder that makes the features or labels; its `normalize` is changed only if it is None.
        settings_file: `settings.json` of the folder; the encoder stays as it is if there is no such file.
    """
    if encoder.normalize is None and settings_file.is_file():
        encoder.normalize = encoder.unrecorded_normalize


def recorded_normalize(settings_file: Path) -> bool | None:
    """Return whether the recordings of an existing folder of features or labels were normalised.

    Args:
        settings_file: `settings.json` of the folder.

    Returns:
        What the file says; None if there is no file, or it does not say, as files of earlier versions.
    """
    try:
        recorded = read_json(settings_file).get("normalize")
    except ValueError:
        return None  # whoever opens the folder reports the damage
    return recorded if isinstance(recorded, bool) else None


def fixed_frame_period_s(encoder: SpeechEncoder) -> float | None:
    """Return the encoder's frame period in seconds, or None if it varies (integrate-and-fire compressor)."""
    period_s = encoder.config.samples_per_frame / SAMPLE_RATE_HZ
    if encoder.compressor is None:
        return period_s
    return None if encoder.compressor.factor is None else period_s * encoder.compressor.factor


def frame_grid(config: SpeechEncoderConfig) -> FrameGrid:
    """Return which samples each frame of the encoder's convolutional front end sees, at 16 kHz."""
    return FrameGrid(config.samples_per_frame, config.receptive_field_samples)


def default_workers() -> int:
    """Return the default number of decoding processes: half the CPU cores, at least 1 and at most 4."""
    return min(4, max(1, (os.cpu_count() or 1) // 2))


def encode_recordings(
    encoder: SpeechEncoder, cuts: Sequence[Cut], reading: Reading, *, layer: int
) -> Iterator[tuple[Cut, Tensor | AudioError]]:
    """Yield the features of each recording as soon as they are complete, or the error that makes it unusable.

    Args:
        encoder: Encoder, already on the device where it is to run.
        cuts: Whole recordings, from `open_corpus(..., window_s=None)`.
        reading: How to read and chunk the recordings.
        layer: Layer to return: 0 is the input of the first layer, L the output of the last.

    Yields:
        Each cut exactly once, in approximately the given order, with its features (frames, D) on the CPU in the
        encoder's dtype, or with an `AudioError` that says what is wrong with the recording or with its features.

    Raises:
        ValueError: `reading` has a chunk that is too short for its overlap, or an overlap that is too short.
    """
    chunks: list[tuple[int, Chunk]] = []
    parts: dict[int, list[Tensor]] = {}
    complete: list[int] = []
    loader = DataLoader(
        _Chunks(encoder, cuts, reading),
        batch_size=None,
        num_workers=reading.num_workers,
        worker_init_fn=end_if_unable_to_send,
    )
    for index, item in loader:
        if isinstance(item, str):
            chunks = [(other, chunk) for other, chunk in chunks if other != index]
            parts.pop(index, None)
            yield cuts[index], AudioError(item)
        elif item is None:
            complete.append(index)
        else:
            chunks.append((index, item))
        if sum(len(chunk.waveform) for _, chunk in chunks) >= _BATCH_S * SAMPLE_RATE_HZ:
            _encode(encoder, chunks, parts, layer=layer)
            yield from ((cuts[index], _joined(parts.pop(index))) for index in complete)
            complete.clear()
    _encode(encoder, chunks, parts, layer=layer)
    yield from ((cuts[index], _joined(parts.pop(index))) for index in complete)


def _joined(parts: list[Tensor]) -> Tensor | AudioError:
    """Join the features of a recording's chunks; features that are not finite make the recording unusable."""
    features = torch.cat(parts)
    if not features.isfinite().all():
        return AudioError("has NaN or infinite features; check its sample values and the model's weights")
    return features


@torch.inference_mode()
def _encode(
    encoder: SpeechEncoder, chunks: list[tuple[int, Chunk]], parts: dict[int, list[Tensor]], *, layer: int
) -> None:
    """Encode all chunks in one batch, append their kept frames to `parts` (by recording), and empty `chunks`."""
    if not chunks:
        return
    device = next(encoder.parameters()).device
    waveforms = Packed.pack([chunk.waveform for _, chunk in chunks]).to(device)
    output = encoder(waveforms, normalize=False)  # `read_chunks` did, over whole recordings
    values, layout = output.hidden_states[layer]
    features = Packed(values.cpu(), layout).unpack()  # one copy per batch, because the host waits for each
    keeps = [chunk.keep for _, chunk in chunks]
    if output.compressed is not None:
        keeps = _kept_after(output.compressed, keeps)
    for (index, _), frames, keep in zip(chunks, features, keeps, strict=True):
        parts.setdefault(index, []).append(frames[keep])
    chunks.clear()


def _kept_after(compressed: Compressed, keeps: Sequence[slice]) -> list[slice]:
    """Translate slices of each utterance's input frames into slices of its compressed frames.

    A compressed frame is kept if the first input frame that went into it is kept.
    """
    translated = []
    layout = compressed.frames.layout
    sources_of = Packed(compressed.sources.cpu(), compressed.layout).unpack()
    for sources, first, left, keep in zip(sources_of, layout.offsets, layout.lengths, keeps, strict=False):
        begins = torch.searchsorted(sources, torch.arange(first, first + left, device="cpu"))
        start, stop, _ = keep.indices(len(sources))
        translated.append(slice(*torch.searchsorted(begins, torch.tensor([start, stop], device="cpu")).tolist()))
    return translated


class _Chunks(IterableDataset[tuple[int, Chunk | str | None]]):
    """Chunks of recordings, as pairs (index of the recording, item).

    The items of a recording are its chunks, then None after the last one, or an error text if it cannot be read.
    """

    def __init__(self, encoder: SpeechEncoder, cuts: Sequence[Cut], reading: Reading) -> None:
        self.cuts = cuts
        self.reading = reading
        # Do not keep the encoder here: this object is sent to the worker processes.
        self.normalize = encoder.normalizes
        self.grid = frame_grid(encoder.config)

    def __iter__(self) -> Iterator[tuple[int, Chunk | str | None]]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for index in range(first, len(self.cuts), step):
            chunks = read_chunks(
                self.cuts[index],
                chunk_s=self.reading.chunk_s,
                overlap_s=self.reading.overlap_s,
                normalize=self.normalize,
                channel=self.reading.channel,
                grid=self.grid,
            )
            try:
                for chunk in chunks:
                    yield index, chunk
            except AudioError as error:
                yield index, str(error)
            else:
                yield index, None

"""Recordings through an encoder, chunk by chunk, in batches that mix them."""

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
from fastssl.interop import load_encoder
from fastssl.models.config import SpeechEncoderConfig
from fastssl.models.speech_encoder import SpeechEncoder
from fastssl.nn.compression import Compressed
from fastssl.packing import Packed

#: Audio that goes through the encoder at a time; features do not depend on it.
_BATCH_S = 60.0


class Reading(NamedTuple):
    """How recordings are read.

    Args:
        chunk_s: Longer ones are cut into chunks of this length.
        overlap_s: What neighbouring chunks share.
        channel: The channel to read; None averages all of them.
        num_workers: Processes that decode; 0 decodes in this one.
    """

    chunk_s: float = 60.0
    overlap_s: float = 6.0
    channel: int | None = None
    num_workers: int = 0


def choose_device(device: str) -> torch.device:
    """The device of that name; "auto" takes a GPU where there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def open_encoder_at(
    model: str | Path, *, device: str = "auto", rate: float | None = None, frame_period_ms: float | None = None
) -> SpeechEncoder:
    """Open an encoder where it is to run; one with a compressor, at a rate or a frame period.

    Args:
        model: What `load_encoder` opens.
        device: As `choose_device`.
        rate: Of the compressor.
        frame_period_ms: The mean period that frames should have instead.

    Raises:
        ValueError: There is no such model, or it has no compressor that takes this.
    """
    encoder = load_encoder(model).to(choose_device(device))
    if rate is None and frame_period_ms is None:
        return encoder
    if encoder.compressor is None:
        raise ValueError(f"--rate and --frame_period_ms: {model} has no compressor")
    try:
        encoder.compressor.check(rate=rate, frame_period_ms=frame_period_ms)
    except ValueError as error:
        raise ValueError(f"--{error}") from None
    encoder.compressor.rate, encoder.compressor.frame_period_ms = rate, frame_period_ms
    return encoder


def fixed_frame_period_s(encoder: SpeechEncoder) -> float | None:
    """From one of its frames to the next; None where a compressor makes that differ."""
    period_s = encoder.config.samples_per_frame / SAMPLE_RATE_HZ
    if encoder.compressor is None:
        return period_s
    return None if encoder.compressor.factor is None else period_s * encoder.compressor.factor


def frame_grid(config: SpeechEncoderConfig) -> FrameGrid:
    """Which samples the frames of an encoder's front end see."""
    return FrameGrid(config.samples_per_frame, config.receptive_field_samples)


def default_workers() -> int:
    """Processes that decode where nobody says how many."""
    return min(4, max(1, (os.cpu_count() or 1) // 2))


def encode_recordings(
    encoder: SpeechEncoder, cuts: Sequence[Cut], reading: Reading, *, layer: int
) -> Iterator[tuple[Cut, Tensor | AudioError]]:
    """The features of each recording, as soon as they are complete; or why it cannot be used.

    Args:
        encoder: On the device where it is to run.
        cuts: Whole recordings, of `open_corpus(..., window_s=None)`.
        reading: How they are read.
        layer: 0 is the input of the first layer, L the output of the last.

    Yields:
        Every cut once, not quite in order, with features (frames, D) on the host.
    """
    chunks: list[tuple[int, Chunk]] = []
    parts: dict[int, list[Tensor]] = {}
    complete: list[int] = []
    loader = DataLoader(_Chunks(encoder, cuts, reading), batch_size=None, num_workers=reading.num_workers)
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
            yield from ((cuts[index], torch.cat(parts.pop(index))) for index in complete)
            complete.clear()
    _encode(encoder, chunks, parts, layer=layer)
    yield from ((cuts[index], torch.cat(parts.pop(index))) for index in complete)


@torch.inference_mode()
def _encode(
    encoder: SpeechEncoder, chunks: list[tuple[int, Chunk]], parts: dict[int, list[Tensor]], *, layer: int
) -> None:
    """Encode the chunks, and add what is kept of them to the parts of their recordings."""
    if not chunks:
        return
    device = next(encoder.parameters()).device
    waveforms = Packed.pack([chunk.waveform for _, chunk in chunks]).to(device)
    output = encoder(waveforms)
    features = output.hidden_states[layer].unpack()
    keeps = [chunk.keep for _, chunk in chunks]
    if output.compressed is not None:
        keeps = [_kept_after(output.compressed, index, keep) for index, keep in enumerate(keeps)]
    for (index, _), frames, keep in zip(chunks, features, keeps, strict=True):
        parts.setdefault(index, []).append(frames[keep].cpu())
    chunks.clear()


def _kept_after(compressed: Compressed, utterance: int, keep: slice) -> slice:
    """Of an utterance's frames that a compressor left, those that begin within what is kept of the frames before it."""
    sources = Packed(compressed.sources, compressed.layout).unpack()[utterance]
    first, left = compressed.frames.layout.offsets[utterance], compressed.frames.layout.lengths[utterance]
    begins = torch.searchsorted(sources, torch.arange(first, first + left, device=sources.device))
    start, stop, _ = keep.indices(len(sources))
    kept = torch.searchsorted(begins, torch.tensor([start, stop], device=begins.device))
    return slice(*kept.tolist())


class _Chunks(IterableDataset[tuple[int, Chunk | str | None]]):
    """Index of a recording with a chunk of it, then with None behind its last, or with what is wrong with it."""

    def __init__(self, encoder: SpeechEncoder, cuts: Sequence[Cut], reading: Reading) -> None:
        self.cuts = cuts
        self.reading = reading
        # Not the encoder: this goes to the workers.
        self.normalize = encoder.config.do_normalize
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

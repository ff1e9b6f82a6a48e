"""Features that probes look at: of frozen encoders and of log-mel spectra, computed once and kept."""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
import torch
from lhotse.features.kaldi.extractors import Fbank, FbankConfig
from numpy.typing import NDArray
from torch import Tensor

from fastssl.data.audio import SAMPLE_RATE_HZ, AudioError, read_waveform
from fastssl.data.corpus import Problem, cut_name, scan_file
from fastssl.data.mfcc import differences
from fastssl.data.waveforms import pack_waveforms, waveform_batch
from fastssl.models.config import SpeechEncoderConfig
from fastssl.models.speech_encoder import SpeechEncoder
from fastssl.packing import Packed
from fastssl.train.encode import fixed_frame_period_s, frame_grid
from fastssl.train.probing.tables import Table

#: Audio that goes through an encoder at a time; on the CPU features do not depend on it.
_BATCH_S = 60.0
#: Less than this makes no frame in some front ends.
_SHORTEST_S = 0.1
_MELS = 80
#: Added to every variance (which are 1 on average) before its root is divided by. With a tenth of it, heads learned as
#: fast, but made several times the errors on speakers that they had not learned from.
SHRINKAGE = 1.0

Waveforms = Sequence[NDArray[np.float32]]


class Source(Protocol):
    """What turns waveforms at 16 kHz into features, layer by layer."""

    layers: int

    @property
    def frame_period_s(self) -> float | None:
        """From one frame to the next; None where examples differ in it."""

    @property
    def key(self) -> object:
        """Sources with equal keys give equal features."""

    def __call__(self, waveforms: Waveforms) -> list[Packed]:
        """Frames (N, D) of each layer."""


class EncoderSource:
    """All layers of a frozen encoder: the input of the first, then the output of each.

    Args:
        encoder: Is put into evaluation mode, where it is.
    """

    def __init__(self, encoder: SpeechEncoder) -> None:
        self.encoder = encoder.eval()
        config = encoder.config
        self.frame_period_s = fixed_frame_period_s(encoder)
        self.layers = config.num_hidden_layers + 1

    @property
    def key(self) -> object:
        """The encoder itself, for modules are compared by identity, and how it compresses."""
        return (self.encoder, *_compression(self.encoder))

    @torch.inference_mode()
    def __call__(self, waveforms: Waveforms) -> list[Packed]:
        """Frames (N, D) of each layer."""
        device = next(self.encoder.parameters()).device
        batch = waveform_batch(waveforms, normalize=self.encoder.config.do_normalize)
        states: list[Packed] = self.encoder(batch.to(device)).hidden_states
        return states


class RandomSource(EncoderSource):
    """An encoder of the same architecture with fresh weights.

    Args:
        encoder: Its class and config are taken.
        seed: Another seed, other weights.
    """

    def __init__(self, encoder: SpeechEncoder, *, seed: int) -> None:
        device = next(encoder.parameters()).device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fresh = type(encoder)(encoder.config).to(device)
        ours, theirs = fresh.compressor, encoder.compressor
        if ours is not None and theirs is not None:
            ours.rate, ours.frame_period_ms = theirs.rate, theirs.frame_period_ms
        super().__init__(fresh)
        self._key = ("random", type(encoder), encoder.config, seed, *_compression(encoder))

    @property
    def key(self) -> object:
        """What the weights follow from."""
        return self._key


def _compression(encoder: SpeechEncoder) -> tuple[float | None, ...]:
    """Rate and frame period of its calls."""
    compressor = encoder.compressor
    values = () if compressor is None else (compressor.rate, compressor.frame_period_ms)
    return tuple(None if value is None else float(value) for value in values)


class LogMelSource:
    """80 log-mel energies every 10 ms, of waveforms of zero mean and unit variance.

    Args:
        deltas: Add deltas and delta-deltas. Means of them say nothing but how the edges of an example differ.
    """

    frame_period_s = 0.01
    layers = 1

    def __init__(self, *, deltas: bool = True) -> None:
        self.deltas = deltas
        self._fbank = Fbank(FbankConfig(num_filters=_MELS, sampling_rate=SAMPLE_RATE_HZ))

    @property
    def key(self) -> object:
        """What the features follow from."""
        return ("log-mel", self.deltas)

    def __call__(self, waveforms: Waveforms) -> list[Packed]:
        """Frames (N, 80), or (N, 240) with deltas."""
        spectra = []
        for waveform in waveforms:
            normalized = torch.from_numpy(pack_waveforms([waveform], normalize=True))
            mels = torch.as_tensor(self._fbank.extract(normalized, SAMPLE_RATE_HZ))
            if self.deltas:
                once = differences(mels)
                mels = torch.cat([mels, once, differences(once)], dim=1)
            spectra.append(mels)
        return [Packed.pack(spectra)]


@dataclass(frozen=True, eq=False)
class Features:
    """Features of the examples of one table.

    Args:
        frames: (L, T, D) of each example, T frames in L layers: fp16, or fp32 where T is 1, the mean over an example.
        rows: The row of the table that each example comes from.
        seconds: Of audio in each example.
        problems: Recordings that cannot be used.
        too_short: Recordings shorter than one segment.
        lengths: T of each example; of a mean, how many frames it is of.
    """

    frames: Sequence[Tensor]
    rows: tuple[int, ...]
    seconds: tuple[float, ...]
    problems: tuple[Problem, ...]
    too_short: int
    lengths: tuple[int, ...]

    def mean_frame_period_s(self, config: SpeechEncoderConfig) -> float:
        """Of all examples of an encoder together: the period of its front end, by how many frames a compressor left."""
        lengths = [round(seconds * SAMPLE_RATE_HZ) for seconds in self.seconds]
        before = sum(map(frame_grid(config).count, lengths))
        return config.samples_per_frame / SAMPLE_RATE_HZ * before / sum(self.lengths)


class Standard(NamedTuple):
    """Mean and inverse standard deviation of every dimension of every layer, and what takes their correlation away."""

    mean: Tensor  # (L, 1, D)
    scale: Tensor  # (L, 1, D)
    whitening: Tensor | None = None  # (L, D, D)

    @classmethod
    def of(cls, features: Features, examples: Iterable[int], *, whiten: bool = False) -> "Standard":
        """Over all frames of these examples, in fp64; a dimension that never changes becomes zero.

        Args:
            features: Of the training part.
            examples: Of these.
            whiten: Bring directions of more variance than others down too, staying as near to the dimensions as can
                be (ZCA with `SHRINKAGE`); none is blown up.
        """
        chosen = [features.frames[example] for example in examples]
        count = sum(frames.shape[1] for frames in chosen)
        mean = torch.zeros_like(chosen[0][:, :1], dtype=torch.float64)
        squares = torch.zeros_like(mean)
        for frames in chosen:
            mean += frames.sum(1, keepdim=True, dtype=torch.float64) / count
        for frames in chosen:
            # The differences are small, whatever the mean is.
            squares += (frames.float() - mean.float()).square().sum(1, keepdim=True, dtype=torch.float64) / count
        deviation = squares.sqrt()
        scale = torch.where(deviation > 1e-6 * mean.abs(), 1 / deviation, 0.0)
        standard = cls(mean.float(), scale.float())
        if not whiten:
            return standard
        covariance = torch.zeros(len(mean), mean.shape[2], mean.shape[2], dtype=torch.float64)
        for frames in chosen:
            values = standard(frames)
            covariance += (values.mT @ values) / count
        return cls(standard.mean, standard.scale, _inverse_root(covariance))

    def to(self, device: torch.device | str) -> "Standard":
        """The same on another device."""
        whitening = None if self.whitening is None else self.whitening.to(device)
        return Standard(self.mean.to(device), self.scale.to(device), whitening)

    def __call__(self, values: Tensor) -> Tensor:  # (L, T, D) -> the same in fp32
        """Zero mean and unit variance, and if so made, hardly any correlation."""
        standardised = (values.float() - self.mean) * self.scale
        return standardised if self.whitening is None else standardised @ self.whitening


def _inverse_root(covariance: Tensor) -> Tensor:  # (L, D, D) in fp64 -> fp32
    """Symmetric, and of the covariance shrunk towards that of independent dimensions."""
    variances, directions = torch.linalg.eigh(covariance)
    scales = (variances.clamp(min=0) + SHRINKAGE).rsqrt()
    root: Tensor = (directions * scales[:, None]) @ directions.mT
    return root.float()


class FeatureStore:
    """Features by source, table and kind, each computed when first asked for and kept as long as the store.

    The weights of an encoder must not change meanwhile.

    Args:
        memory_gb: Features of one source and table beyond this go to a temporary file.
    """

    def __init__(self, *, memory_gb: float = 4.0) -> None:
        self.memory_gb = memory_gb
        self._kept: dict[tuple[object, ...], Features] = {}

    def get(
        self,
        source: Source,
        table: Table,
        *,
        name: str,
        segment_s: float | None = None,
        mean: bool = False,
    ) -> Features:
        """Features of every recording of a table.

        Args:
            source: Of which encoder.
            table: Of which recordings.
            name: Of the source, for errors.
            segment_s: Cut recordings into examples of this length, encode each alone, and drop the rest. None: an
                example is a recording.
            mean: Keep the mean over the frames of each example, in fp32.

        Raises:
            ValueError: No recording can be used, or features are not finite.
        """
        key = (source.key, tuple(row.path for row in table.rows), segment_s, mean)
        if key not in self._kept:
            self._kept[key] = self._compute(source, table, name, segment_s, mean)
        return self._kept[key]

    def _compute(self, source: Source, table: Table, name: str, segment_s: float | None, mean: bool) -> Features:
        recordings = _Recordings(table, segment_s)
        kept = _Spool(self.memory_gb * 1e9)
        rows: list[int] = []
        seconds: list[float] = []
        lengths: list[int] = []
        for batch in _batches(recordings):
            states = [state.unpack() for state in source([waveform for _, waveform in batch])]
            for (row, waveform), *layers in zip(batch, *states, strict=True):
                frames = torch.stack(layers)
                lengths.append(frames.shape[1])
                frames = frames.mean(1, keepdim=True) if mean else frames.half()
                if frames.shape[1] == 0 or not frames.isfinite().all():
                    what = "there is no frame" if frames.shape[1] == 0 else "there are values that are not finite"
                    raise ValueError(f"{name}: {what} among the features of {table.rows[row].path}")
                kept.add(frames.cpu())
                rows.append(row)
                seconds.append(len(waveform) / SAMPLE_RATE_HZ)
        if not rows:
            problem = f"; {recordings.problems[0]}" if recordings.problems else ""
            short = f"; {recordings.too_short} are shorter than {segment_s:g} s" if recordings.too_short else ""
            raise ValueError(f"{table.name}: no recording can be used{problem}{short}")
        problems, too_short = tuple(recordings.problems), recordings.too_short
        return Features(kept.tensors(), tuple(rows), tuple(seconds), problems, too_short, tuple(lengths))


class _Recordings:
    """The examples of a table as waveforms, with what was wrong on the way."""

    def __init__(self, table: Table, segment_s: float | None) -> None:
        self.table, self.segment_s = table, segment_s
        self.problems: list[Problem] = []
        self.too_short = 0

    def __iter__(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        for number, row in enumerate(self.table.rows):
            cut = scan_file(row.path, recording_id=str(row.path))
            if isinstance(cut, Problem):
                self.problems.append(cut)
                continue
            try:
                waveform = read_waveform(cut)
            except AudioError as error:
                self.problems.append(Problem(cut_name(cut), str(error)))
                continue
            if len(waveform) < _SHORTEST_S * SAMPLE_RATE_HZ:
                self.problems.append(Problem(cut_name(cut), f"is shorter than {_SHORTEST_S} s"))
                continue
            size = len(waveform) if self.segment_s is None else round(self.segment_s * SAMPLE_RATE_HZ)
            self.too_short += len(waveform) < size
            for first in range(0, len(waveform) - size + 1, size):
                yield number, waveform[first : first + size]


def _batches(
    examples: Iterable[tuple[int, NDArray[np.float32]]],
) -> Iterator[list[tuple[int, NDArray[np.float32]]]]:
    batch: list[tuple[int, NDArray[np.float32]]] = []
    for example in examples:
        batch.append(example)
        if sum(len(waveform) for _, waveform in batch) >= _BATCH_S * SAMPLE_RATE_HZ:
            yield batch
            batch = []
    if batch:
        yield batch


class _Spool:
    """Tensors (L, T, D) of one type, in memory, or from a limit on in a file that vanishes with them."""

    def __init__(self, limit_bytes: float) -> None:
        self._limit = limit_bytes
        self._bytes = 0
        self._held: list[Tensor] = []
        self._shapes: list[torch.Size] = []
        self._file: IO[bytes] | None = None

    def add(self, tensor: Tensor) -> None:
        self._shapes.append(tensor.shape)
        self._held.append(tensor)
        self._bytes += tensor.nbytes
        if self._file is None and self._bytes > self._limit:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as what maps it)
        if self._file is not None:
            for held in self._held:
                self._file.write(held.contiguous().numpy().tobytes())
            self._held = [tensor[:0]]  # remembers the type

    def tensors(self) -> list[Tensor]:
        if self._file is None:
            return self._held
        self._file.flush()
        mapped: NDArray[Any] = np.memmap(self._file, dtype=self._held[0].numpy().dtype, mode="r+")
        sizes = [shape.numel() for shape in self._shapes]
        parts = torch.from_numpy(mapped).split(sizes)
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

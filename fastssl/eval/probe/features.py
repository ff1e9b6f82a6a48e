"""Features for probes: hidden states of frozen encoders and log-mel spectra, computed once and kept."""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
import torch
from lhotse.features.kaldi.extractors import Fbank, FbankConfig
from numpy.typing import NDArray
from torch import Tensor

from fastssl.data.audio import SAMPLE_RATE_HZ, AudioError, read_waveform
from fastssl.data.corpus import Problem, cut_name, enter_file
from fastssl.data.mfcc import differences
from fastssl.data.waveforms import pack_waveforms, waveform_batch
from fastssl.eval.encode import fixed_frame_period_s, frame_grid
from fastssl.eval.probe.tables import Table
from fastssl.files import naming
from fastssl.models.config import SpeechEncoderConfig
from fastssl.models.speech_encoder import SpeechEncoder
from fastssl.names import shown
from fastssl.packing import Packed

#: Seconds of audio per batch; on the CPU, features do not depend on it.
_BATCH_S = 60.0
#: Shortest usable recording, in seconds: some front ends make no frame from a shorter one.
_SHORTEST_S = 0.1
_MELS = 80
#: Whitening adds this to every variance (1 on average) before it divides by the square root. With a tenth of it, heads
#: learned as fast but made several times as many errors on unseen speakers.
SHRINKAGE = 1.0

Waveforms = Sequence[NDArray[np.float32]]


class Source(Protocol):
    """Interface of objects that turn waveforms at 16 kHz into features, layer by layer."""

    layers: int

    @property
    def frame_period_s(self) -> float | None:
        """Frame period in seconds; None if it differs between examples."""

    @property
    def key(self) -> object:
        """Hashable key for caching; sources with equal keys give equal features."""

    def __call__(self, waveforms: Waveforms) -> list[Packed]:
        """Compute the features of a batch: for each layer, the packed frames (N, D) of all waveforms (T,)."""


class EncoderSource:
    """All L + 1 hidden states of a frozen encoder: the input of the first layer, then the output of each layer.

    Args:
        encoder: Encoder, on the device to work on; it is put into evaluation mode.
    """

    def __init__(self, encoder: SpeechEncoder) -> None:
        self.encoder = encoder.eval()
        config = encoder.config
        self.frame_period_s = fixed_frame_period_s(encoder)
        self.layers = config.num_hidden_layers + 1

    @property
    def key(self) -> object:
        """The encoder itself (modules compare by identity), and its compressor's rate and frame period."""
        return (self.encoder, *_compression(self.encoder))

    @torch.inference_mode()
    def __call__(self, waveforms: Waveforms) -> list[Packed]:
        """Encode waveforms (T,) in one batch and return the packed frames (N, D) of each layer."""
        device = next(self.encoder.parameters()).device
        batch = waveform_batch(waveforms, normalize=self.encoder.normalizes)
        states: list[Packed] = self.encoder(batch.to(device), normalize=False).hidden_states
        return states


class RandomSource(EncoderSource):
    """An encoder of the same architecture with randomly initialised weights.

    Args:
        encoder: Encoder whose class, config, device and compression rate are used.
        seed: Seed of the weights; torch's global generators are left unchanged.
    """

    def __init__(self, encoder: SpeechEncoder, *, seed: int) -> None:
        device = next(encoder.parameters()).device
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # not `torch.manual_seed`, which seeds GPUs too
            fresh = type(encoder)(encoder.config).to(device)
        fresh.normalize = encoder.normalize
        ours, theirs = fresh.compressor, encoder.compressor
        if ours is not None and theirs is not None:
            ours.rate, ours.frame_period_ms = theirs.rate, theirs.frame_period_ms
        super().__init__(fresh)
        self._key = ("random", type(encoder), encoder.config, encoder.normalizes, seed, *_compression(encoder))

    @property
    def key(self) -> object:
        """Class, config and seed, which determine the weights, and the compressor's rate and frame period."""
        return self._key


def _compression(encoder: SpeechEncoder) -> tuple[float | None, ...]:
    """Return rate and frame period (ms) of the encoder's compressor; empty without a compressor."""
    compressor = encoder.compressor
    values = () if compressor is None else (compressor.rate, compressor.frame_period_ms)
    return tuple(None if value is None else float(value) for value in values)


class LogMelSource:
    """80 log-mel energies every 10 ms, of waveforms normalised to zero mean and unit variance.

    Args:
        deltas: Append deltas and delta-deltas. Leave them out for features that are averaged over an example: the mean
            of a delta only shows how the two ends of the example differ.
    """

    frame_period_s = 0.01
    layers = 1

    def __init__(self, *, deltas: bool = True) -> None:
        self.deltas = deltas
        self._fbank = Fbank(FbankConfig(num_filters=_MELS, sampling_rate=SAMPLE_RATE_HZ))

    @property
    def key(self) -> object:
        """Name of the features, and whether they include deltas."""
        return ("log-mel", self.deltas)

    def __call__(self, waveforms: Waveforms) -> list[Packed]:
        """Return the packed frames of all waveforms (T,) as one layer: (N, 80), or (N, 240) with deltas."""
        spectra = []
        for waveform in waveforms:
            normalized = torch.from_numpy(pack_waveforms([waveform], normalize=True))
            mels = torch.as_tensor(self._fbank.extract(normalized, SAMPLE_RATE_HZ), device="cpu")
            if self.deltas:
                once = differences(mels)
                mels = torch.cat([mels, once, differences(once)], dim=1)
            spectra.append(mels)
        return [Packed.pack(spectra)]


@dataclass(frozen=True, eq=False)
class Features:
    """Features of the examples of one table.

    Args:
        frames: (L, T, D) features of each example, T frames in L layers: fp16, or fp32 if they are means over an
            example (T = 1).
        rows: For each example, the number of the table's row that it comes from.
        seconds: Duration of each example, in seconds.
        problems: Recordings that cannot be used.
        too_short: Number of recordings shorter than one segment.
        lengths: Number of frames of each example, counted before averaging.
    """

    frames: Sequence[Tensor]
    rows: tuple[int, ...]
    seconds: tuple[float, ...]
    problems: tuple[Problem, ...]
    too_short: int
    lengths: tuple[int, ...]

    def mean_frame_period_s(self, config: SpeechEncoderConfig) -> float:
        """Return the mean frame period of all examples, in seconds, for an encoder with a compressor.

        It is the period of the front end, times the ratio of its frames to the frames that the compressor leaves.

        Args:
            config: Config of the encoder that computed the features.
        """
        lengths = [round(seconds * SAMPLE_RATE_HZ) for seconds in self.seconds]
        before = sum(map(frame_grid(config).count, lengths))
        return config.samples_per_frame / SAMPLE_RATE_HZ * before / sum(self.lengths)


class Standard(NamedTuple):
    """Standardisation of features: mean and inverse standard deviation of each dimension, and a whitening matrix.

    Args:
        mean: (L, 1, D) fp32 means.
        scale: (L, 1, D) fp32 inverse standard deviations.
        whitening: (L, D, D) fp32 matrices that reduce correlation; None for none.
    """

    mean: Tensor  # (L, 1, D)
    scale: Tensor  # (L, 1, D)
    whitening: Tensor | None = None  # (L, D, D)

    @classmethod
    def of(cls, features: Features, examples: Iterable[int], *, whiten: bool = False) -> "Standard":
        """Compute the statistics over all frames of the given examples, summing in fp64.

        A constant dimension gets a scale of zero, so that it becomes zero.

        Args:
            features: Features of the training part.
            examples: Numbers of the examples to use.
            whiten: Also scale down directions of large variance, by ZCA with `SHRINKAGE`; no direction is amplified.
        """
        chosen = [features.frames[example] for example in examples]
        count = sum(frames.shape[1] for frames in chosen)
        mean = torch.zeros_like(chosen[0][:, :1], dtype=torch.float64)
        squares = torch.zeros_like(mean)
        for frames in chosen:
            mean += frames.sum(1, keepdim=True, dtype=torch.float64) / count
        for frames in chosen:
            # Subtract the mean in fp32: the differences are small even if the mean is large.
            squares += (frames.float() - mean.float()).square().sum(1, keepdim=True, dtype=torch.float64) / count
        deviation = squares.sqrt()
        scale = torch.where(deviation > 1e-6 * mean.abs(), 1 / deviation, 0.0)
        standard = cls(mean.float(), scale.float())
        if not whiten:
            return standard
        covariance = torch.zeros(len(mean), mean.shape[2], mean.shape[2], dtype=torch.float64, device="cpu")
        for frames in chosen:
            values = standard(frames)
            covariance += (values.mT @ values) / count
        return cls(standard.mean, standard.scale, _inverse_root(covariance))

    def to(self, device: torch.device | str) -> "Standard":
        """Return a copy on another device.

        Args:
            device: Device for the statistics and the whitening.
        """
        whitening = None if self.whitening is None else self.whitening.to(device)
        return Standard(self.mean.to(device), self.scale.to(device), whitening)

    def __call__(self, values: Tensor) -> Tensor:  # (L, T, D) -> the same in fp32
        """Standardise features to zero mean and unit variance, and apply the whitening if there is one."""
        standardised = (values.float() - self.mean) * self.scale
        return standardised if self.whitening is None else standardised @ self.whitening


def _inverse_root(covariance: Tensor) -> Tensor:  # (L, D, D) in fp64 -> fp32
    """Return the symmetric inverse square root of the covariance plus `SHRINKAGE` times the identity."""
    variances, directions = torch.linalg.eigh(covariance)
    scales = (variances.clamp(min=0) + SHRINKAGE).rsqrt()
    root: Tensor = (directions * scales[:, None]) @ directions.mT
    return root.float()


class FeatureStore:
    """Cache of features by source, table, segment length and averaging; each entry is computed on first use.

    The weights of an encoder must not change during the lifetime of the store.

    Args:
        memory_gb: Limit in GB (1e9 bytes) for the features of one source and table; larger ones go to a temporary file.
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
        """Return the features of all recordings of a table, computing them if they are not in the store.

        Args:
            source: Source that computes the features.
            table: Recordings to read.
            name: Name of the source for error messages.
            segment_s: Cut recordings into examples of this length in seconds and encode each alone; a shorter remainder
                is dropped. None makes each recording one example.
            mean: Keep only the mean over the frames of each example, in fp32.

        Raises:
            ValueError: No recording can be used, an example has no frames, or features are NaN or infinite.
        """
        key = (source.key, tuple(row.path for row in table.rows), table.rules, segment_s, mean)
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
                    what = "no frames" if frames.shape[1] == 0 else "NaN or infinite values"
                    raise ValueError(f"{name}: the features of {shown(table.rows[row].path)} contain {what}")
                kept.add(frames.cpu())
                rows.append(row)
                seconds.append(len(waveform) / SAMPLE_RATE_HZ)
        if not rows:
            problem = f"; first problem: {recordings.problems[0]}" if recordings.problems else ""
            short = f"; {recordings.too_short} are shorter than {segment_s:g} s" if recordings.too_short else ""
            raise ValueError(f"{table.name}: no recording can be used{problem}{short}")
        problems, too_short = tuple(recordings.problems), recordings.too_short
        return Features(kept.tensors(), tuple(rows), tuple(seconds), problems, too_short, tuple(lengths))


class _Recordings:
    """Iterates over a table's examples as (row number, waveform (T,)), and collects the recordings it cannot use."""

    def __init__(self, table: Table, segment_s: float | None) -> None:
        self.table, self.segment_s = table, segment_s
        self.problems: list[Problem] = []
        self.too_short = 0

    def __iter__(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        for number, row in enumerate(self.table.rows):
            cut = enter_file(row.path, recording_id=str(row.path), rules=self.table.rules)
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
    """A growing list of (L, T, D) tensors of one dtype: in memory, or above a limit in a temporary file.

    The file is deleted when the last tensor is released.
    """

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
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 (must stay open as long as the tensors that map it)
        if self._file is not None:
            with naming(Path(tempfile.gettempdir()), option="TMPDIR"):
                for held in self._held:
                    self._file.write(held.contiguous().numpy().tobytes())
                self._file.flush()
            self._held = [tensor[:0]]  # keeps the dtype

    def tensors(self) -> list[Tensor]:
        if self._file is None:
            return self._held
        mapped: NDArray[Any] = np.memmap(self._file, dtype=self._held[0].numpy().dtype, mode="r+")
        sizes = [shape.numel() for shape in self._shapes]
        parts = torch.from_numpy(mapped).split(sizes)
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

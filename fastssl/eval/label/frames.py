"""The frames to label, MFCC or a layer of an encoder, and the classes that they get."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from lhotse.cut import Cut
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastssl.data.audio import SAMPLE_RATE_HZ, AudioError, read_waveform
from fastssl.data.labels import CENTRES_FILE
from fastssl.data.mfcc import MFCC_FIRST_CENTRE_S, MFCC_SHIFT_S, mfcc
from fastssl.data.segments import smooth_classes
from fastssl.data.workers import end_if_unable_to_send
from fastssl.eval.encode import Reading, choose_device, encode_recordings
from fastssl.eval.extract import weights_digest
from fastssl.eval.label.settings import LabelSettings
from fastssl.interop import load_encoder
from fastssl.metrics import centre_costs, nearest_centres
from fastssl.models.speech_encoder import SpeechEncoder

#: Shortest recording that has a frame of MFCC.
MIN_DURATION_S = 0.025


class Classes(NamedTuple):
    """Everything needed to label frames.

    Args:
        centres: (K, D) fp32 k-means centres.
        price: Price of a segment (`LabelSettings.segment_price`); None gives each frame its nearest class.
    """

    centres: Tensor  # (K, D)
    price: float | None

    def of(self, frames: Tensor) -> Tensor:  # (N, D) -> (N,)
        """Return the nearest class of each frame, or with a price, the classes of the cheapest segmentation.

        Args:
            frames: (N, D) fp32 frames of one recording.

        Returns:
            (N,) int64 classes.

        Raises:
            ValueError: The frames have another width than the centres.
        """
        if frames.shape[1] != self.centres.shape[1]:
            raise ValueError(
                f"--kmeans: {CENTRES_FILE} has centres of width {self.centres.shape[1]}, but the frames have width "
                f"{frames.shape[1]}; restore it or make the labels again"
            )
        if self.price is None:
            return nearest_centres(frames, self.centres)
        return torch.from_numpy(smooth_classes(centre_costs(frames, self.centres).numpy(), price=self.price))


@dataclass(frozen=True)
class Features:
    """The frames to cluster: MFCC, or a layer of an encoder.

    Args:
        encoder: Encoder whose layer is clustered; None for MFCC.
        layer: Layer of the encoder.
        frame_shift_s: Time from one frame to the next, in seconds.
        first_centre_s: Time of the centre of the first frame, in seconds.
        channel: Channel to read; None averages all.
        num_workers: Number of processes that decode audio and compute MFCC.
        digest: Hash of the encoder's weights; None for MFCC.
    """

    encoder: SpeechEncoder | None
    layer: int
    frame_shift_s: float
    first_centre_s: float
    channel: int | None
    num_workers: int
    digest: str | None

    @classmethod
    def open(
        cls,
        settings: LabelSettings,
        *,
        normalize: bool | None = None,
        num_workers: int,
        device: str,
        download: bool,
    ) -> "Features":
        """Load the encoder that the settings name, if they name one.

        Args:
            settings: How to make labels.
            normalize: Whether recordings are scaled to zero mean and unit variance; None does what the model's config
                says.
            num_workers: Number of processes that decode audio and compute MFCC.
            device: Name of the device to encode on, or "auto".
            download: Whether a model may be downloaded from the Hub.

        Raises:
            ValueError: The model cannot be loaded, lacks the layer, or has a compressor with a fixed factor.
        """
        if settings.model is None:
            return cls(None, 0, MFCC_SHIFT_S, MFCC_FIRST_CENTRE_S, settings.channel, num_workers, None)
        encoder = load_encoder(settings.model, normalize=normalize, download=download).to(choose_device(device))
        if encoder.compressor is not None:
            if encoder.compressor.factor is not None:
                raise ValueError(
                    f"--model: {settings.model} has a compressor with a fixed factor, which leaves fewer frames than "
                    "labels need; choose a model without such a compressor"
                )
            encoder.compressor.rate, encoder.compressor.frame_period_ms = 0.0, None
        layers = encoder.config.num_hidden_layers
        layer = layers if settings.layer is None else settings.layer
        if not 0 <= layer <= layers:
            raise ValueError(f"--layer: the model has layers 0 to {layers}, got {layer}")
        shift_s = encoder.config.samples_per_frame / SAMPLE_RATE_HZ
        centre_s = encoder.config.receptive_field_samples / 2 / SAMPLE_RATE_HZ
        return cls(encoder, layer, shift_s, centre_s, settings.channel, num_workers, weights_digest(encoder))

    def of(self, cuts: Sequence[Cut], *, classes: "Classes | None" = None) -> Iterator[tuple[Cut, Tensor | AudioError]]:
        """Yield each recording with its features (frames, D), or if `classes` is given with its labels (frames,).

        A recording that cannot be used comes with an `AudioError` instead.

        Args:
            cuts: Recordings to read.
            classes: Classes to label the frames with; None yields features.
        """
        if self.encoder is None:
            dataset = _MfccDataset(cuts, self.channel, classes)
            loader = DataLoader(
                dataset, batch_size=None, num_workers=self.num_workers, worker_init_fn=end_if_unable_to_send
            )
            for cut, item in zip(cuts, loader, strict=True):
                yield cut, AudioError(item) if isinstance(item, str) else item
            return
        reading = Reading(channel=self.channel, num_workers=self.num_workers)
        for cut, item in encode_recordings(self.encoder, cuts, reading, layer=self.layer):
            if isinstance(item, Tensor):
                try:
                    item = _labelled(item, classes)
                except AudioError as error:
                    item = error
            yield cut, item


class _MfccDataset(Dataset[Tensor | str]):
    """MFCC (frames, D) of each recording, or its labels if `classes` is given; an error text if it is unusable."""

    def __init__(self, cuts: Sequence[Cut], channel: int | None, classes: "Classes | None") -> None:
        self.cuts, self.channel, self.classes = cuts, channel, classes

    def __len__(self) -> int:
        return len(self.cuts)

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            waveform = read_waveform(self.cuts[index], channel=self.channel)
            if len(waveform) < MIN_DURATION_S * SAMPLE_RATE_HZ:
                return f"is shorter than one frame ({MIN_DURATION_S:g} s)"
            return _labelled(mfcc(waveform), self.classes)
        except AudioError as error:
            return str(error)


def _labelled(frames: Tensor, classes: Classes | None) -> Tensor:  # (N, D) -> (N, D) or (N,)
    """Return the frames unchanged, or if `classes` is given the label of each frame.

    Raises:
        AudioError: A frame is not finite: NaN has no nearest centre, and a single one spoils k-means.
    """
    if not frames.isfinite().all():
        raise AudioError("has NaN or infinite features; check its sample values and the model's weights")
    return frames if classes is None else classes.of(frames.float())

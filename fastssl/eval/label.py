"""`fastssl label`: label frames with k-means classes of MFCC or of an encoder's layer, as targets for HuBERT."""

import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lhotse.cut import Cut
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastssl.data.audio import SAMPLE_RATE_HZ, AudioError, read_waveform
from fastssl.data.batches import utterance_id
from fastssl.data.corpus import Corpus, Problem, cut_name, open_corpus
from fastssl.data.labels import CENTRES_FILE, LABELS_FILE, SETTINGS_FILE, as_line, read_lines, read_settings
from fastssl.data.mfcc import MFCC_FIRST_CENTRE_S, MFCC_SHIFT_S, mfcc
from fastssl.data.rules import check_rules, recorded_rules
from fastssl.data.segments import smooth_classes
from fastssl.eval.encode import Reading, choose_device, default_workers, encode_recordings
from fastssl.eval.extract import weights_digest
from fastssl.eval.showing import track
from fastssl.files import append_text, is_partial, replacing, write_json
from fastssl.folder_lock import LOCK_FILE, folder_lock
from fastssl.interop import load_encoder
from fastssl.metrics import centre_costs, nearest_centres
from fastssl.models.folder import changed_settings, read_safetensors, write_weights
from fastssl.models.speech_encoder import SpeechEncoder
from fastssl.reading import brief, printable

logger = logging.getLogger(__name__)

_MIN_DURATION_S = 0.025
#: The search for a segment's price uses this many frames and halves its interval this many times.
_PRICE_FRAMES, _HALVINGS = 50_000, 30


@dataclass(frozen=True)
class LabelSettings:
    """How to make labels.

    Args:
        model: Encoder whose frames are clustered: a run of `fastssl pretrain`, a Transformers folder, a model name on
            the Hub, or a fairseq checkpoint; by default MFCC are clustered, as in HuBERT's first iteration.
        layer: Layer of the model to cluster: 0 is the input of the first layer, L the output of layer L; by default the
            last.
        clusters: Number of classes.
        fit_frames: Number of frames to fit k-means to, from recordings chosen by a hash of their ids.
        seed: Seed of k-means and of the choice of recordings.
        channel: Channel to read; by default all channels are averaged.
        rules: Version of the rules by which recordings are found and decoded; by default that of the output folder if
            it exists, else that of --kmeans, else the newest.
        segment_price: Price of a segment. All frames of a segment get the same class: the labels minimise the sum of
            squared distances to the class centres, plus this price for each segment. A compressor can learn from the
            segments. Their length depends on the price and on the scale of the features; the mean length is printed at
            the end. By default there are no segments, and each frame gets its nearest class.
        segment_ms: Mean length of a segment, in milliseconds, instead of a price: the price is chosen to give this
            length on the recordings that k-means is fitted to.
    """

    model: str | None = None
    layer: int | None = None
    clusters: int = 100
    fit_frames: int = 500_000
    seed: int = 0
    channel: int | None = None
    rules: int | None = None
    segment_price: float | None = None
    segment_ms: float | None = None

    def __post_init__(self) -> None:
        if self.rules is not None:
            check_rules(self.rules, "--rules")
        if self.segment_price is not None and self.segment_ms is not None:
            raise ValueError(
                "--segment_ms and --segment_price: give only one of them, got "
                f"{self.segment_ms} and {self.segment_price}"
            )
        if self.segment_ms is not None and not 0 < self.segment_ms < math.inf:
            raise ValueError(f"--segment_ms: must be positive and finite, got {self.segment_ms}")
        if self.segment_price is not None and not 0 <= self.segment_price < math.inf:
            raise ValueError(f"--segment_price: must be finite and not negative, got {self.segment_price}")
        if self.clusters < 2:
            raise ValueError(f"--clusters: must be at least 2, got {self.clusters}")
        if self.fit_frames < self.clusters:
            raise ValueError(
                f"--fit_frames: must be at least the number of clusters ({self.clusters}), got {self.fit_frames}"
            )
        if self.layer is not None and self.model is None:
            raise ValueError(f"--layer: {self.layer} is a layer of --model, which is missing; give --model too")


def label(
    audio: str | Path,
    output: str | Path,
    settings: LabelSettings,
    *,
    kmeans: str | Path | None = None,
    num_workers: int | None = None,
    device: str = "auto",
) -> list[Problem]:
    """Cluster the frames of every recording by k-means and write the class of each frame.

    The labels are a table that Lhotse can read too; `fastssl.data.labels` describes the files. `fastssl pretrain AUDIO
    --recipe hubert-base --data.labels OUTPUT` trains on them. With a segment length or price, the labels form segments,
    which teach a compressor where to fire (`--data.segments OUTPUT`).

    Running it again with the same arguments continues after an interruption, and labels recordings that were added
    since. Recordings that already have labels are skipped. A recording that was replaced is labelled again if its
    duration or sampling rate changed.

    Args:
        audio: Folder of recordings (WAV, FLAC, Ogg, MP3, ...; 4 kHz or more, any number of channels; subfolders too),
            Lhotse manifest (.jsonl.gz), or Lhotse shar directory.
        output: Folder for the labels.
        settings: How to make labels.
        kmeans: Folder of earlier labels whose k-means model and features are used again, so that held-out audio gets
            the same classes; of the other settings, only the channel and the rules are then used, and the model, which
            must have the same weights.
        num_workers: Number of processes that decode audio and compute MFCC; by default chosen by the number of cores.
        device: Device to encode on: cpu, cuda, cuda:1, ...; auto uses a GPU if there is one.

    Returns:
        The recordings that could not be used.

    Raises:
        ValueError: AUDIO, the model, the layer or the output folder is invalid, the folder was begun with other
            settings, another process is writing to it, or there are fewer frames than clusters.
        WriteError: The system refused to write; complete labels are kept.
    """
    output = Path(output)
    if settings.model is not None and Path(settings.model).exists():
        settings = replace(settings, model=str(Path(settings.model).absolute()))
    donor = None if kmeans is None else Path(kmeans)
    if settings.rules is None and (donor is None or (output / SETTINGS_FILE).is_file()):
        settings = replace(settings, rules=recorded_rules(output / SETTINGS_FILE))
    # A model that only the file LABELS/settings.json names is not downloaded.
    typed = donor is None or settings.model is not None
    if donor is not None:
        settings = _settings_of(donor, settings)
    assert settings.rules is not None
    workers = default_workers() if num_workers is None else num_workers
    try:
        features = _Features.open(settings, num_workers=workers, device=device, download=typed)
    except ValueError as error:
        if typed:
            raise
        model = printable(settings.model)
        raise ValueError(
            f"--kmeans: {donor} was made from a layer of {model}, which cannot be used: {error}; if you have or trust "
            f"that model, add --model {model}, or the path where it is now"
        ) from None
    _check_output(output)
    corpus = open_corpus(
        audio, min_duration_s=_MIN_DURATION_S, window_s=None, max_bad_fraction=1.0, rules=settings.rules
    )
    with folder_lock(output, option="--output"):
        return _write_labels(output, settings, features, corpus, donor=donor)


def _write_labels(
    output: Path, settings: LabelSettings, features: "_Features", corpus: Corpus, *, donor: Path | None
) -> list[Problem]:
    """Label the recordings that have no labels yet; return those that could not be used."""
    cuts = list(corpus.cuts)
    classes = _classes(output, settings, features, cuts, donor=donor)
    done = {
        line["id"]: (line["duration"], line["custom"]["sampling_rate"]) for line in read_lines(output / LABELS_FILE)
    }
    # Label a recording again if another of the same name has replaced it.
    todo = [cut for cut in cuts if done.get(cut.id) != (cut.duration, cut.recording.sampling_rate)]
    if done:
        logger.info("%d of %d recordings are already labelled", len(cuts) - len(todo), len(cuts))
    if todo:
        _drop_lines(output / LABELS_FILE, {cut.id for cut in todo})
    problems = corpus.problems + _append_lines(output / LABELS_FILE, features, todo, classes)
    for problem in problems:
        logger.warning("left out: %s", problem)
    labelled = len(cuts) + len(corpus.problems) - len(problems)
    logger.info("%d recordings labelled in %s, %d left out", labelled, output, len(problems))
    return problems


def _append_lines(path: Path, features: "_Features", cuts: Sequence[Cut], classes: "_Classes") -> list[Problem]:
    """Label recordings, append each to the file as soon as it is done, and return those that could not be used."""
    problems = []
    frames = segments = 0
    found = features.of(cuts, classes=classes)
    shift_s, first_s = features.frame_shift_s, features.first_centre_s
    for cut, labels in track(found, "labelling", total=len(cuts)):
        if isinstance(labels, AudioError):
            problems.append(Problem(cut_name(cut), str(labels)))
            continue
        line = as_line(cut, labels.tolist(), frame_shift_s=shift_s, first_centre_s=first_s)
        append_text(path, line)
        frames, segments = frames + len(labels), segments + len(labels.unique_consecutive())
    if segments:
        logger.info("a class lasts %.0f ms on average", 1000 * shift_s * frames / segments)
    return problems


@dataclass(frozen=True)
class _Features:
    """The frames to cluster: MFCC, or a layer of an encoder."""

    encoder: SpeechEncoder | None
    layer: int
    frame_shift_s: float
    first_centre_s: float
    channel: int | None
    num_workers: int
    digest: str | None

    @classmethod
    def open(cls, settings: LabelSettings, *, num_workers: int, device: str, download: bool) -> "_Features":
        if settings.model is None:
            return cls(None, 0, MFCC_SHIFT_S, MFCC_FIRST_CENTRE_S, settings.channel, num_workers, None)
        encoder = load_encoder(settings.model, download=download).to(choose_device(device))
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

    def of(
        self, cuts: Sequence[Cut], *, classes: "_Classes | None" = None
    ) -> Iterator[tuple[Cut, Tensor | AudioError]]:
        """Yield each recording with its features (frames, D), or if `classes` is given with its labels (frames,).

        A recording that cannot be used comes with an `AudioError` instead.
        """
        if self.encoder is None:
            dataset = _MfccDataset(cuts, self.channel, classes)
            loader = DataLoader(dataset, batch_size=None, num_workers=self.num_workers)
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

    def __init__(self, cuts: Sequence[Cut], channel: int | None, classes: "_Classes | None") -> None:
        self.cuts, self.channel, self.classes = cuts, channel, classes

    def __len__(self) -> int:
        return len(self.cuts)

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            waveform = read_waveform(self.cuts[index], channel=self.channel)
            if len(waveform) < _MIN_DURATION_S * SAMPLE_RATE_HZ:
                return f"is shorter than one frame ({_MIN_DURATION_S:g} s)"
            return _labelled(mfcc(waveform), self.classes)
        except AudioError as error:
            return str(error)


class _Classes(NamedTuple):
    """Everything needed to label frames: the k-means centres and the price of a segment."""

    centres: Tensor  # (K, D)
    price: float | None

    def of(self, frames: Tensor) -> Tensor:  # (N, D) -> (N,)
        """Return the nearest class of each frame, or with a price, the classes of the cheapest segmentation."""
        if frames.shape[1] != self.centres.shape[1]:
            raise ValueError(
                f"--kmeans: {CENTRES_FILE} has centres of width {self.centres.shape[1]}, but the frames have width "
                f"{frames.shape[1]}; restore it or make the labels again"
            )
        if self.price is None:
            return nearest_centres(frames, self.centres)
        return torch.from_numpy(smooth_classes(centre_costs(frames, self.centres).numpy(), price=self.price))


def _labelled(frames: Tensor, classes: _Classes | None) -> Tensor:  # (N, D) -> (N, D) or (N,)
    """Return the frames unchanged, or if `classes` is given the label of each frame.

    Raises:
        AudioError: A frame is not finite: NaN has no nearest centre, and a single one spoils k-means.
    """
    if not frames.isfinite().all():
        raise AudioError("has NaN or infinite features; check its sample values and the model's weights")
    return frames if classes is None else classes.of(frames.float())


def _classes(
    output: Path, settings: LabelSettings, features: _Features, cuts: Sequence[Cut], *, donor: Path | None
) -> _Classes:
    """Return the classes of `output`, else those of `donor`, else fit new ones; prepare `output` for labels."""
    record = asdict(settings) | {
        "weights": features.digest,
        "frame_shift_s": features.frame_shift_s,
        "first_centre_s": features.first_centre_s,
    }
    if (output / SETTINGS_FILE).is_file():
        before = _checked_settings(output)
        # Compare models by their weights (the digest), not by their path.
        if changed := changed_settings(before, record | {"model": before.get("model")}):
            raise ValueError(
                f"--output: {output} was begun with other settings ({changed}); "
                "use the same settings or choose another folder"
            )
        centres = _read_centres(output)
        if donor is not None and not torch.equal(centres, _read_centres(donor)):
            raise ValueError(
                f"--kmeans: {output} was begun with a k-means model other than that of {donor}; choose another --output"
            )
        return _Classes(centres, before.get("price"))
    if donor is not None and read_settings(donor).get("weights") != features.digest:
        raise ValueError(
            f"--kmeans: {settings.model} had other weights when {donor} was made; restore that model or make new labels"
        )
    if donor is not None:
        classes = _Classes(_read_centres(donor), settings.segment_price)
    else:
        classes = _fit(features, cuts, settings)
    write_weights(output / CENTRES_FILE, {"centres": classes.centres})
    append_text(output / LABELS_FILE, "")
    write_json(output / SETTINGS_FILE, record | {"price": classes.price})
    return classes


def _fit(features: _Features, cuts: Sequence[Cut], settings: LabelSettings) -> _Classes:
    """Fit k-means to a sample of the recordings, as HuBERT does (fairseq, simple_kmeans), and find a segment's price.

    Raises:
        ValueError: The sample has fewer frames than there are clusters, or no price gives segments of `segment_ms`.
    """
    from sklearn.cluster import MiniBatchKMeans

    order = sorted(cuts, key=lambda cut: (utterance_id(f"{settings.seed}/{cut.id}"), cut.id))
    sample, expected = [], 0.0
    for cut in order:
        if expected >= settings.fit_frames:
            break
        sample.append(cut)
        expected += cut.duration / features.frame_shift_s
    found = {cut.id: frames.numpy() for cut, frames in features.of(sample) if not isinstance(frames, AudioError)}
    # Restore the order of the sample: recordings arrive in an order that depends on the workers, and k-means depends
    # on the order of frames.
    parts = [found[cut.id] for cut in sample if cut.id in found]
    frames = np.concatenate(parts)[: settings.fit_frames] if parts else np.empty((0, 1), np.float32)
    if len(frames) < settings.clusters:
        raise ValueError(
            f"--clusters: must be at most the number of frames ({len(frames)}), got {settings.clusters}; "
            "give more audio or fewer clusters"
        )
    logger.info("k-means: fitting %d clusters to %d frames of width %d", settings.clusters, *frames.shape)
    fitted = MiniBatchKMeans(
        settings.clusters,
        init="k-means++",
        max_iter=100,
        batch_size=10_000,
        tol=0.0,
        max_no_improvement=100,
        n_init=20,
        reassignment_ratio=0.0,
        random_state=settings.seed,
    ).fit(frames)
    centres = torch.from_numpy(np.ascontiguousarray(fitted.cluster_centers_, dtype=np.float32))
    if settings.segment_ms is None:
        return _Classes(centres, settings.segment_price)
    return _Classes(centres, _price(parts, centres, wanted=settings.segment_ms / 1000 / features.frame_shift_s))


def _price(recordings: Sequence[NDArray[np.float32]], centres: Tensor, *, wanted: float) -> float:
    """Find by bisection the price at which segments have `wanted` frames on average.

    Args:
        recordings: Frames (T, D) of each recording; about the first 50,000 frames are used.
        centres: (K, D) k-means centres.
        wanted: Mean length of a segment, in frames.

    Raises:
        ValueError: No price makes segments that short or that long.
    """
    costs, frames = [], 0
    for recording in recordings:
        if frames >= _PRICE_FRAMES:
            break
        costs.append(centre_costs(torch.from_numpy(recording), centres).numpy())
        frames += len(recording)

    def mean_frames(price: float) -> float:
        classes = [smooth_classes(cost, price=price) for cost in costs]
        return frames / sum(1 + int(np.count_nonzero(np.diff(of_recording))) for of_recording in classes)

    shortest, longest = mean_frames(0.0), frames / len(costs)
    if not shortest <= wanted < longest:
        raise ValueError(
            f"--segment_ms: must lie between {shortest:.2g} frames (each frame takes its nearest class) and "
            f"{longest:.3g} frames (each recording is one segment), but asks for {wanted:.3g} frames"
        )
    low, high = 0.0, 1.0
    while mean_frames(high) < wanted:
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_frames(middle) < wanted else (low, middle)
    logger.info("price per segment: %.4g, which gives segments of %.3g frames on average", high, mean_frames(high))
    return high


def _settings_of(folder: Path, given: LabelSettings) -> LabelSettings:
    """Return the settings of a folder of labels, but the channel of `given` and, if given, its model and rules."""
    values: dict[str, Any] = _checked_settings(folder)
    if given.model is not None and values.get("model") is None:
        raise ValueError(f"--model: {folder} was made from MFCC, not from a model; leave --model out")
    model = values.get("model") if given.model is None else given.model
    rules = values["rules"] if given.rules is None else given.rules
    kept = {name: values.get(name) for name in ("layer", "clusters", "fit_frames", "seed")}
    return LabelSettings(**kept, model=model, channel=given.channel, rules=rules, segment_price=values.get("price"))  # type: ignore[arg-type]


def _checked_settings(folder: Path) -> dict[str, Any]:
    """Read the settings of a folder of labels, and check the types of those that labels are made with."""
    values = read_settings(folder)
    null = type(None)
    kinds: dict[str, tuple[type, ...]] = {
        "model": (str, null),
        "layer": (int, null),
        "clusters": (int,),
        "fit_frames": (int,),
        "seed": (int,),
        "price": (int, float, null),
    }
    for name, kind in kinds.items():
        if type(values.get(name)) not in kind:
            raise ValueError(
                f"{folder / SETTINGS_FILE}: {name} is {brief(values.get(name))}, expected "
                f"{' or '.join(one.__name__ for one in kind)}; make the labels again with `fastssl label`"
            )
    return values


def _read_centres(folder: Path) -> Tensor:
    path = folder / CENTRES_FILE
    if not path.is_file():
        raise ValueError(f"{path}: is missing; it contains the k-means model, so restore it or make the labels again")
    try:
        centres = read_safetensors(path)["centres"]
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: is damaged ({printable(error)}); restore it or make the labels again") from None
    clusters = read_settings(folder)["clusters"]
    if centres.dim() != 2 or len(centres) != clusters or centres.dtype != torch.float32:
        raise ValueError(f"{path}: is damaged (centres are not fp32, ({clusters}, width)); make the labels again")
    if not centres.isfinite().all():
        raise ValueError(f"{path}: is damaged (centres are NaN or infinite); restore it or make the labels again")
    return centres


def _check_output(output: Path) -> None:
    if (output / SETTINGS_FILE).is_file() or not output.exists():
        return
    ours = {CENTRES_FILE, LABELS_FILE, LOCK_FILE}
    if not output.is_dir() or any(path.name not in ours and not is_partial(path) for path in output.iterdir()):
        raise ValueError(f"--output: {output} exists, is not empty, and contains no labels; choose another folder")


def _drop_lines(path: Path, ids: set[str]) -> None:
    """Rewrite a labels file without the recordings in `ids` and without an incomplete last line (after a kill)."""
    with replacing(path) as partial, path.open("rb") as file, partial.open("wb") as kept:
        kept.writelines(line for line in file if line.endswith(b"\n") and json.loads(line)["id"] not in ids)

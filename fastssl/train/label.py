"""`fastssl label`: k-means classes of frames, from MFCC or from a layer of an encoder, for HuBERT to learn from."""

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lhotse.cut import Cut
from rich import get_console
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastssl.data.audio import SAMPLE_RATE_HZ, AudioError, read_waveform
from fastssl.data.batches import utterance_id
from fastssl.data.corpus import Problem, cut_name, open_corpus
from fastssl.data.labels import CENTRES_FILE, LABELS_FILE, SETTINGS_FILE, LabelTable, as_line, read_lines, read_settings
from fastssl.data.mfcc import MFCC_FIRST_CENTRE_S, MFCC_SHIFT_S, mfcc
from fastssl.interop import load_encoder
from fastssl.metrics import nearest_centres
from fastssl.models.folder import write_json, write_weights
from fastssl.models.speech_encoder import SpeechEncoder
from fastssl.train.config import PretrainConfig
from fastssl.train.data import PretrainDataModule
from fastssl.train.encode import Reading, choose_device, default_workers, encode_recordings
from fastssl.train.extract import weights_digest

logger = logging.getLogger(__name__)

#: Written last: other processes of a run wait for it.
_DONE_FILE = "done.json"
#: A failure that has stood so long is this attempt's: the first process takes an earlier one's away when it starts.
_FAILED_FOR_S = 30.0
_MIN_DURATION_S = 0.025


@dataclass(frozen=True)
class LabelSettings:
    """How labels are made.

    Args:
        model: A run of `fastssl pretrain`, a Transformers folder, a name on the Hub, or a checkpoint of fairseq; null
            clusters MFCC, as HuBERT's first iteration.
        layer: Of the model: 0 is the input of the first layer, L the output of the last; null is the last.
        clusters: Classes.
        fit_frames: Frames that k-means is fitted to, of recordings drawn by a hash of their ids.
        seed: Of k-means, and of the draw.
        channel: The channel to read; null averages all of them.
    """

    model: str | None = None
    layer: int | None = None
    clusters: int = 100
    fit_frames: int = 500_000
    seed: int = 0
    channel: int | None = None

    def __post_init__(self) -> None:
        if self.clusters < 2:
            raise ValueError(f"--clusters: must be at least 2, got {self.clusters}")
        if self.fit_frames < self.clusters:
            raise ValueError(f"--fit_frames: {self.fit_frames} frames make no {self.clusters} clusters")
        if self.layer is not None and self.model is None:
            raise ValueError("--layer: is a layer of --model, which is not given")


def label(
    audio: str | Path,
    output: str | Path,
    settings: LabelSettings,
    *,
    kmeans: str | Path | None = None,
    num_workers: int | None = None,
    device: str = "auto",
) -> list[Problem]:
    """Label the frames of every recording; `fastssl.data.labels` says what the folder then holds.

    Recordings that the folder has labels for already are left alone, so that a run which was stopped goes on where it
    was, and recordings that have come to AUDIO since are added. One that was replaced is labelled again where duration
    or sampling rate tell.

    Args:
        audio: Folder, Lhotse manifest or shar directory.
        output: Folder for the labels.
        settings: From what they are made.
        kmeans: Labels whose k-means model and features are taken instead: those of held-out audio must be the same
            classes. `settings` then is of no account but for `channel`.
        num_workers: Processes that decode, and compute MFCC; None chooses by the number of cores.
        device: Where to encode; "auto" takes a GPU where there is one.

    Returns:
        The recordings that could not be used.

    Raises:
        ValueError: AUDIO, the model, the layer or the folder does not serve; the folder was begun with other settings;
            there are fewer frames than clusters.
    """
    output = Path(output)
    donor = None if kmeans is None else Path(kmeans)
    if donor is not None:
        settings = _settings_of(donor, channel=settings.channel)
    workers = default_workers() if num_workers is None else num_workers
    try:
        features = _Features.open(settings, num_workers=workers, device=device)
    except ValueError as error:
        if donor is None:
            raise
        raise ValueError(f"--kmeans: {donor} is made from a layer of {settings.model}: {error}") from None
    _check_output(output)
    corpus = open_corpus(audio, min_duration_s=_MIN_DURATION_S, window_s=None, max_bad_fraction=1.0)
    cuts = list(corpus.cuts)
    centres = _centres(output, settings, features, cuts, donor=donor)
    done = {
        line["id"]: (line["duration"], line["custom"]["sampling_rate"]) for line in read_lines(output / LABELS_FILE)
    }
    # A recording that was replaced by another of the same name is labelled again.
    todo = [cut for cut in cuts if done.get(cut.id) != (cut.duration, cut.recording.sampling_rate)]
    if done:
        logger.info("%d of %d recordings are labelled already", len(cuts) - len(todo), len(cuts))
    if todo:
        (output / _DONE_FILE).unlink(missing_ok=True)
        _drop_lines(output / LABELS_FILE, {cut.id for cut in todo})
    problems = corpus.problems + _append_lines(output / LABELS_FILE, features, todo, centres)
    for problem in problems:
        logger.warning("left out: %s", problem)
    labelled = len(cuts) + len(corpus.problems) - len(problems)
    write_json(output / _DONE_FILE, {"labelled": labelled, "left_out": len(problems)})
    logger.info("%d recordings labelled in %s, %d left out", labelled, output, len(problems))
    return problems


def _append_lines(path: Path, features: "_Features", cuts: Sequence[Cut], centres: Tensor) -> list[Problem]:
    """Label recordings; each is in the file as soon as it is done."""
    problems = []
    console = get_console()
    found = features.of(cuts, centres=centres)
    shift_s, first_s = features.frame_shift_s, features.first_centre_s
    for cut, labels in track(found, "labelling", total=len(cuts), console=console, disable=not console.is_terminal):
        if isinstance(labels, AudioError):
            problems.append(Problem(cut_name(cut), str(labels)))
            continue
        line = as_line(cut, labels.tolist(), frame_shift_s=shift_s, first_centre_s=first_s)
        try:
            with path.open("a") as file:
                file.write(line)
        except OSError as error:
            raise ValueError(f"--output: {path} cannot be written: {error.strerror}; what is there is kept") from error
    return problems


def open_labels(config: PretrainConfig) -> LabelTable | None:
    """The labels that a run is given, before it writes anything; None where it is to make them.

    Raises:
        ValueError: There are none in that folder, or of another number of classes than the model has.
    """
    if config.data.labels is None:
        return None
    table = LabelTable(config.data.labels)
    _check_classes(table, config)
    return table


def labels_for_run(
    run: Path, config: PretrainConfig, data: PretrainDataModule, given: LabelTable | None, *, first: bool
) -> None:
    """Give the data of a run its labels, and make those that are missing, in RUN/labels and RUN/labels-valid.

    Args:
        run: Its folder.
        config: Its settings.
        data: Takes the labels.
        given: `open_labels(config)`, which `data` has already where it is not None.
        first: Whether this process makes the labels; the others wait for it.

    Raises:
        ValueError: Too many recordings have no labels that fit.
    """
    stride, receptive_field = config.model.samples_per_frame, config.model.receptive_field_samples
    made = run / "labels"
    if given is None:
        settings = LabelSettings(clusters=_clusters(config), seed=config.seed, channel=config.data.channel)
        _label_or_wait(config.audio, made, settings, kmeans=None, workers=config.data.num_workers, first=first)
        given = LabelTable(made)
        _check_classes(given, config)
        data.attach_labels("audio", given, stride=stride, receptive_field=receptive_field)
    elif first and given.settings.get("channel", config.data.channel) != config.data.channel:
        channels = [
            "all channels" if one is None else f"channel {one}"
            for one in (given.settings["channel"], config.data.channel)
        ]
        logger.warning("data.labels: %s were made from %s, and the run reads %s", given.folder, *channels)
    if isinstance(config.data.valid, str):
        settings = LabelSettings(channel=config.data.channel)
        made, workers = run / "labels-valid", config.data.num_workers
        _label_or_wait(config.data.valid, made, settings, kmeans=given.folder, workers=workers, first=first)
        data.attach_labels("valid", LabelTable(made), stride=stride, receptive_field=receptive_field)


def _label_or_wait(
    audio: str, output: Path, settings: LabelSettings, *, kmeans: Path | None, workers: int | None, first: bool
) -> None:
    # Torchrun ends the others where the first fails, and Lightning starts them only after this, but srun waits.
    failed = output.with_name(f"{output.name}.failed")
    if first:
        failed.unlink(missing_ok=True)
        try:
            label(audio, output, settings, kmeans=kmeans, num_workers=workers)
        except BaseException as error:
            with suppress(OSError):  # on a full disk the error itself matters more
                failed.write_text(f"{str(error) or type(error).__name__}\n")
            raise
    seen_s: float | None = None
    while not (output / _DONE_FILE).is_file():
        if not failed.is_file():
            seen_s = None
        elif seen_s is None:
            seen_s = time.monotonic()
        elif time.monotonic() - seen_s > _FAILED_FOR_S:
            raise ValueError(f"the process that makes {output} failed: {failed.read_text().strip()}")
        time.sleep(0.5)


def _clusters(config: PretrainConfig) -> int:
    clusters = getattr(config.model, "num_clusters", None)
    assert isinstance(clusters, int)
    return clusters


def _check_classes(table: LabelTable, config: PretrainConfig) -> None:
    if table.classes != _clusters(config):
        raise ValueError(
            f"data.labels: {table.folder} has {table.classes} classes; add --model.num_clusters {table.classes}"
        )


@dataclass(frozen=True)
class _Features:
    """What is clustered: MFCC, or a layer of an encoder."""

    encoder: SpeechEncoder | None
    layer: int
    frame_shift_s: float
    first_centre_s: float
    channel: int | None
    num_workers: int
    digest: str | None

    @classmethod
    def open(cls, settings: LabelSettings, *, num_workers: int, device: str) -> "_Features":
        if settings.model is None:
            return cls(None, 0, MFCC_SHIFT_S, MFCC_FIRST_CENTRE_S, settings.channel, num_workers, None)
        encoder = load_encoder(settings.model).to(choose_device(device))
        layers = encoder.config.num_hidden_layers
        layer = layers if settings.layer is None else settings.layer
        if not 0 <= layer <= layers:
            raise ValueError(f"--layer: the model has layers 0 to {layers}, got {layer}")
        shift_s = encoder.config.samples_per_frame / SAMPLE_RATE_HZ
        centre_s = encoder.config.receptive_field_samples / 2 / SAMPLE_RATE_HZ
        return cls(encoder, layer, shift_s, centre_s, settings.channel, num_workers, weights_digest(encoder))

    def of(self, cuts: Sequence[Cut], *, centres: Tensor | None = None) -> Iterator[tuple[Cut, Tensor | AudioError]]:
        """Features (frames, D) of each recording, or, given centres, its labels (frames,); or why it has none."""
        if self.encoder is None:
            dataset = _MfccDataset(cuts, self.channel, centres)
            loader = DataLoader(dataset, batch_size=None, num_workers=self.num_workers)
            for cut, item in zip(cuts, loader, strict=True):
                yield cut, AudioError(item) if isinstance(item, str) else item
            return
        reading = Reading(channel=self.channel, num_workers=self.num_workers)
        for cut, item in encode_recordings(self.encoder, cuts, reading, layer=self.layer):
            if isinstance(item, Tensor):
                try:
                    item = _labelled(item, centres)
                except AudioError as error:
                    item = error
            yield cut, item


class _MfccDataset(Dataset[Tensor | str]):
    """MFCC of a recording, or its labels; or in words what is wrong with it."""

    def __init__(self, cuts: Sequence[Cut], channel: int | None, centres: Tensor | None) -> None:
        self.cuts, self.channel, self.centres = cuts, channel, centres

    def __len__(self) -> int:
        return len(self.cuts)

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            waveform = read_waveform(self.cuts[index], channel=self.channel)
            if len(waveform) < _MIN_DURATION_S * SAMPLE_RATE_HZ:
                return f"is shorter than one frame ({_MIN_DURATION_S:g} s)"
            return _labelled(mfcc(waveform), self.centres)
        except AudioError as error:
            return str(error)


def _labelled(frames: Tensor, centres: Tensor | None) -> Tensor:  # (N, D), (K, D) -> (N, D) or (N,)
    """The frames, or, given centres, which of them is nearest to each.

    Raises:
        AudioError: They are not finite; a NaN is near to no centre, and one of them spoils k-means.
    """
    if not frames.isfinite().all():
        raise AudioError("has frames that are not finite: its samples are too large, or the weights of the model are")
    return frames if centres is None else nearest_centres(frames.float(), centres)


def _centres(
    output: Path, settings: LabelSettings, features: _Features, cuts: Sequence[Cut], *, donor: Path | None
) -> Tensor:
    """Those of the folder, of the donor, or new ones; and the folder made ready."""
    record = asdict(settings) | {
        "weights": features.digest,
        "frame_shift_s": features.frame_shift_s,
        "first_centre_s": features.first_centre_s,
    }
    if (output / SETTINGS_FILE).is_file():
        before = read_settings(output)
        # A model is what it computes, wherever it lies.
        changed = [name for name in record if name != "model" and before.get(name) != record[name]]
        if changed:
            differences = "; ".join(f"{name}: {before.get(name)} there, {record[name]} now" for name in changed)
            raise ValueError(f"--output: {output} was begun with other settings ({differences})")
        centres = _read_centres(output)
        if donor is not None and not torch.equal(centres, _read_centres(donor)):
            raise ValueError(f"--kmeans: {output} was begun with another k-means model than that of {donor}")
        return centres
    if donor is not None and read_settings(donor).get("weights") != features.digest:
        raise ValueError(f"--kmeans: {donor} was made when {settings.model} had other weights than it has now")
    centres = _read_centres(donor) if donor is not None else _fit(features, cuts, settings)
    output.mkdir(parents=True, exist_ok=True)
    write_weights(output / CENTRES_FILE, {"centres": centres})
    (output / LABELS_FILE).touch()
    write_json(output / SETTINGS_FILE, record)
    return centres


def _fit(features: _Features, cuts: Sequence[Cut], settings: LabelSettings) -> Tensor:  # (K, D)
    """k-means as HuBERT fits it (fairseq, simple_kmeans), on a sample of the recordings."""
    from sklearn.cluster import MiniBatchKMeans

    order = sorted(cuts, key=lambda cut: (utterance_id(f"{settings.seed}/{cut.id}"), cut.id))
    sample, expected = [], 0.0
    for cut in order:
        if expected >= settings.fit_frames:
            break
        sample.append(cut)
        expected += cut.duration / features.frame_shift_s
    found = {cut.id: frames.numpy() for cut, frames in features.of(sample) if not isinstance(frames, AudioError)}
    # Recordings come in an order that depends on the workers, and k-means depends on the order of frames.
    parts = [found[cut.id] for cut in sample if cut.id in found]
    frames = np.concatenate(parts)[: settings.fit_frames] if parts else np.empty((0, 1), np.float32)
    if len(frames) < settings.clusters:
        raise ValueError(f"--clusters: {settings.clusters} clusters of {len(frames)} frames; there is too little audio")
    logger.info("k-means: %d clusters of %d frames of width %d", settings.clusters, *frames.shape)
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
    return torch.from_numpy(np.ascontiguousarray(fitted.cluster_centers_, dtype=np.float32))


def _settings_of(folder: Path, *, channel: int | None) -> LabelSettings:
    values: dict[str, Any] = read_settings(folder)
    names = ("model", "layer", "clusters", "fit_frames", "seed")
    return LabelSettings(**{name: values[name] for name in names}, channel=channel)


def _read_centres(folder: Path) -> Tensor:
    path = folder / CENTRES_FILE
    if not path.is_file():
        raise ValueError(f"{path}: is missing; it holds the k-means model")
    try:
        return load_file(path)["centres"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path}: is damaged: {error}") from None


def _check_output(output: Path) -> None:
    if (output / SETTINGS_FILE).is_file() or not output.exists():
        return
    ours = {CENTRES_FILE, LABELS_FILE}
    if not output.is_dir() or any(path.name not in ours for path in output.iterdir() if path.suffix != ".partial"):
        raise ValueError(f"--output: {output} exists, is not empty, and holds no labels")


def _drop_lines(path: Path, ids: set[str]) -> None:
    """Leave out what is labelled anew, and what a kill left of a last line."""
    partial = path.with_name(path.name + ".partial")
    with path.open("rb") as file, partial.open("wb") as kept:
        kept.writelines(line for line in file if line.endswith(b"\n") and json.loads(line)["id"] not in ids)
    partial.replace(path)

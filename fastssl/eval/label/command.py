"""`fastssl label`: label frames with k-means classes of MFCC or of an encoder's layer, as targets for HuBERT."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from lhotse.cut import Cut

from fastssl.data.audio import AudioError
from fastssl.data.corpus import Corpus, Problem, cut_name, open_corpus
from fastssl.data.labels import CENTRES_FILE, LABELS_FILE, SETTINGS_FILE, as_line, read_lines, read_settings
from fastssl.data.rules import recorded_rules
from fastssl.eval.encode import continue_unrecorded, default_workers, recorded_normalize
from fastssl.eval.label.frames import MIN_DURATION_S, Classes, Features
from fastssl.eval.label.kmeans import fit, read_centres
from fastssl.eval.label.settings import LabelSettings, checked_settings, settings_of
from fastssl.eval.showing import track
from fastssl.files import append_text, is_partial, replacing, write_json
from fastssl.folder_lock import LOCK_FILE, folder_lock
from fastssl.models.folder import changed_settings, write_weights
from fastssl.reading import printable

logger = logging.getLogger(__name__)


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
        settings = settings_of(donor, settings)
    assert settings.rules is not None
    workers = default_workers() if num_workers is None else num_workers
    earlier = output if donor is None or (output / SETTINGS_FILE).is_file() else donor
    normalize = recorded_normalize(earlier / SETTINGS_FILE)
    try:
        features = Features.open(settings, normalize=normalize, num_workers=workers, device=device, download=typed)
    except ValueError as error:
        if typed:
            raise
        model = printable(settings.model)
        raise ValueError(
            f"--kmeans: {donor} was made from a layer of {model}, which cannot be used: {error}; if you have or trust "
            f"that model, add --model {model}, or the path where it is now"
        ) from None
    if features.encoder is not None:
        continue_unrecorded(features.encoder, earlier / SETTINGS_FILE)
    _check_output(output)
    corpus = open_corpus(
        audio, min_duration_s=MIN_DURATION_S, window_s=None, max_bad_fraction=1.0, rules=settings.rules
    )
    with folder_lock(output, option="--output"):
        return _write_labels(output, settings, features, corpus, donor=donor)


def _write_labels(
    output: Path, settings: LabelSettings, features: "Features", corpus: Corpus, *, donor: Path | None
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


def _append_lines(path: Path, features: "Features", cuts: Sequence[Cut], classes: "Classes") -> list[Problem]:
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


def _classes(
    output: Path, settings: LabelSettings, features: Features, cuts: Sequence[Cut], *, donor: Path | None
) -> Classes:
    """Return the classes of `output`, else those of `donor`, else fit new ones; prepare `output` for labels."""
    record = asdict(settings) | {
        "weights": features.digest,
        "normalize": None if features.encoder is None else features.encoder.normalizes,
        "frame_shift_s": features.frame_shift_s,
        "first_centre_s": features.first_centre_s,
    }
    if (output / SETTINGS_FILE).is_file():
        before = {"normalize": record["normalize"]} | checked_settings(output)
        # Compare models by their weights (the digest), not by their path.
        if changed := changed_settings(before, record | {"model": before.get("model")}):
            raise ValueError(
                f"--output: {output} was begun with other settings ({changed}); "
                "use the same settings or choose another folder"
            )
        centres = read_centres(output)
        if donor is not None and not torch.equal(centres, read_centres(donor)):
            raise ValueError(
                f"--kmeans: {output} was begun with a k-means model other than that of {donor}; choose another --output"
            )
        return Classes(centres, before.get("price"))
    if donor is not None and read_settings(donor).get("weights") != features.digest:
        raise ValueError(
            f"--kmeans: {settings.model} had other weights when {donor} was made; restore that model or make new labels"
        )
    if donor is not None:
        classes = Classes(read_centres(donor), settings.segment_price)
    else:
        classes = fit(features, cuts, settings)
    write_weights(output / CENTRES_FILE, {"centres": classes.centres})
    append_text(output / LABELS_FILE, "")
    write_json(output / SETTINGS_FILE, record | {"price": classes.price})
    return classes


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

"""The labels that a pre-training run learns from: those it is given, and those it makes itself."""

import logging
import time
from contextlib import suppress
from pathlib import Path

from fastssl.data.labels import LabelTable
from fastssl.train.config import PretrainConfig
from fastssl.train.data import PretrainDataModule
from fastssl.train.label import DONE_FILE, LabelSettings, label

logger = logging.getLogger(__name__)

#: A failure that has stood so long is this attempt's: the first process takes an earlier one's away when it starts.
_FAILED_FOR_S = 30.0


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
    while not (output / DONE_FILE).is_file():
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

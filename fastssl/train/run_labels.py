"""The labels that a pre-training run learns from: those it is given, and those it makes itself."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from fastssl.data.labels import LabelTable
from fastssl.train.config import PretrainConfig
from fastssl.train.data import PretrainDataModule, Use
from fastssl.train.encode import frame_grid
from fastssl.train.label import DONE_FILE, LabelSettings, label
from fastssl.train.systems import SYSTEMS
from fastssl.train.waiting import by_first_process

logger = logging.getLogger(__name__)


def attach_given(config: PretrainConfig, data: PretrainDataModule) -> dict[Use, LabelTable]:
    """Give the data of a run the labels and segments that the settings name, before anything is written.

    Args:
        config: The settings.
        data: Takes them.

    Returns:
        Those that are given.

    Raises:
        ValueError: There are none in that folder, or of another number of classes than the model has; they do not fit
            too many recordings.
    """
    given: dict[Use, LabelTable] = {}
    if config.data.labels is not None:
        given["labels"] = LabelTable(config.data.labels)
        _check_classes(given["labels"], config)
    if config.data.segments is not None:
        given["segments"] = table = LabelTable(config.data.segments)
        if table.settings.get("price") is None:
            raise ValueError(
                f"data.segments: {table.folder} has no segments; it was made without --segment_ms or --segment_price"
            )
    for use, table in given.items():
        _attach("audio", table, use, config, data)
    return given


def labels_for_run(
    run: Path, config: PretrainConfig, data: PretrainDataModule, given: Mapping[Use, LabelTable], *, first: bool
) -> None:
    """Make the labels that are missing, in RUN/labels, RUN/labels-valid and RUN/segments-valid, and attach them.

    Args:
        run: Its folder.
        config: Its settings.
        data: Takes the labels.
        given: What `attach_given` attached.
        first: Whether this process makes the labels; the others wait for it.

    Raises:
        ValueError: Too many recordings have no labels that fit.
    """
    tables = dict(given)
    if SYSTEMS[config.system].labels and "labels" not in tables:
        settings = LabelSettings(clusters=_clusters(config), seed=config.seed, channel=config.data.channel)
        _label_or_wait(config.audio, run / "labels", settings, kmeans=None, config=config, first=first)
        tables["labels"] = LabelTable(run / "labels")
        _check_classes(tables["labels"], config)
        _attach("audio", tables["labels"], "labels", config, data)
    for use, table in tables.items():
        if use in given and first and table.settings.get("channel", config.data.channel) != config.data.channel:
            channels = [
                "all channels" if one is None else f"channel {one}"
                for one in (table.settings["channel"], config.data.channel)
            ]
            logger.warning("data.%s: %s were made from %s, and the run reads %s", use, table.folder, *channels)
        if isinstance(config.data.valid, str):
            settings, made = LabelSettings(channel=config.data.channel), run / f"{use}-valid"
            _label_or_wait(config.data.valid, made, settings, kmeans=table.folder, config=config, first=first)
            _attach("valid", LabelTable(made), use, config, data)


def _attach(
    source: Literal["audio", "valid"], table: LabelTable, use: Use, config: PretrainConfig, data: PretrainDataModule
) -> None:
    data.attach_labels(source, table, grid=frame_grid(config.model), use=use)


def _label_or_wait(
    audio: str, output: Path, settings: LabelSettings, *, kmeans: Path | None, config: PretrainConfig, first: bool
) -> None:
    def make() -> None:
        label(audio, output, settings, kmeans=kmeans, num_workers=config.data.num_workers)

    by_first_process(make, first=first, done=lambda: (output / DONE_FILE).is_file(), folder=output)


def _clusters(config: PretrainConfig) -> int:
    clusters = getattr(config.model, "num_clusters", None)
    assert isinstance(clusters, int)
    return clusters


def _check_classes(table: LabelTable, config: PretrainConfig) -> None:
    if table.classes != _clusters(config):
        raise ValueError(
            f"data.labels: {table.folder} has {table.classes} classes; add --model.num_clusters {table.classes}"
        )

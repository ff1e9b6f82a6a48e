"""Attach the labels and segments that a pre-training run learns from, given ones or those that the run makes itself."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from fastssl.data.corpus import Problem
from fastssl.data.labels import LabelTable
from fastssl.eval.encode import frame_grid
from fastssl.eval.label.command import label
from fastssl.eval.label.settings import LabelSettings
from fastssl.train.config import PretrainConfig
from fastssl.train.data import PretrainDataModule, Use
from fastssl.train.systems import SYSTEMS

logger = logging.getLogger(__name__)


def attach_given(config: PretrainConfig, data: PretrainDataModule) -> dict[Use, LabelTable]:
    """Attach the labels and segments that the settings name to the data of a run, before anything is written.

    Args:
        config: Settings of the run.
        data: Data module to attach labels and segments to.

    Returns:
        The tables that were attached, by use.

    Raises:
        ValueError: A folder contains no labels or no segments, the labels and the model differ in their number of
            classes, or too many recordings have no matching labels.
    """
    given: dict[Use, LabelTable] = {}
    if config.data.labels is not None:
        given["labels"] = LabelTable(config.data.labels)
        _check_classes(given["labels"], config)
    if config.data.segments is not None:
        given["segments"] = table = LabelTable(config.data.segments)
        if table.settings.get("price") is None:
            raise ValueError(
                f"data.segments: {table.folder} has no segments; make it with `fastssl label --segment_ms`"
            )
    for use, table in given.items():
        try:
            _attach("audio", table, use, config, data)
        except ValueError as error:
            made_by = table.settings["rules"]
            if made_by == config.data.rules:
                raise
            raise ValueError(
                f"{error}\n  the labels were made by version {made_by} of the rules for decoding, but the run uses "
                f"version {config.data.rules}: make them again, or add --data.rules {made_by}"
            ) from None
    return given


class RunLabels:
    """Labels that a run makes if they are not given, in RUN/labels, RUN/labels-valid and RUN/segments-valid.

    Args:
        run: Folder of the run.
        config: Settings of the run.
        data: Data module to attach the labels to.
        given: Tables from `attach_given`.
    """

    def __init__(
        self, run: Path, config: PretrainConfig, data: PretrainDataModule, given: Mapping[Use, LabelTable]
    ) -> None:
        self.run, self.config, self.data, self.given = run, config, data, given
        self._makes_labels = SYSTEMS[config.system].needs.labels and "labels" not in given
        #: By use, the folder whose k-means model labels the held-out recordings.
        self._donors: dict[Use, Path] = {use: table.folder for use, table in given.items()}
        if self._makes_labels:
            self._donors["labels"] = run / "labels"

    def make(self) -> list[Problem]:
        """Label training and held-out recordings whose labels are missing.

        Returns:
            An empty list: `attach` finds the recordings without labels.
        """
        config = self.config
        channel, workers, rules = config.data.channel, config.data.num_workers, config.data.rules
        for use, table in self.given.items():
            if table.settings.get("channel", channel) != channel:
                channels = [
                    "all channels" if one is None else f"channel {one}" for one in (table.settings["channel"], channel)
                ]
                logger.warning("data.%s: %s were made from %s, but the run reads %s", use, table.folder, *channels)
            if table.settings["rules"] != rules:
                logger.warning(
                    "data.%s: %s were made by version %d of the rules for decoding, but the run uses version %d; "
                    "recordings whose duration differs are left out",
                    *(use, table.folder, table.settings["rules"], rules),
                )
        if self._makes_labels:
            settings = LabelSettings(clusters=_clusters(config), seed=config.seed, channel=channel, rules=rules)
            label(config.audio, self.run / "labels", settings, num_workers=workers)
        if isinstance(config.data.valid, str):
            for use, donor in self._donors.items():
                settings, output = LabelSettings(channel=channel, rules=rules), self.run / f"{use}-valid"
                label(config.data.valid, output, settings, kmeans=donor, num_workers=workers)
        return []

    def attach(self, problems: list[Problem]) -> None:
        """Attach the labels that `make` made to the data module.

        Args:
            problems: The problems that `make` returned; ignored.

        Raises:
            ValueError: Too many recordings have no matching labels.
        """
        if self._makes_labels:
            table = LabelTable(self.run / "labels")
            _check_classes(table, self.config)
            _attach("audio", table, "labels", self.config, self.data)
        if isinstance(self.config.data.valid, str):
            for use in self._donors:
                _attach("valid", LabelTable(self.run / f"{use}-valid"), use, self.config, self.data)


def _attach(
    source: Literal["audio", "valid"], table: LabelTable, use: Use, config: PretrainConfig, data: PretrainDataModule
) -> None:
    data.attach_labels(source, table, grid=frame_grid(config.model), use=use)


def _clusters(config: PretrainConfig) -> int:
    clusters = getattr(config.model, "num_clusters", None)
    assert isinstance(clusters, int)
    return clusters


def _check_classes(table: LabelTable, config: PretrainConfig) -> None:
    if table.classes != _clusters(config):
        raise ValueError(
            f"data.labels: {table.folder} has {table.classes} classes, but the model has {_clusters(config)}; "
            f"add --model.num_clusters {table.classes}"
        )

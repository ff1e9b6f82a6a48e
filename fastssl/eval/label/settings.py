"""How to make labels, as typed on the command line or kept beside earlier labels."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastssl.data.labels import SETTINGS_FILE, read_settings
from fastssl.data.rules import check_rules
from fastssl.reading import brief


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


def settings_of(folder: Path, given: LabelSettings) -> LabelSettings:
    """Return the settings of a folder of labels, but the channel of `given` and, if given, its model and rules."""
    values: dict[str, Any] = checked_settings(folder)
    if given.model is not None and values.get("model") is None:
        raise ValueError(f"--model: {folder} was made from MFCC, not from a model; leave --model out")
    model = values.get("model") if given.model is None else given.model
    rules = values["rules"] if given.rules is None else given.rules
    kept = {name: values.get(name) for name in ("layer", "clusters", "fit_frames", "seed")}
    return LabelSettings(**kept, model=model, channel=given.channel, rules=rules, segment_price=values.get("price"))  # type: ignore[arg-type]


def checked_settings(folder: Path) -> dict[str, Any]:
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

"""`fastssl quality`: report the quality of each layer of an encoder as a table, a JSON file and a plot."""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from lhotse.cut import Cut
from rich import get_console
from rich.table import Table

import fastssl
from fastssl.data.corpus import Problem, open_corpus
from fastssl.data.rules import RULES, check_rules
from fastssl.eval.encode import frame_grid, open_encoder_at
from fastssl.eval.quality.measure import MAX_FRAMES, LayerQuality, first_minutes, measure_quality, quality_loader
from fastssl.eval.showing import new_figure, track, write_figure
from fastssl.files import make_folder, write_json
from fastssl.kernels.prepacked_conv.weights import Format
from fastssl.models.model_card import checked_out_commit
from fastssl.models.speech_encoder import SpeechEncoder
from fastssl.packing import Packed

logger = logging.getLogger(__name__)

#: The panels of the plot: fields of `LayerQuality` with their axis labels.
_PANELS = {
    "effective_rank": "effective rank of all frames",
    "rankme": "RankMe",
    "log_inertia_per_frame": "log of k-means inertia per frame",
    "davies_bouldin": "Davies-Bouldin",
}


def quality(
    model: str | Path,
    audio: str | Path,
    output: str | Path = "quality.json",
    *,
    minutes: float = 60.0,
    layers: Sequence[int] | None = None,
    max_frames: int = MAX_FRAMES,
    seed: int = 0,
    channel: int | None = None,
    rate: float | None = None,
    frame_period_ms: float | None = None,
    rules: int = RULES,
    inference: Format | None = None,
    device: str = "auto",
) -> list[LayerQuality]:
    """Measure how good each layer of an encoder is, on audio without labels.

    The measures are the effective rank of all frames, RankMe, the inertia of k-means and the Davies-Bouldin index.
    Prints a table, writes it as JSON, and draws a plot of the same name beside it. Compare results layer by layer, and
    only if they were measured on the same audio with the same settings.

    Args:
        model: Encoder to measure: a run of `fastssl pretrain`, a Transformers folder, a model name on the Hub, or a
            fairseq checkpoint.
        audio: Folder of recordings (WAV, FLAC, Ogg, MP3, ...; 4 kHz or more, any number of channels; subfolders too),
            Lhotse manifest (.jsonl.gz), or Lhotse shar directory.
        output: JSON file to write, NAME.json; an existing file is replaced.
        minutes: Minutes of audio to measure on. The same recordings are chosen every time, whatever their order.
        layers: Layers to measure, such as [0,6,12]; by default all.
        max_frames: Number of frames for k-means, drawn at random from all.
        seed: Seed of the draw and of k-means.
        channel: Channel to read; by default all channels are averaged.
        rate: Rate of a model with a sequence compressor: 0 keeps every frame, 1 gives the learned segments; by default
            the model's own, which is 1 unless it was trained at a single rate.
        frame_period_ms: Mean frame period to compress to, in milliseconds, instead of a rate.
        rules: Version of the rules by which recordings are found and decoded; 1 repeats what was measured before
            versions were recorded.
        inference: Format of the encoder's weights on the CPU: fp32, bf16 or int8. Each is faster than the one before
            and less exact (docs/inference.md). By default the weights stay as they are.
        device: Device to encode on: cpu, cuda, cuda:1, ...; auto uses a GPU if there is one.

    Raises:
        ValueError: MODEL, AUDIO, the layers or the output is invalid, there is too little audio, or frames are NaN.
        WriteError: The system refused to write.
    """
    output = Path(output)
    if output.suffix != ".json" or output.is_dir():
        raise ValueError(f"--output: {output} must be a file whose name ends with .json")
    check_rules(rules, "--rules")
    encoder = open_encoder_at(model, device=device, rate=rate, frame_period_ms=frame_period_ms, inference=inference)
    shortest_s = frame_grid(encoder.config).shortest_s
    corpus = open_corpus(audio, min_duration_s=shortest_s, max_bad_fraction=1.0, rules=rules)
    cuts = first_minutes(corpus.cuts, minutes)
    problems = list(corpus.problems)
    waveforms = _Waveforms(cuts, problems, encoder, channel=channel)
    results = measure_quality(encoder, waveforms.read(), layers=layers, max_frames=max_frames, seed=seed)
    for problem in problems:
        logger.warning("left out: %s", problem)
    period_ms = encoder.config.frame_period_ms * waveforms.frames / results[0].frames
    if encoder.compressor is not None:
        asked = "" if frame_period_ms is None else f" ({frame_period_ms:g} ms requested)"
        logger.info("mean frame period: %.1f ms%s", period_ms, asked)
    report = {
        "model": str(model),
        "audio": str(audio),
        "audio_hours": waveforms.seconds / 3600,
        "mean_frame_period_ms": period_ms,
        "settings": {
            "minutes": minutes,
            "max_frames": max_frames,
            "seed": seed,
            "channel": channel,
            "rate": rate,
            "frame_period_ms": frame_period_ms,
            "rules": rules,
            "inference": inference,
        },
        "versions": _versions(),
        "left_out": [{"name": problem.name, "reason": problem.reason} for problem in problems],
        "layers": [asdict(result) for result in results],
    }
    get_console().print(_table(results))  # before writing, which may fail
    make_folder(output.parent)
    write_json(output, _without_nan(report))
    draw_layers(results, output.with_suffix(".png"))
    _remark(results, waveforms.seconds, minutes, width=encoder.config.hidden_size)
    logger.info("%s, %s", output, output.with_suffix(".png").name)
    return results


class _Waveforms:
    """Batches of audio. Reading them counts seconds and front-end frames, and collects unreadable recordings."""

    def __init__(
        self, cuts: Sequence[Cut], problems: list[Problem], encoder: SpeechEncoder, *, channel: int | None
    ) -> None:
        self.seconds, self.frames = 0.0, 0
        self._grid = frame_grid(encoder.config)
        self.problems = problems
        self._batches = quality_loader(cuts, normalize=encoder.normalizes, channel=channel)

    def read(self) -> Iterator[Packed]:
        for batch in track(self._batches, "audio"):
            self.problems += batch.problems
            self.seconds += batch.duration_s
            self.frames += sum(map(self._grid.count, batch.waveforms.layout.lengths))
            if batch.names:
                yield batch.waveforms
        if not self.seconds:
            raise ValueError(f"AUDIO: none of its recordings can be used; the last problem: {self.problems[-1]}")
        logger.info("%.1f minutes encoded; next, k-means of each layer", self.seconds / 60)


def draw_layers(results: Sequence[LayerQuality], path: Path) -> None:
    """Plot effective rank, RankMe, log inertia and Davies-Bouldin index over the layers.

    Args:
        results: One entry per measured layer; values that are not finite leave gaps.
        path: PNG file to write; an existing file is replaced.
    """
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(7)
    layers = [result.layer for result in results]
    for axes, (name, label) in zip(figure.subplots(2, 2).flat, _PANELS.items(), strict=True):
        values = [getattr(result, name) for result in results]
        axes.plot(layers, [value if math.isfinite(value) else math.nan for value in values], "o-")
        axes.set_xlabel("layer (0: input of the first layer)")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    write_figure(figure, path)


def _table(results: Sequence[LayerQuality]) -> Table:
    first = results[0]
    table = Table(
        "layer",
        "effective rank",
        "RankMe",
        "inertia per frame",
        "its log",
        "Davies-Bouldin",
        caption=f"{first.frames} frames of {first.utterances} utterances; RankMe of {first.rankme_rows} "
        f"{first.rankme_of}; {first.clusters} clusters of {first.clustered_frames} frames",
    )
    for column in table.columns:
        column.justify = "right"
    for result in results:
        table.add_row(
            str(result.layer),
            f"{result.effective_rank:.1f}",
            f"{result.rankme:.1f}",
            f"{result.inertia_per_frame:.4g}",
            f"{result.log_inertia_per_frame:.3f}",
            f"{result.davies_bouldin:.3f}",
        )
    return table


def _remark(results: Sequence[LayerQuality], seconds: float, minutes: float, *, width: int) -> None:
    """Warn if these numbers cannot be compared with others: too little audio, or too few rows for RankMe."""
    first = results[0]
    if seconds < 60 * minutes - 1:
        logger.warning(
            "only %.1f of the %g minutes requested are available: compare only with results on the same audio",
            seconds / 60,
            minutes,
        )
    if first.rankme_rows < 2 * width:
        logger.warning(
            "RankMe is based on only %d %s for %d dimensions and is unreliable; measure on several times as much audio",
            first.rankme_rows,
            first.rankme_of,
            width,
        )


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"commit": checked_out_commit()}
    versions["fastssl"] = fastssl.__version__
    for name in ("torch", "scikit-learn"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _without_nan(value: Any) -> Any:
    """Replace NaN and infinity by None (null), because JSON has neither."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

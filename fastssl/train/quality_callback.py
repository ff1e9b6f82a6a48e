"""Measure the encoder's quality on fixed held-out audio during pre-training, without affecting training."""

import logging
import math
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from fastssl.data.batches import AudioBatch
from fastssl.eval.quality.measure import MAX_FRAMES, LayerQuality, measure_quality
from fastssl.eval.showing import drawable
from fastssl.packing import Packed

logger = logging.getLogger(__name__)

#: For each measure, by its name in columns of metrics.csv: its field in `LayerQuality`, and its axis label.
_MEASURES = {
    "effective_rank": ("effective_rank", "effective rank of all frames"),
    "rankme": ("rankme", "RankMe"),
    "inertia": ("inertia_per_frame", "k-means inertia per frame"),
    "davies_bouldin": ("davies_bouldin", "Davies-Bouldin"),
}
_LAYER = re.compile("0|[1-9][0-9]{0,2}")
#: Number of axes that `draw_quality` draws on.
QUALITY_PANELS = len(_MEASURES)


def quality_columns(num_layers: int) -> list[str]:
    """List the columns of metrics.csv for the quality of an encoder, such as `quality_rankme_0`.

    Args:
        num_layers: Number of layers of the encoder. Each measure has num_layers + 1 columns: 0 for the input of the
            first layer, and one for the output of each layer.
    """
    return [f"quality_{name}_{layer}" for name in _MEASURES for layer in range(num_layers + 1)]


class QualityMonitor(Callback):
    """Lightning callback that measures the encoder at regular intervals, on the first process, while the others wait.

    It leaves weights, gradients, training modes and random generators as they were. If a measurement fails, it logs a
    warning with the reason, and training continues.

    Args:
        encoder: Encoder to measure; the module itself, not a wrapper for several processes.
        batches: Function that returns the held-out batches, the same ones on every call (`quality_loader`).
        write: Function that receives the trainer and a row of `quality_columns`, without NaN and infinite values.
        every: Updates between two measurements; the last update is always followed by one. None or 0 measures nothing.
        layers: Layers to measure; 0 is the input of the first layer. None measures all.
        max_frames: Largest number of frames for k-means.
        seed: Seed of the choice of frames and of k-means.
        paused: Function that returns a context manager during which the throughput clock is stopped.
    """

    def __init__(
        self,
        encoder: nn.Module,
        batches: Callable[[], Iterable[AudioBatch]],
        write: Callable[[Trainer, dict[str, float]], None],
        *,
        every: int | None,
        layers: Sequence[int] | None = None,
        max_frames: int = MAX_FRAMES,
        seed: int = 0,
        paused: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.encoder = encoder
        self.batches = batches
        self.write = write
        self.every = every
        self.layers = layers
        self.max_frames = max_frames
        self.seed = seed
        self.paused = paused
        self._begin = 0.0
        self._spent_s = 0.0
        self._measured = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of the training time, which the time spent on measurements is compared with."""
        self._begin, self._spent_s, self._measured = time.perf_counter(), 0.0, 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: AudioBatch, batch_idx: int
    ) -> None:
        """Measure the encoder if an update has ended and a measurement is due."""
        if not self.every or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if trainer.global_step % self.every and trainer.global_step != trainer.max_steps:
            return
        with self.paused():
            begin = time.perf_counter()
            if trainer.is_global_zero:
                self._measure(trainer)
            trainer.strategy.barrier("quality")
            self._spent_s += time.perf_counter() - begin

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log how much time the measurements took."""
        if self._measured and trainer.is_global_zero:
            total_s = time.perf_counter() - self._begin
            logger.info(
                "quality: %.1f %% of the training time (%.1f s of %.0f s, measured %d times)",
                100 * self._spent_s / total_s,
                self._spent_s,
                total_s,
                self._measured,
            )

    def _measure(self, trainer: Trainer) -> None:
        self._measured += 1
        try:
            with _random_numbers_kept(next(self.encoder.parameters()).device):
                results = measure_quality(
                    self.encoder, self._waveforms(), layers=self.layers, max_frames=self.max_frames, seed=self.seed
                )
        except Exception as error:
            # Catch any error, because hours of training are worth more than this row.
            logger.warning("quality was not measured after %d updates: %s", trainer.global_step, error)
            return
        self.write(trainer, _row(results))

    def _waveforms(self) -> Iterator[Packed]:
        for batch in self.batches():
            if batch.names:
                yield batch.waveforms


def draw_quality(axes: Iterator[Any], rows: Iterable[dict[str, float]]) -> bool:
    """Draw the quality of each layer over the course of a run, one line per layer, from pale (layer 0) to dark (last).

    Args:
        axes: Matplotlib axes; `QUALITY_PANELS` of them are used, or none if no row has quality columns.
        rows: Rows of metrics.csv. The horizontal axis is `audio_hours` if all rows with quality columns have it, else
            `update`.

    Returns:
        Whether any row had quality columns to draw.
    """
    from matplotlib import colormaps

    measured = [row for row in rows if any(name.startswith("quality_") for name in row)]
    if not measured:
        return False
    over, label = "update", "update"
    if all("audio_hours" in row for row in measured):
        over, label = "audio_hours", "hours of audio"
    for name, (_, title) in _MEASURES.items():
        panel, prefix = next(axes), f"quality_{name}_"
        found = {key.removeprefix(prefix) for row in measured for key in row if key.startswith(prefix)}
        layers = sorted(int(layer) for layer in found if _LAYER.fullmatch(layer))
        for layer in layers:
            points = drawable((row[over], row[f"{prefix}{layer}"]) for row in measured if f"{prefix}{layer}" in row)
            if not points:
                continue
            colour = colormaps["viridis_r"](0.1 + 0.9 * layer / max(1, layers[-1]))
            panel.plot(*zip(*points, strict=True), "o-", markersize=3, color=colour, label=f"layer {layer}")
        panel.set_xlabel(label)
        panel.set_ylabel(title)
        panel.grid(alpha=0.3)
        if name == "inertia":
            panel.set_yscale("log")  # inertia grows with the square of the norm, which differs between layers
        if name == "effective_rank":
            panel.legend(fontsize="x-small", ncols=-(-len(layers) // 7))  # one legend for all panels
    return True


def _row(results: Sequence[LayerQuality]) -> dict[str, float]:
    values = {
        f"quality_{name}_{result.layer}": float(getattr(result, field))
        for name, (field, _) in _MEASURES.items()
        for result in results
    }
    return {name: value for name, value in values.items() if math.isfinite(value)}


@contextmanager
def _random_numbers_kept(device: torch.device) -> Iterator[None]:
    """Restore the state of Python's, NumPy's and PyTorch's global random generators on exit."""
    python, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global generator is meant
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)  # noqa: NPY002

"""Quality of the encoder while it is pre-trained: measured on fixed held-out audio, without a trace in the training."""

import logging
import math
import random
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
from fastssl.packing import Packed

logger = logging.getLogger(__name__)

#: Measure in the name of a column: field of a `LayerQuality`, and what it is on an axis.
_MEASURES = {
    "effective_rank": ("effective_rank", "effective rank of all frames"),
    "rankme": ("rankme", "RankMe"),
    "inertia": ("inertia_per_frame", "k-means inertia per frame"),
    "davies_bouldin": ("davies_bouldin", "Davies-Bouldin"),
}
#: Axes that `draw_quality` takes.
QUALITY_PANELS = len(_MEASURES)


def quality_columns(num_layers: int) -> list[str]:
    """Columns of metrics.csv for an encoder of so many layers: `quality_rankme_0` to `quality_rankme_<layers>`, ..."""
    return [f"quality_{name}_{layer}" for name in _MEASURES for layer in range(num_layers + 1)]


class QualityMonitor(Callback):
    """Measures the encoder every so many updates, on the first process, while the others wait.

    Weights, gradients, modes of the modules and random numbers of the training are as if it were not there. A
    measurement that fails is a warning with the reason, and training goes on.

    Args:
        encoder: Whose frames are measured; a plain module, not wrapped for several processes.
        batches: Gives the held-out audio, the same every time it is called (`quality_loader`).
        write: Takes the trainer and a row of `quality_columns`; a value that is not finite is left out.
        every: Updates between two measurements; there is one after the last update too. None or 0 measures nothing.
        layers: Which; None measures all.
        max_frames: Frames for k-means at most.
        seed: Of the frames drawn, and of k-means.
        paused: A context in which the clock of the throughput stands still.
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
        """Start the clock that the cost is a share of."""
        self._begin, self._spent_s, self._measured = time.perf_counter(), 0.0, 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: AudioBatch, batch_idx: int
    ) -> None:
        """Measure, where an update has ended that it is time after."""
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
        """Say what it cost."""
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
            # Whatever it is, hours of training are worth more than this row.
            logger.warning("quality was not measured after %d updates: %s", trainer.global_step, error)
            return
        self.write(trainer, _row(results))

    def _waveforms(self) -> Iterator[Packed]:
        for batch in self.batches():
            if batch.names:
                yield batch.waveforms


def draw_quality(axes: Iterator[Any], rows: Iterable[dict[str, float]]) -> bool:
    """Draw how each layer's quality went, a line per layer, from pale (layer 0) to dark (the last).

    Args:
        axes: Matplotlib's; `QUALITY_PANELS` of them are taken, and none where there is nothing to draw.
        rows: Of metrics.csv; they are drawn over `audio_hours` where all that have quality have that too, else over
            `update`.

    Returns:
        Whether there was something to draw.
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
        layers = sorted({int(key.removeprefix(prefix)) for row in measured for key in row if key.startswith(prefix)})
        for layer in layers:
            points = [(row[over], row[f"{prefix}{layer}"]) for row in measured if f"{prefix}{layer}" in row]
            colour = colormaps["viridis_r"](0.1 + 0.9 * layer / max(1, layers[-1]))
            panel.plot(*zip(*points, strict=True), "o-", markersize=3, color=colour, label=f"layer {layer}")
        panel.set_xlabel(label)
        panel.set_ylabel(title)
        panel.grid(alpha=0.3)
        if name == "inertia":
            panel.set_yscale("log")  # layers differ by the square of their norms
        if name == "effective_rank":
            panel.legend(fontsize="x-small", ncols=-(-len(layers) // 7))  # for all panels
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
    """Give every generator that training may draw from its state back."""
    python, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global one is meant
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)  # noqa: NPY002

"""The training step of wav2vec 2.0 pre-training: losses summed, gradients scaled once by the frames of an update."""

import hashlib
import math
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from fastssl.data.batches import AudioBatch
from fastssl.models.wav2vec2 import PretrainingOutput, Wav2Vec2ForPreTraining
from fastssl.nn.random import utterance_keys
from fastssl.train.config import OptimizerConfig, TemperatureConfig

#: Crops, masks and negatives of held-out recordings are those of this update, every time.
VALIDATION_UPDATE = -1
#: Updates in a row that fp16 may skip: its scale is halved each time, and by then it is no longer to blame.
_MAX_SKIPPED_UPDATES = 20
#: What is summed over the frames, batches and processes of an update; the perplexities of each group follow.
_SUMS = (
    "loss",
    "contrastive_loss",
    "diversity_loss",
    "features_penalty",
    "correct",
    "chance",
    "masked_frames",
    "audio_s",
    "utterances",
    "drawn",
    "unusable",
)


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why, in words for the user."""


class PretrainModule(LightningModule):
    """wav2vec 2.0 pre-training (arXiv:2006.11477) of packed batches.

    Every random number is a function of the seed, the update and the utterance, or of the seed and the number of the
    batch, so nothing random has to be saved: crops, masks, negatives and Gumbel noise do not depend on how
    utterances are spread over batches and processes, and a resumed run repeats an unbroken one.

    Args:
        model: What is trained.
        optimizer: Adam and its schedule.
        temperature: Schedule of the Gumbel softmax.
        max_steps: The update at which the learning rate is 0.
        seed: Of masks, negatives, noise, dropout and layer drop.
    """

    def __init__(
        self,
        model: Wav2Vec2ForPreTraining,
        *,
        optimizer: OptimizerConfig,
        temperature: TemperatureConfig,
        max_steps: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.model = model
        self.optimizer_config = optimizer
        self.temperature = temperature
        self.max_steps = max_steps
        self.seed = seed
        #: Of the last finished update, over all processes: the sums of `_SUMS`, perplexities, norm, rate, temperature.
        self.last_update: dict[str, float] = {}
        #: The same of the last scoring of the held-out recordings.
        self.last_validation: dict[str, float] = {}
        self._pending: list[tuple[Tensor, tuple[str, ...]]] = []
        self._reduced = torch.empty(0)
        self._skipped = 0
        self._validation: list[Tensor] = []

    def configure_optimizers(self) -> Any:
        """AdamW over all parameters, as fairseq's adam does it, and the schedule by update."""
        config = self.optimizer_config
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: config.lr_factor(update, self.max_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: AudioBatch, batch_idx: int) -> Tensor:
        """The summed loss () of one batch of an update."""
        accumulation = self.trainer.accumulate_grad_batches
        position = (batch_idx % accumulation) * self.trainer.world_size + self.trainer.global_rank
        # The global generator serves dropout alone.
        torch.manual_seed(_seed_of("dropout", self.seed, batch.update, position))
        layer_drop = None
        if self.model.config.layerdrop > 0:
            layer_drop = torch.Generator().manual_seed(_seed_of("layer drop", self.seed, batch.update))
        output = self.model(
            batch.waveforms,
            keys=utterance_keys(self.seed, batch.update, batch.ids),
            gumbel_temperature=self.temperature.at(batch.update),
            layer_drop=layer_drop,
        )
        self._pending.append((_sums(output, batch), batch.names))
        loss: Tensor = output.loss
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Turn the gradient of the summed loss into that of the mean over the masked frames of the update.

        Lightning has divided by the accumulation steps and DDP by the processes. It runs after fp16's unscaling
        and before clipping.
        """
        self._reduced = self._reduce(torch.stack([sums for sums, _ in self._pending]).sum(0))
        masked_frames = self._reduced[_SUMS.index("masked_frames")].clamp(min=1)
        scale = self.trainer.accumulate_grad_batches * self.trainer.world_size / masked_frames
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        torch._foreach_mul_(gradients, scale.float())

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip, then look at loss and norm, together, so that the host waits for the device once for both.

        Raises:
            TrainingError: The loss or a gradient is NaN or infinite, with fp16 a gradient of many updates in a row; the
                weights have not been touched.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), self.optimizer_config.clip_norm or math.inf)
        values = torch.cat((self._reduced, norm.detach().to(self._reduced)[None])).tolist()
        self.last_update = _averages(values[:-1])
        self.last_update["grad_norm"] = values[-1]
        self.last_update["learning_rate"] = optimizer.param_groups[0]["lr"]
        self.last_update["temperature"] = self.temperature.at(self.global_step)
        # fp16's scaler skips a step whose gradients overflowed, and lowers the scale.
        plugin = self.trainer.precision_plugin
        scaled = isinstance(plugin, MixedPrecision) and plugin.scaler is not None
        self._skipped = 0 if math.isfinite(values[-1]) else self._skipped + 1
        if not math.isfinite(values[0]) or self._skipped >= (_MAX_SKIPPED_UPDATES if scaled else 1):
            raise TrainingError(self._describe_non_finite(values[0], values[-1]))
        self._pending.clear()

    def validation_step(self, batch: AudioBatch, batch_idx: int) -> None:
        """Score a batch of held-out recordings."""
        output = self.model(
            batch.waveforms,
            keys=utterance_keys(self.seed, VALIDATION_UPDATE, batch.ids),
            gumbel_temperature=self.temperature.at(self.global_step),
        )
        self._validation.append(_sums(output, batch))

    def on_validation_epoch_end(self) -> None:
        """Average the scores over all batches and processes."""
        sums = self._reduce(torch.stack(self._validation).sum(0))
        self.last_validation = _averages(sums.tolist())
        self._validation.clear()

    def _reduce(self, sums: Tensor) -> Tensor:
        """The sum over the processes."""
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(sums)
        return sums

    def _describe_non_finite(self, loss: float, norm: float) -> str:
        """Name the recordings, wherever they are: every process stops with the same words."""
        guilty = [name for sums, names in self._pending if not math.isfinite(sums[0].item()) for name in names]
        if math.isfinite(loss):
            guilty = [name for _, names in self._pending for name in names]
        if self.trainer.world_size > 1:
            everywhere: list[list[str]] = [[] for _ in range(self.trainer.world_size)]
            torch.distributed.all_gather_object(everywhere, guilty)
            guilty = [name for names in everywhere for name in names]
        what = f"the gradient norm is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
        often = f", the last of {self._skipped} in a row" if self._skipped > 1 else ""
        return (
            f"{what} in update {self.global_step + 1}{often}; the weights are those before it, and the last checkpoint "
            f"too. Recordings of the batch: {', '.join(guilty)}"
        )


def _seed_of(purpose: str, *numbers: int) -> int:
    """A seed for torch's generators that differs wherever purpose or numbers differ."""
    text = f"{purpose} {numbers}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def _sums(output: PretrainingOutput, batch: AudioBatch) -> Tensor:
    """What a batch adds to the sums of its update: float64, in the order of `_SUMS`, then the perplexities."""
    device = output.loss.device
    frames = output.masked_frames
    on_device = (output.loss, output.contrastive_loss, output.diversity_loss * frames, output.features_penalty)
    counted = (output.correct, output.chance)
    known = (frames, batch.duration_s, len(batch.names), len(batch.names) + len(batch.problems), len(batch.problems))
    return torch.cat(
        (
            torch.stack([value.detach().double() for value in (*on_device, *counted)]),
            torch.tensor(known, dtype=torch.float64, device=device),
            output.code_perplexity.detach().double() * frames,
            output.prob_perplexity.detach().double() * frames,
        )
    )


def _averages(values: list[float]) -> dict[str, float]:
    """Sums of an update by name; those over masked frames as averages.

    Perplexities are averages over batches by masked frames: no sum over batches gives the perplexity of their union.
    """
    named = dict(zip(_SUMS, values, strict=False))
    frames = max(1.0, named["masked_frames"])
    averages = {name: named[name] / frames for name in _SUMS[: _SUMS.index("masked_frames")]}
    averages["accuracy"] = averages.pop("correct")
    counts = {name: named[name] for name in _SUMS[_SUMS.index("masked_frames") :]}
    perplexities = values[len(_SUMS) :]
    groups = len(perplexities) // 2
    for group in range(groups):
        averages[f"code_perplexity_{group}"] = perplexities[group] / frames
        averages[f"prob_perplexity_{group}"] = perplexities[groups + group] / frames
    return averages | counts

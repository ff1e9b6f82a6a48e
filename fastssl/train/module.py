"""The training step of every system: losses summed, gradients scaled once by the masked frames of an update."""

import hashlib
import math
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from fastssl.data.batches import AudioBatch
from fastssl.data.noise import NoiseProblem
from fastssl.models.pretraining import PretrainingModel, StepContext, StepOutput, perplexity
from fastssl.nn.random import utterance_keys
from fastssl.train.config import OptimizerConfig
from fastssl.train.teacher import Teacher

#: Crops, masks and negatives of held-out recordings are those of this update, every time.
VALIDATION_UPDATE = -1
#: Updates in a row that fp16 may skip: its scale is halved each time, and by then it is no longer to blame.
_MAX_SKIPPED_UPDATES = 20
#: What every system counts over the batches and processes of an update; its loss, scores and code counts follow.
_COUNTS = ("masked_frames", "audio_s", "utterances", "drawn", "unusable")


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why, in words for the user."""


class PretrainModule(LightningModule):
    """Pre-training of packed batches.

    Every random number is a function of the seed, the update and the utterance, or of the seed and the number of the
    batch, so nothing random has to be saved: crops, masks, negatives and Gumbel noise do not depend on how
    utterances are spread over batches and processes, and a resumed run repeats an unbroken one.

    Args:
        model: What is trained.
        optimizer: Adam and its schedule.
        max_steps: The update at which the learning rate is 0.
        seed: Of masks, negatives, noise, dropout and layer drop.
        teacher: Of a student.
    """

    def __init__(
        self,
        model: PretrainingModel,
        *,
        optimizer: OptimizerConfig,
        max_steps: int,
        seed: int,
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.teacher = teacher
        self.optimizer_config = optimizer
        self.max_steps = max_steps
        self.seed = seed
        #: Of the last finished update, over all processes: counts, averages of loss and scores, norm, learning rate.
        self.last_update: dict[str, float] = {}
        #: (V,) how often each code was the target in it; empty where the system reports perplexities itself.
        self.last_code_counts = torch.empty(0, dtype=torch.float64)
        #: Averages of the last scoring of the held-out recordings.
        self.last_validation: dict[str, float] = {}
        self._pending: list[tuple[Tensor, tuple[str, ...]]] = []
        self._reduced = torch.empty(0)
        self._skipped = 0
        self._validation: list[Tensor] = []
        self._names = model.score_names

    def configure_optimizers(self) -> Any:
        """AdamW over all parameters, as fairseq's adam does it, and the schedule by update."""
        config = self.optimizer_config
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: config.lr_factor(update, self.max_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say which teacher a student has learned from."""
        if self.teacher is not None:
            checkpoint["teacher"] = self.teacher.digest

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with that teacher alone, wherever it lies now.

        Raises:
            ValueError: It has other weights. Checkpoints of earlier versions do not tell.
        """
        if self.teacher is not None and checkpoint.get("teacher", self.teacher.digest) != self.teacher.digest:
            raise ValueError("--resume: --teacher no longer has the weights that the run has learned from; try --init")

    def training_step(self, batch: AudioBatch, batch_idx: int) -> Tensor:
        """The summed loss () of one batch of an update."""
        accumulation = self.trainer.accumulate_grad_batches
        position = (batch_idx % accumulation) * self.trainer.world_size + self.trainer.global_rank
        # The global generator serves dropout alone.
        torch.manual_seed(_seed_of("dropout", self.seed, batch.update, position))
        layer_drop = None
        if self.model.config.layerdrop > 0:
            layer_drop = torch.Generator().manual_seed(_seed_of("layer drop", self.seed, batch.update))
        keys = utterance_keys(self.seed, batch.update, batch.ids)
        output = self.model.step(batch, StepContext(keys, batch.update, layer_drop, self.teacher))
        self._pending.append((self._sums(output, batch), batch.names))
        loss: Tensor = output.loss
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Turn the gradient of the summed loss into that of the mean over the masked frames of the update.

        Lightning has divided by the accumulation steps and DDP by the processes. It runs after fp16's unscaling
        and before clipping.
        """
        self._reduced = self._reduce(torch.stack([sums for sums, _ in self._pending]).sum(0))
        masked_frames = self._reduced[_COUNTS.index("masked_frames")].clamp(min=1)
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
        values = torch.cat((self._reduced, norm.detach().to(self._reduced)[None])).cpu()
        self.last_update, self.last_code_counts = self._averages(values[:-1])
        norm_value = values[-1].item()
        self.last_update["grad_norm"] = norm_value
        self.last_update["learning_rate"] = optimizer.param_groups[0]["lr"]
        self.last_update |= self.model.schedules(self.global_step)
        # fp16's scaler skips a step whose gradients overflowed, and lowers the scale.
        plugin = self.trainer.precision_plugin
        scaled = isinstance(plugin, MixedPrecision) and plugin.scaler is not None
        self._skipped = 0 if math.isfinite(norm_value) else self._skipped + 1
        loss = self.last_update["loss"]
        if not math.isfinite(loss) or self._skipped >= (_MAX_SKIPPED_UPDATES if scaled else 1):
            raise TrainingError(self._describe_non_finite(loss, norm_value))
        self._pending.clear()

    def validation_step(self, batch: AudioBatch, batch_idx: int) -> None:
        """Score a batch of held-out recordings."""
        # Masks are those of one update, every time; schedules are at the update that the run has reached.
        keys = utterance_keys(self.seed, VALIDATION_UPDATE, batch.ids)
        output = self.model.step(batch, StepContext(keys, self.global_step, teacher=self.teacher))
        self._validation.append(self._sums(output, batch))

    def on_validation_epoch_end(self) -> None:
        """Average the scores over all batches and processes."""
        sums = self._reduce(torch.stack(self._validation).sum(0)).cpu()
        self.last_validation, counts = self._averages(sums)
        self.last_validation |= code_usage(counts)
        self._validation.clear()

    def _sums(self, output: StepOutput, batch: AudioBatch) -> Tensor:
        """What a batch adds to the sums of its update, float64: counts, loss, scores, how often each code occurs."""
        utterances, problems = len(batch.names), len(batch.problems)
        drawn = utterances + sum(not isinstance(problem, NoiseProblem) for problem in batch.problems)
        counts = (output.masked_frames, batch.duration_s, utterances, drawn, problems)
        scores = output.scores()
        summed = torch.stack([output.loss.detach().double(), *(scores[name].detach().double() for name in self._names)])
        codes = summed.new_empty(0) if output.code_counts is None else output.code_counts.to(summed)
        return torch.cat((summed.new_tensor(counts), summed, codes))

    def _averages(self, sums: Tensor) -> tuple[dict[str, float], Tensor]:
        """Counts, and averages over masked frames of loss and scores, by name; and the counts of the codes."""
        first, last = len(_COUNTS), len(_COUNTS) + 1 + len(self._names)
        counts = dict(zip(_COUNTS, sums[:first].tolist(), strict=True))
        averages = (sums[first:last] / max(1.0, counts["masked_frames"])).tolist()
        return dict(zip(("loss", *self._names), averages, strict=True)) | counts, sums[last:]

    def _reduce(self, sums: Tensor) -> Tensor:
        """The sum over the processes."""
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(sums)
        return sums

    def _describe_non_finite(self, loss: float, norm: float) -> str:
        """Name the recordings, wherever they are: every process stops with the same words."""
        at = len(_COUNTS)  # of the loss
        guilty = [name for sums, names in self._pending if not math.isfinite(sums[at].item()) for name in names]
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


def code_usage(counts: Tensor) -> dict[str, float]:
    """Perplexity of the distribution of the codes, and the share of them that occurs; nothing where there are none.

    Args:
        counts: (V,) float64, how often each occurs.
    """
    if len(counts) == 0:
        return {}
    shares = counts / counts.sum().clamp(min=1)
    return {"code_perplexity": perplexity(shares).item(), "code_utilisation": (counts > 0).double().mean().item()}

"""The training step of all systems: sum losses, then divide the gradient once by the update's masked frames."""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from fastssl.data.batches import AudioBatch
from fastssl.data.noise import NoiseProblem
from fastssl.kernels.philox import seeds_together
from fastssl.kernels.randomness import RANDOMNESS, resolve_randomness, using_randomness
from fastssl.models.pretraining import PretrainingModel, StepContext, StepOutput, perplexity
from fastssl.names import encoded, shown
from fastssl.nn.linear import casts_together
from fastssl.nn.random import utterance_keys
from fastssl.packing import send
from fastssl.train.checkpoint_content import check_content
from fastssl.train.config import OptimizerConfig
from fastssl.train.results import Unread, UpdateResult
from fastssl.train.stopping import REQUESTS, Requests
from fastssl.train.teacher import Teacher

#: Update number that determines the crops, masks and negatives of held-out recordings, so that they never change.
VALIDATION_UPDATE = -1
#: Number of updates in a row that fp16 may skip. Each one halves the loss scale, so after this many the scale is no
#: longer the cause.
_MAX_SKIPPED_UPDATES = 20
#: First entries of the sums over an update's batches and processes; loss, scores and code counts follow.
_COUNTS = ("masked_frames", "audio_s", "utterances", "drawn", "unusable", *REQUESTS)
_COUNTS_END = len(_COUNTS)


class TrainingError(RuntimeError):
    """Raised if training cannot continue; the message tells the user why."""


class PretrainModule(LightningModule):
    """Lightning module that pre-trains any system on packed batches.

    Each random number depends only on the seed, the update, and either the utterance or the batch number. So no random
    generator's state has to be saved, and a resumed run gives the same result as an uninterrupted one. Crops, masks,
    negatives and Gumbel noise depend on the utterance, whichever batch and process it is in.

    Args:
        model: The system to train.
        optimizer: Settings of Adam and of the learning rate's schedule.
        max_steps: Number of updates after which the learning rate is 0.
        seed: Seed of masks, negatives, noise, dropout and layer drop.
        randomness: Version of the random draws of dropout (`fastssl.kernels.randomness`), in force during forward and
            backward passes. A run must keep it.
        teacher: The teacher, if the system needs one.
        read_every: The host reads the results of an update at once if its number is a multiple of one of these, because
            a report, a checkpoint or a validation follows. On a GPU, it reads the others one update later, so that it
            never waits for the device. Meanwhile the device skips an update whose loss or gradient is not finite.

    Raises:
        ValueError: `randomness` is unknown.
    """

    def __init__(
        self,
        model: PretrainingModel,
        *,
        optimizer: OptimizerConfig,
        max_steps: int,
        seed: int,
        randomness: int = RANDOMNESS,
        teacher: Teacher | None = None,
        read_every: Sequence[int] = (1,),
    ) -> None:
        super().__init__()
        self.model = model
        self.teacher = teacher
        self.optimizer_config = optimizer
        self.max_steps = max_steps
        self.seed = seed
        self.randomness = resolve_randomness(randomness)
        #: What this process asks all processes to do after the current update.
        self.requests = Requests()
        self.read_every = tuple(read_every)
        #: Values of the last update that the host has read, over all processes.
        self.last_update: dict[str, float] = {}
        #: Mean loss and scores of the held-out recordings from when they were last scored.
        self.last_validation: dict[str, float] = {}
        self._pending: list[tuple[Tensor, AudioBatch]] = []
        self._reduced = torch.empty(0, device="cpu")
        self._unread: Unread | None = None
        self._results: list[UpdateResult] = []
        self._skipped = 0
        self._validation: list[Tensor] = []
        self._names = model.score_names

    def configure_optimizers(self) -> Any:
        """Make AdamW for all parameters (equivalent to fairseq's `adam`), and a schedule that steps once per update."""
        config = self.optimizer_config
        optimizer = torch.optim.AdamW(
            self.parameters(),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=self._reads_late() or None,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: config.lr_factor(update, self.max_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Set the learning rate from the schedule, because the end of the decay may have moved.

        Lightning restores the rate from the checkpoint, which is 0 at the end of a run. The first update of a longer
        run would be lost.
        """
        schedule, optimizer = self.lr_schedulers(), self.optimizers()
        assert isinstance(schedule, torch.optim.lr_scheduler.LambdaLR)
        assert not isinstance(optimizer, list)
        factor = self.optimizer_config.lr_factor(schedule.last_epoch, self.max_steps)
        for group, rate in zip(optimizer.param_groups, schedule.base_lrs, strict=True):
            group["lr"] = rate * factor

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the hash of the teacher's weights to a checkpoint, if there is a teacher."""
        if self.teacher is not None:
            checkpoint["teacher"] = self.teacher.digest

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adapt Lightning's counts of batches and the optimiser's kernel, and check the teacher's weights.

        Lightning counts the batches of a process, and takes an update's end from the count. With other numbers of
        processes and accumulation steps, the updates so far would have had another number of batches per process.
        A run may continue on another kind of device, whose optimiser keeps its step counts elsewhere.
        The teacher's path may change. Checkpoints of earlier versions have no hash of the teacher and are not checked.

        Raises:
            ValueError: The teacher's weights are different, or the checkpoint is not one of this run.
        """
        check_content(checkpoint, self.trainer, self)
        batches = checkpoint["global_step"] * self.trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            counts |= {name: count + batches - counts["ready"] for name, count in counts.items()}
        for state in checkpoint["optimizer_states"]:
            for group in state["param_groups"]:
                group["fused"] = self._reads_late() or None
        if self.teacher is not None and checkpoint.get("teacher", self.teacher.digest) != self.teacher.digest:
            raise ValueError(
                "--resume: --teacher no longer has the weights that the run began with; restore them, "
                "or start a new run with --init"
            )

    def training_step(self, batch: AudioBatch, batch_idx: int) -> Tensor:
        """Compute the loss of one batch, a () tensor summed over its masked frames."""
        accumulation = self.trainer.accumulate_grad_batches
        position = (batch_idx % accumulation) * self.trainer.world_size + self.trainer.global_rank
        # Only dropout uses the global generator.
        torch.manual_seed(_seed_of("dropout", self.seed, batch.update, position))
        layer_drop = None
        if self.model.config.layerdrop > 0:
            layer_drop = torch.Generator().manual_seed(_seed_of("layer drop", self.seed, batch.update))
        keys = utterance_keys(self.seed, batch.update, batch.ids)
        seeds = seeds_together(batch.waveforms.values.device)
        with using_randomness(self.randomness), seeds, casts_together(self.model):
            output = self.model.step(batch, StepContext(keys, batch.update, layer_drop, self.teacher))
        self._pending.append((self._sums(output, batch), batch))
        loss: Tensor = output.loss
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute gradients. Activation checkpointing repeats parts of the forward pass here, so dropout must agree."""
        with using_randomness(self.randomness):
            super().backward(loss, *args, **kwargs)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Scale the gradient of the summed loss to that of the mean over the masked frames of the update.

        This undoes two divisions: Lightning's of the loss by the number of accumulated batches, and DDP's of the
        gradient by the number of processes. Lightning calls this after it has unscaled fp16 gradients and before
        clipping.
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
        """Clip the gradient, then check loss and norm together, now or one update later (`read_every`).

        Raises:
            TrainingError: The loss or the gradient is NaN or infinite (with fp16, the gradient in 20 updates in a row),
                in this update or in the one before. Neither has been applied to the weights then.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), self.optimizer_config.clip_norm or math.inf)
        values = torch.cat((self._reduced, norm.detach().to(self._reduced)[None]))
        rates = {"learning_rate": optimizer.param_groups[0]["lr"], **self.model.schedules(self.global_step)}
        fresh = Unread(self.global_step + 1, values, rates, self._pending)
        self._pending = []
        if self._unread is not None:
            self._read(self._unread)
            self._unread = None
        if self._reads_late():
            # The optimiser skips the update if this is 1, as it does for PyTorch's GradScaler.
            wrong = (values[_COUNTS_END] + values[-1]) * 0 != 0
            optimizer.found_inf = wrong.float()  # type: ignore[attr-defined]
            requested = any(self.last_update.get(name) for name in REQUESTS)
            if not requested and all(fresh.update % every for every in self.read_every):
                self._unread = fresh
                return
        self._read(fresh)

    def _reads_late(self) -> bool:
        """Return whether the host may read the results of an update after the next one.

        fp16's scaler reads on its own whether a gradient overflowed.
        """
        return self.trainer.strategy.root_device.type == "cuda" and not self._is_scaled()

    def _is_scaled(self) -> bool:
        plugin = self.trainer.precision_plugin
        return isinstance(plugin, MixedPrecision) and plugin.scaler is not None

    def _read(self, results: Unread) -> None:
        """Read the results of an update, and raise `TrainingError` if they are not finite."""
        values = results.read()
        loss_and_scores, code_counts = self._averages(values[:-1])
        norm = values[-1].item()
        self.last_update = loss_and_scores | {"grad_norm": norm} | results.rates
        # If gradients overflow, fp16's scaler skips the update and lowers the scale.
        self._skipped = 0 if math.isfinite(norm) else self._skipped + 1
        loss = self.last_update["loss"]
        if not math.isfinite(loss) or self._skipped >= (_MAX_SKIPPED_UPDATES if self._is_scaled() else 1):
            raise TrainingError(self._describe_non_finite(results, loss, norm))
        self._results.append(UpdateResult(results.update, self.last_update, code_counts, results.problems()))

    def take_results(self) -> list[UpdateResult]:
        """Return the results of the updates that have been read since the last call, in order."""
        results, self._results = self._results, []
        return results

    def validation_step(self, batch: AudioBatch, batch_idx: int) -> None:
        """Compute loss and scores for a batch of held-out recordings."""
        # Masks are the same every time, but scheduled values are those of the run's current update.
        keys = utterance_keys(self.seed, VALIDATION_UPDATE, batch.ids)
        with casts_together(self.model):
            output = self.model.step(batch, StepContext(keys, self.global_step, teacher=self.teacher))
        self._validation.append(self._sums(output, batch))

    def on_validation_epoch_end(self) -> None:
        """Average loss and scores over all held-out batches and all processes."""
        sums = self._reduce(torch.stack(self._validation).sum(0)).cpu()
        self.last_validation, counts = self._averages(sums)
        self.last_validation |= code_usage(counts)
        self._validation.clear()

    def _sums(self, output: StepOutput, batch: AudioBatch) -> Tensor:
        """Return the values of a batch to be summed over its update, in fp64: counts, loss, scores, code counts."""
        utterances, problems = len(batch.names), len(batch.problems)
        drawn = utterances + sum(not isinstance(problem, NoiseProblem) for problem in batch.problems)
        masked, scores = output.masked_frames, output.scores()
        first, known = ([masked], []) if isinstance(masked, Tensor) else ([], [masked])  # only the device may know it
        counts = (*known, batch.duration_s, utterances, drawn, problems, *self.requests.counts())
        values = _in_fp64([*first, output.loss.detach(), *(scores[name].detach() for name in self._names)])
        codes = values.new_empty(0) if output.code_counts is None else output.code_counts.to(values)
        (given,) = send([torch.tensor(counts, dtype=values.dtype, device="cpu")], values.device)
        return torch.cat((values[: len(first)], given, values[len(first) :], codes))

    def _averages(self, sums: Tensor) -> tuple[dict[str, float], Tensor]:
        """Split sums into named values and code counts; the loss and the scores become means over the masked frames."""
        first, last = len(_COUNTS), len(_COUNTS) + 1 + len(self._names)
        counts = dict(zip(_COUNTS, sums[:first].tolist(), strict=True))
        averages = (sums[first:last] / max(1.0, counts["masked_frames"])).tolist()
        return dict(zip(("loss", *self._names), averages, strict=True)) | counts, sums[last:]

    def _reduce(self, sums: Tensor) -> Tensor:
        """Sum a tensor over the processes, in place."""
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(sums)
        return sums

    def _describe_non_finite(self, results: Unread, loss: float, norm: float) -> str:
        """Describe the error with the recordings of all processes, so that all of them stop with the same message."""
        at = _COUNTS_END  # index of the loss
        suspects = [batch for sums, batch in results.batches if math.isfinite(loss) or not sums[at].isfinite()]
        guilty = [name for batch in suspects for name in self._names_of_non_finite(batch)]
        if self.trainer.world_size > 1:
            everywhere: list[list[str]] = [[] for _ in range(self.trainer.world_size)]
            torch.distributed.all_gather_object(everywhere, guilty)
            guilty = [name for names in everywhere for name in names]
        what = f"the gradient norm is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
        often = f", the last of {self._skipped} in a row" if self._skipped > 1 else ""
        return (
            f"{what} in update {results.update}{often}. The update was not applied, and the last checkpoint is "
            f"from before it. Lower optimizer.lr, or check the recordings of the batch: {', '.join(map(shown, guilty))}"
        )

    @torch.no_grad()
    def _names_of_non_finite(self, batch: AudioBatch) -> Sequence[str]:
        """Return the recordings that the encoder gives NaN or infinite features; all of the batch if it gives none."""
        encoder, training = self.model.speech_encoder, self.model.training
        features = encoder.eval()(batch.waveforms, normalize=False).features.unpack()
        encoder.train(training)
        bad = [name for name, frames in zip(batch.names, features, strict=True) if not frames.isfinite().all()]
        return bad or batch.names


def _in_fp64(values: Sequence[Tensor]) -> Tensor:  # n of () -> (n,)
    """Stack numbers of any dtypes, with one copy per dtype: a GPU would launch a kernel for each cast."""
    stacked = torch.empty(len(values), dtype=torch.float64, device=values[0].device)
    for dtype in {value.dtype for value in values}:
        chosen = [index for index, value in enumerate(values) if value.dtype == dtype]
        torch._foreach_copy_([stacked[index] for index in chosen], [values[index] for index in chosen])
    return stacked


def _seed_of(purpose: str, *numbers: int) -> int:
    """Hash a purpose and numbers to a seed for a PyTorch generator."""
    return int.from_bytes(hashlib.blake2b(encoded(f"{purpose} {numbers}"), digest_size=8).digest(), "little") >> 1


def code_usage(counts: Tensor) -> dict[str, float]:
    """Compute how evenly codes are used: the perplexity of their distribution, and the share of codes that occur.

    Args:
        counts: (V,) float64, number of times each code occurs; empty if the system has no code counts.

    Returns:
        `code_perplexity` (1 to V) and `code_utilisation` (0 to 1) by name; nothing if `counts` is empty.
    """
    if len(counts) == 0:
        return {}
    shares = counts / counts.sum().clamp(min=1)
    return {"code_perplexity": perplexity(shares).item(), "code_utilisation": (counts > 0).double().mean().item()}

"""Save checkpoints during a run: at regular intervals, after some minutes, when the run is stopped, and at the end."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from fastssl.models.model_card import ModelCard
from fastssl.models.speech_encoder import SpeechEncoder
from fastssl.train.checkpoints import save_encoder
from fastssl.train.module import PretrainModule
from fastssl.train.peers import is_of_communication
from fastssl.train.stopping import Stopped, agreed_signal

logger = logging.getLogger(__name__)

#: Largest share of the training time that is spent on drawing the report.
_DRAWING_SHARE = 0.01
#: Estimate of the time for the first drawing, which also imports matplotlib.
_FIRST_DRAWING_S = 2.0


class PeriodicCheckpoint(Checkpoint):
    """Lightning callback that saves `checkpoints/last.ckpt` and the encoder, and stops the run if a signal asks for it.

    It saves every `every` updates, `minutes` after the last checkpoint, after a signal, and at the end. If held-out
    recordings are scored after the same update, the checkpoint is saved afterwards and includes the scores. After a
    signal, it is saved before, too, because SLURM kills a run half a minute later; resumed, that run begins with the
    scores.

    Args:
        run: Folder of the run.
        encoder: Encoder to write to `encoder/`.
        card: Function that makes the encoder's model card from the number of updates.
        draw: Function that draws the report. It is called after a checkpoint, but rarely enough to take at most 1 % of
            the time.
        every: Updates between two checkpoints.
        minutes: Minutes until the next checkpoint if `every` updates take longer; None sets no limit.
        keep_every: Updates between checkpoints that are also saved as `checkpoints/<update>.ckpt`; None for never.
        scores_every: Updates between two scores of the held-out recordings; None if none are scored.
        resume_at: Updates in the checkpoint that the run starts from; None without one.
    """

    def __init__(
        self,
        run: Path,
        encoder: SpeechEncoder,
        *,
        card: Callable[[int], ModelCard],
        draw: Callable[[], None],
        every: int,
        minutes: float | None,
        keep_every: int | None,
        scores_every: int | None,
        resume_at: int | None,
    ) -> None:
        self.run = run
        self.encoder = encoder
        self.card = card
        self.draw = draw
        self.every = every
        self.minutes = minutes
        self.keep_every = keep_every
        self.scores_every = scores_every
        #: Number of the signal that ended the run before its last update; None if none did.
        self.stopped_by: int | None = None
        #: Updates in the last checkpoint; 0 if there is none.
        self.saved = resume_at or 0
        self._training = False
        self._unscored = False
        self._signal: int | None = None
        self._requested = False
        self._drawn_at, self._drawing_s = 0.0, _FIRST_DRAWING_S

    def continuation(self) -> str:
        """Say what `--resume` will do."""
        if not self.saved:
            return "no checkpoint has been saved yet, so --resume begins again"
        return f"--resume continues after update {self.saved}"

    def state_dict(self) -> dict[str, Any]:
        """Return whether the scores of the same update are missing."""
        return {"unscored": self._unscored}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Note whether the scores of the checkpoint's update are missing."""
        self._unscored = state_dict["unscored"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let SIGTERM end a run at once that does not train yet, and compare the checkpoints of the processes.

        Lightning would go on until after the first batch, and then end with status 0, as if the run was complete.

        Raises:
            ValueError: The processes do not start after the same update; all of them raise it.
        """
        trainer._signal_connector._sigterm_notifier_fn = _stop_at_once  # type: ignore[method-assign]
        if trainer.world_size == 1:
            return
        updates = [0] * trainer.world_size
        torch.distributed.all_gather_object(updates, self.saved)
        if len(set(updates)) > 1:
            raise ValueError(
                f"--resume: {self.run}: the processes found checkpoints of different updates "
                f"({', '.join(map(str, updates))}); choose a folder that all machines share"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to signals; then score the held-out recordings if the run was killed before it could."""
        assert isinstance(pl_module, PretrainModule)
        self._training = True
        self._drawn_at = time.monotonic()
        self._restart_clock(trainer, pl_module)
        pl_module.requests.listen(first=trainer.is_global_zero)
        if trainer.world_size > 1:
            # Lightning asks the first process before every batch whether it got SIGTERM, and waits for the answer.
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        if self._unscored:
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if a checkpoint is due after this update, unless the held-out recordings will be scored first."""
        assert isinstance(pl_module, PretrainModule)
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self._note(pl_module.last_update)
        if self.scores_every is None or trainer.global_step % self.scores_every:
            self._save_where_due(trainer, pl_module)
        elif self._signal is not None and trainer.global_step != trainer.max_steps:
            self._unscored = True
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if a checkpoint is due; it includes the new scores."""
        assert isinstance(pl_module, PretrainModule)
        self._note(pl_module.last_validation)
        self._requested = self._requested or self._unscored
        self._save_where_due(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave signals to their earlier handlers."""
        assert isinstance(pl_module, PretrainModule)
        pl_module.requests.ignore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say where `--resume` continues; after an error in the communication, `Peers` says it."""
        assert isinstance(pl_module, PretrainModule)
        pl_module.requests.ignore()
        if trainer.is_global_zero and self._training and not is_of_communication(exception):
            interrupted = isinstance(exception, KeyboardInterrupt)
            logger.info("stopped%s; %s", " at once" if interrupted else "", self.continuation())

    def _note(self, counts: dict[str, float]) -> None:
        """Note what the processes ask for, from the sums over all of them."""
        if self._signal is None:
            self._signal = agreed_signal(counts)
        self._requested = self._requested or bool(counts.get("save")) or self._signal is not None

    def _save_where_due(self, trainer: Trainer, module: PretrainModule) -> None:
        update, ended = trainer.global_step, trainer.global_step == trainer.max_steps
        due = update % self.every == 0 or ended or self._requested
        if due and (update != self.saved or self._unscored):
            self._unscored = False
            if self.keep_every is not None and update % self.keep_every == 0:
                trainer.save_checkpoint(self.run / "checkpoints" / f"{update:07d}.ckpt")
            self._save(trainer)
            if trainer.is_global_zero:
                save_encoder(self.encoder, self.run / "encoder", card=self.card(update))
                if not ended and self._signal is None:
                    self._draw_where_cheap()
            self._restart_clock(trainer, module)
        self._requested = False
        if self._signal is not None and not ended:
            self.stopped_by = self._signal
            # This ends the loop as if the last update was done. `should_stop` would score the held-out recordings once
            # more, which an unbroken run does not do here.
            trainer.fit_loop.epoch_loop.max_steps = update

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.run / "checkpoints" / "last.ckpt")
        self.saved = trainer.global_step

    def _restart_clock(self, trainer: Trainer, module: PretrainModule) -> None:
        """Let the first process request the next checkpoint when it is time; it decides for all processes."""
        if self.minutes is not None and trainer.is_global_zero:
            module.requests.save_at = time.monotonic() + 60 * self.minutes

    def _draw_where_cheap(self) -> None:
        begin = time.monotonic()
        if (begin - self._drawn_at) * _DRAWING_SHARE < self._drawing_s:
            return
        self.try_to_draw()
        self._drawn_at = time.monotonic()
        self._drawing_s = self._drawn_at - begin

    def try_to_draw(self) -> None:
        """Draw the report; if that fails, log a warning."""
        try:
            self.draw()
        except Exception as error:
            # Catch any error, because the training is worth more than the figure.
            logger.warning("report.png was not drawn: %s", error)


def _stop_at_once(signum: int, _: FrameType) -> None:
    raise Stopped(signum)

"""Checkpoints that are whole or not there, and weights to start from."""

import dataclasses
import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from fastssl.models.folder import CONFORMER, MODEL_CLASSES, read_config, read_weights
from fastssl.models.model_card import ModelCard
from fastssl.models.pretraining import PretrainingModel
from fastssl.models.speech_encoder import SpeechEncoder
from fastssl.train.systems import DEFAULT_SYSTEM, SYSTEMS, system_of

#: Settings of the encoder that may differ from those of the weights it starts from; the others decide the shapes, or
#: what the weights compute.
_FREE_FIELDS = frozenset(
    {
        "hidden_dropout",
        "attention_dropout",
        "activation_dropout",
        "feat_proj_dropout",
        "layerdrop",
        "initializer_range",
        "feature_grad_mult",
    }
)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, then renames.

    Lightning's own writer puts its temporary file in the system's temporary folder, and moving it from there to
    another file system is a copy that a kill leaves half done.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint that is on the disk, whole, when it has its name."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


class PeriodicCheckpoint(Checkpoint):
    """Saves `last.ckpt` and the encoder every `every` updates and at the end, and `<update>.ckpt` every `keep_every`.

    Where held-out recordings are scored after the same update, the checkpoint waits for the scores: a run that
    resumes from it would not score them again.
    """

    def __init__(
        self,
        run: Path,
        encoder: SpeechEncoder,
        *,
        card: Callable[[int], ModelCard],
        every: int,
        keep_every: int | None,
        scores_every: int | None,
    ) -> None:
        self.run = run
        self.encoder = encoder
        self.card = card
        self.every = every
        self.keep_every = keep_every
        self.scores_every = scores_every
        self._saved = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed run has its checkpoint already."""
        self._saved = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, unless scores are due."""
        if self.scores_every is None or trainer.global_step % self.scores_every:
            self._save_where_due(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save with the scores."""
        self._save_where_due(trainer)

    def _save_where_due(self, trainer: Trainer) -> None:
        update = trainer.global_step
        due = update % self.every == 0 or update == trainer.max_steps
        if not due or update == self._saved:
            return
        self._saved = update
        if self.keep_every is not None and update % self.keep_every == 0:
            trainer.save_checkpoint(self.run / "checkpoints" / f"{update:07d}.ckpt")
        trainer.save_checkpoint(self.run / "checkpoints" / "last.ckpt")
        if trainer.is_global_zero:
            save_encoder(self.encoder, self.run / "encoder", card=self.card(update))


def save_encoder(encoder: SpeechEncoder, folder: Path, *, card: ModelCard) -> None:
    """Write an encoder in Transformers' layout, so that at every moment the folder is not there, or is whole.

    Args:
        encoder: What to write.
        folder: Where; an encoder that is there has the same config.
        card: What its README.md says.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    encoder.save_pretrained(temporary, card=card)
    if not folder.exists():
        temporary.replace(folder)
        return
    # A folder cannot replace another at once, but a file can, and only the weights and the card differ.
    for path in temporary.iterdir():
        path.replace(folder / path.name)
    temporary.rmdir()


def saved_update(checkpoint: Path) -> int:
    """How many updates a checkpoint has behind it."""
    return int(torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"])


def initialise(model: PretrainingModel, source: str) -> bool:
    """Copy the weights of a Transformers folder or an earlier run into a model.

    Args:
        model: Takes the weights.
        source: A folder with config.json and weights, or a run: its last checkpoint, else its `encoder/`.

    Returns:
        Whether all came from there; an encoder alone leaves the head of the objective fresh, and a plain one the
        compressor.

    Raises:
        ValueError: The folder holds no weights, or those of another architecture.
    """
    folder = Path(source)
    checkpoint = folder / "checkpoints" / "last.ckpt"
    name = f"--init {source}"
    if checkpoint.is_file():
        settings = yaml.safe_load((folder / "config.yaml").read_text())
        system = settings.get("system", DEFAULT_SYSTEM)
        if system != (wanted := system_of(model.config)):
            raise ValueError(f"{name}: is a run of {system}, and this is to be one of {wanted}")
        config = SYSTEMS[system].config_class.from_dict(settings["model"])
        state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
        weights = {key.removeprefix("model."): tensor for key, tensor in state.items()}
    else:
        if (folder / "encoder" / "config.json").is_file():
            folder = folder / "encoder"
        try:
            config = type(model.config).from_dict(read_config(folder, model_types=[*MODEL_CLASSES, CONFORMER]))
            weights = read_weights(folder)
        except ValueError as error:
            raise ValueError(f"{name}: no run (there is no {checkpoint}) and no model: {error}") from None
    names = [field.name for field in dataclasses.fields(model.speech_encoder.config_class)]
    there, here = (
        {name: getattr(one, name) for name in names if name not in _FREE_FIELDS} for one in (config, model.config)
    )
    fresh_compressor = there.get("compressor") == "none" != here["compressor"]
    if fresh_compressor:  # a plain encoder learns to compress
        there |= {key: here[key] for key in ("compressor", "compressor_factor")}
    different = [key for key in there if there[key] != here[key]]
    if different:
        differences = "; ".join(f"model.{key} is {there[key]} there and {here[key]} here" for key in different)
        options = " ".join(f"--model.{key} {_as_argument(there[key])}" for key in different)
        raise ValueError(
            f"{name}: another architecture: {differences}. Take the --recipe of that architecture, or add: {options}"
        )
    model.load_weights(weights, name=name, fresh_compressor=fresh_compressor)
    return model.head_state().keys() <= weights.keys() and not fresh_compressor


def _as_argument(value: Any) -> str:
    """A setting as it is typed on the command line."""
    return shlex.quote(value if isinstance(value, str) else json.dumps(value, separators=(",", ":")))

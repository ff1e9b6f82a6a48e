"""Write checkpoints and encoders atomically, and initialise a model from earlier weights."""

import dataclasses
import json
import logging
import re
import shlex
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from fastssl.files import check_no_links, replacing
from fastssl.interop import hub
from fastssl.models.config import SpeechEncoderConfig
from fastssl.models.folder import CONFORMER, MODEL_CLASSES, check_matching, is_state_dict, read_config, read_weights
from fastssl.models.model_card import ModelCard
from fastssl.models.pickled import load_pickled
from fastssl.models.pretraining import PretrainingModel
from fastssl.models.skeleton import skeleton
from fastssl.models.speech_encoder import SpeechEncoder
from fastssl.reading import brief, one_line, printable
from fastssl.train.checkpoint_file import LAST, check_checkpoint, find_checkpoint, write_checkpoint
from fastssl.train.config import renamed
from fastssl.train.systems import DEFAULT_SYSTEM, SYSTEMS, build_model, system_of
from fastssl.train.yaml_file import read_yaml

logger = logging.getLogger(__name__)

#: Encoder settings that may differ from those of the weights it starts from. All others change the shapes of the
#: weights, or what the encoder computes with them.
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


#: Entries of a checkpoint that Lightning reads, and their types.
_ENTRIES = {
    "epoch": int,
    "pytorch-lightning_version": str,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "PretrainDataModule": dict,
}
#: Versions of Lightning that saved checkpoints as they are now.
_VERSION = re.compile(r"[2-9](\.\d{1,9}){1,2}((a|b|rc|\.dev|\.post)\d{1,9})?", re.ASCII)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints as `write_checkpoint` does: atomically, with a checksum, and keeping the one before.

    Lightning's own writer uses the system's temporary folder. Moving a file from there to another file system copies
    it, and a killed process would leave a partial copy.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint; it gets its final name only when it is complete on disk.

        Args:
            checkpoint: Content, as Lightning collected it.
            path: File to write; its folder is created if missing.
            storage_options: Lightning's argument; ignored.

        Raises:
            WriteError: The system refused to write.
        """
        write_checkpoint(checkpoint, Path(path))


def save_encoder(encoder: SpeechEncoder, folder: Path, *, card: ModelCard) -> None:
    """Write an encoder in Transformers' layout; at every moment, the folder is either missing or complete.

    Args:
        encoder: Encoder to write.
        folder: Folder to write to. An encoder that it already contains must have the same config.
        card: Facts for its README.md.

    Raises:
        WriteError: The system refused to write.
    """
    check_no_links(folder.parent, [folder.name])
    # If it exists, only the weights and the card change.
    with replacing(folder) as partial:
        encoder.save_pretrained(partial, card=card)


def saved_update(checkpoint: Path) -> int:
    """Read the number of finished updates from a checkpoint.

    Args:
        checkpoint: A `.ckpt` file of a run.

    Raises:
        ValueError: The file is damaged or incomplete.
    """
    return check_checkpoint(checkpoint)


def _read_checkpoint(path: Path) -> dict[str, Any]:
    try:
        checkpoint = load_pickled(path)
    except Exception as error:  # errors of zipfile and pickle have no common class
        raise ValueError(f"{path}: cannot be read as a checkpoint: {one_line(error)}; restore the file") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path}: is not a checkpoint of a run; restore the file")
    return checkpoint


def check_size(config: SpeechEncoderConfig, checkpoint: Path | None) -> None:
    """Check that a model of these settings can be built and, before it is, that a checkpoint has its weights.

    Args:
        config: Settings of the model.
        checkpoint: Checkpoint to resume from, or None.

    Raises:
        ValueError: The model does not fit into memory, or the checkpoint is damaged or of another model.
    """
    try:
        shape = skeleton(lambda: build_model(config))
    except ValueError as error:
        raise ValueError(f"model: {error}; choose smaller sizes") from None
    if checkpoint is not None:
        loaded = _read_checkpoint(checkpoint)
        for name, kind in _ENTRIES.items():
            if not isinstance(loaded.get(name), kind):
                raise ValueError(f"--resume: {checkpoint}: has no valid entry {name!r}; restore the file")
        if not _VERSION.fullmatch(version := loaded["pytorch-lightning_version"]):  # Lightning would rewrite an old one
            raise ValueError(f"--resume: {checkpoint}: is of Lightning {brief(version)}, expected 2.0 or later")
        check_matching(shape, _weights_in(checkpoint), name=f"--resume: {checkpoint}")


def _weights_in(checkpoint: Path) -> dict[str, Tensor]:
    """Return the weights of the model in a checkpoint of a run, by their names in the model."""
    state = _read_checkpoint(checkpoint).get("state_dict")
    if not is_state_dict(state):
        raise ValueError(f"{checkpoint}: has no weights of a model; restore the file")
    return {key.removeprefix("model."): tensor for key, tensor in state.items()}


def initialise(model: PretrainingModel, source: str) -> bool:
    """Copy the weights of a Transformers folder, a model on the Hub or an earlier run into a model.

    Args:
        model: Model to initialise.
        source: Folder with config.json and weights, name of a model on the Hub if no such path exists, or folder of a
            run. For a run, its last checkpoint is used, or the one before if the last is damaged; if there is none, its
            `encoder/`.

    Returns:
        Whether all weights came from `source`. False if it has no weights for the head or the compressor, which then
        keeps its random initial weights.

    Raises:
        ValueError: The folder contains no weights, weights of another system or architecture, or only damaged
            checkpoints; or the Hub has no such model.
    """
    folder = Path(source)
    name = f"--init {source}"
    if not folder.exists() and hub.may_be_id(source):
        try:
            folder = hub.download(source)
        except ValueError as error:
            raise ValueError(f"--init: {error}") from None
    try:
        found = find_checkpoint(folder, name=name)
    except ValueError as error:
        if not (folder / "encoder" / "config.json").is_file():
            raise
        raise ValueError(f"{error}, or start from the encoder with --init {folder / 'encoder'}") from None
    if found is not None:
        if found.damage is not None:
            logger.warning("%s; %s is used, after update %d", found.damage, found.path.name, found.update)
        try:
            config = _config_of_run(folder, model)
            weights = _weights_in(found.path)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    else:
        if (folder / "encoder" / "config.json").is_file():
            folder = folder / "encoder"
        elif not (folder / "config.json").exists():
            raise ValueError(
                f"{name}: is neither a run (no {source}/checkpoints/{LAST}) nor a model (no {folder / 'config.json'}); "
                "choose another folder"
            )
        try:
            values = read_config(folder, model_types=[*MODEL_CLASSES, CONFORMER])
            if (found := values["model_type"]) != model.config.model_type:
                raise ValueError(
                    f"is a {found} encoder, expected a {model.config.model_type} encoder, which "
                    f"{system_of(model.config)} trains; choose another folder, or the recipe of its system"
                )
            config = type(model.config).from_dict(values)
            weights = read_weights(folder)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    names = [field.name for field in dataclasses.fields(model.speech_encoder.config_class)]
    there, here = (
        {name: getattr(one, name) for name in names if name not in _FREE_FIELDS} for one in (config, model.config)
    )
    fresh_compressor = there.get("compressor") == "none" != here["compressor"]
    if fresh_compressor:  # the source has no compressor, so a new one is trained
        there |= {key: here[key] for key in ("compressor", "compressor_factor")}
    different = [key for key in there if there[key] != here[key]]
    if different:
        differences = "; ".join(f"model.{key} is {there[key]} there and {here[key]} here" for key in different)
        options = " ".join(f"--model.{key} {_as_argument(there[key])}" for key in different)
        raise ValueError(
            f"{name}: the architecture differs: {differences}. Use the --recipe of that architecture, or add: {options}"
        )
    model.load_weights(weights, name=name, fresh_compressor=fresh_compressor)
    return model.head_state().keys() <= weights.keys() and not fresh_compressor


def _config_of_run(folder: Path, model: PretrainingModel) -> SpeechEncoderConfig:
    """Read the model's settings of a run, which must be of the same system as `model`."""
    path, wanted = folder / "config.yaml", system_of(model.config)
    settings = renamed(read_yaml(path))
    system = settings.get("system", DEFAULT_SYSTEM)
    if system != wanted:
        raise ValueError(f"is a run of {printable(system)}, expected a run of {wanted}; choose another folder")
    if not isinstance(settings.get("model"), dict):
        raise ValueError(f"{path}: has no settings of a model; restore the file")
    try:
        return SYSTEMS[wanted].config_class.from_dict(settings["model"])
    except ValueError as error:
        raise ValueError(f"{path}: model.{error}") from None


def _as_argument(value: Any) -> str:
    """Quote a setting as it would be typed on the command line."""
    return shlex.quote(value if isinstance(value, str) else json.dumps(value, separators=(",", ":")))

"""The interface shared by `Encoder` and `ConformerEncoder`: call, save, open, load weights."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor, nn

from fastssl.models.config import SpeechEncoderConfig
from fastssl.models.folder import (
    ACCELERATED_COMPRESSOR,
    COMPRESSOR_FILE,
    COMPRESSOR_PREFIX,
    load_matching,
    read_config,
    read_weights,
    write_encoder_weights,
    write_json,
    write_text,
)
from fastssl.models.model_card import ModelCard
from fastssl.nn.compression import Compressed, SequenceCompressor
from fastssl.packing import Packed

if TYPE_CHECKING:
    from typing_extensions import Self


class EncoderOutput(NamedTuple):
    """What an encoder returns."""

    features: Packed  # (N, D), the last hidden state
    hidden_states: list[Packed]  # the input of each layer, then the features (after the final norm, where there is one)
    compressed: Compressed | None = None  # what the compressor made of the front end's frames; None where there is none


class SpeechEncoder(nn.Module):
    """An encoder of packed waveforms.

    With a compressor the layers see fewer frames. The rate or the frame period of each call decides how many, else
    `compressor.rate` or `compressor.frame_period_ms` (see `nn.SequenceCompressor`).

    Args:
        config: Its shape.
    """

    #: The class of `config`, and the `model_type`s that it serves.
    config_class: ClassVar[type[SpeechEncoderConfig]]
    model_types: ClassVar[Iterable[str]]
    config: SpeechEncoderConfig
    encoder: nn.Module  # the layers
    compressor: SequenceCompressor | None

    def __init__(self, config: SpeechEncoderConfig) -> None:
        super().__init__()
        self.config = config

    def forward(
        self,
        waveforms: Packed,
        *,
        rate: float | Tensor | None = None,
        frame_period_ms: float | Tensor | None = None,
    ) -> EncoderOutput:
        """Encode waveforms.

        Args:
            waveforms: (N, 1) samples at 16 kHz, normalised if the config says `do_normalize`. An utterance shorter
                than `config.receptive_field_samples` has no frame.
            rate: The compressor's rate, 0 for all frames: a number, or (B,).
            frame_period_ms: The mean period that frames should have instead: a number, or (B,).

        Raises:
            ValueError: The waveforms have another shape; a rate or a period is out of range, or the encoder has no
                compressor that takes one.
        """
        return self.encode(self.extract_features(waveforms), rate=rate, frame_period_ms=frame_period_ms)

    def extract_features(self, waveforms: Packed) -> Packed:
        """Frames of the front end, before the compressor."""
        raise NotImplementedError

    def encode(
        self,
        frames: Packed,
        *,
        rate: float | Tensor | None = None,
        frame_period_ms: float | Tensor | None = None,
    ) -> EncoderOutput:
        """Encode what `extract_features` returns; other arguments and errors as of `forward`."""
        raise NotImplementedError

    def compress(
        self, frames: Packed, *, rate: float | Tensor | None, frame_period_ms: float | Tensor | None
    ) -> tuple[Packed, Compressed | None]:
        """The frames (N, C) that continue to the layers; other arguments and errors as of `forward`."""
        if self.compressor is None:
            if rate is not None or frame_period_ms is not None:
                raise ValueError("rate and frame_period_ms: this encoder has no compressor")
            return frames, None
        compressed = self.compressor(frames, rate=rate, frame_period_ms=frame_period_ms)
        return compressed.frames, compressed

    def json_files(self) -> dict[str, dict[str, Any]]:
        """What `save_pretrained` writes beside the weights, by file name."""
        raise NotImplementedError

    def save_pretrained(self, folder: str | Path, *, card: ModelCard | None = None) -> None:
        """Write configs, weights and README.md: an `Encoder` as Transformers and the Hub read it.

        Args:
            folder: Created if it does not exist.
            card: How the encoder came about, for README.md; without one, an existing README.md is kept.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, values in self.json_files().items():
            write_json(folder / name, values)
        if card is not None or not (folder / "README.md").exists():
            parameters = sum(parameter.numel() for parameter in self.parameters())
            write_text(folder / "README.md", (card or ModelCard()).as_markdown(self.config, parameters=parameters))
        write_encoder_weights(folder, self.state_dict())

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Self":
        """Open a folder that `save_pretrained` wrote, or one of a model with a head, of which the encoder is taken.

        Raises:
            ValueError: The folder does not contain such a model, or its weights do not fit its config.
        """
        folder = Path(folder)
        values = read_config(folder, model_types=cls.model_types)
        try:
            encoder = cls(cls.config_class.from_dict(values))
        except ValueError as error:
            raise ValueError(f"{folder / 'config.json'}: {error}") from None
        encoder.load_weights(read_weights(folder), name=str(folder))
        return encoder

    def own_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of the weights of an encoder, or of a model with a head, the encoder's, by the names that they have here."""
        raise NotImplementedError

    def load_weights(self, weights: Mapping[str, Tensor], *, name: str, fresh_compressor: bool = False) -> None:
        """Load the weights of an encoder, or of a model with a head, whose other weights are ignored.

        Args:
            weights: By name.
            name: Name of the file or model, for errors.
            fresh_compressor: Whether the compressor may stay as it is if the weights have none.

        Raises:
            ValueError: A weight is missing or has another shape, or the encoder has no place for one, as for the
                compressor of an accelerated model.
        """
        own, found = self.state_dict(), self.own_weights(weights)
        if fresh_compressor and not any(key.startswith(COMPRESSOR_PREFIX) for key in found):
            found |= {key: tensor for key, tensor in own.items() if key.startswith(COMPRESSOR_PREFIX)}
        if any(key.startswith(COMPRESSOR_PREFIX) for key in own.keys() - found.keys()):
            raise ValueError(
                f"{name}: weights are missing: those of {COMPRESSOR_FILE}, which Transformers does not write; copy it "
                "from where the encoder was saved by fastssl"
            )
        if put_on := [key for key in weights if f"{ACCELERATED_COMPRESSOR}." in key]:
            raise ValueError(
                f"{name}: has a compressor that `fastssl.accelerate` put on ({put_on[0]}, ...), for which an encoder "
                "of fastssl's has no place; `fastssl.restore` takes it off the model"
            )
        load_matching(self, found, name=name)

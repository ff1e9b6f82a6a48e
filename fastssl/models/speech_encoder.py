"""The interface shared by `Encoder` and `ConformerEncoder`: call, save, open, load weights."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fastssl.files import make_folder, write_json, write_text
from fastssl.kernels.prepacked_conv.weights import Format
from fastssl.models.config import SpeechEncoderConfig
from fastssl.models.folder import (
    ACCELERATED_COMPRESSOR,
    COMPRESSOR_FILE,
    COMPRESSOR_PREFIX,
    SAMPLE_RATE_HZ,
    check_finite,
    check_matching,
    check_stored,
    follow_preprocessor,
    load_matching,
    read_config,
    read_processor,
    read_weights,
    write_encoder_weights,
)
from fastssl.models.inference import prepack_encoder
from fastssl.models.model_card import ModelCard
from fastssl.models.publish import upload
from fastssl.models.skeleton import skeleton
from fastssl.nn.adapter import ConvolutionalAdapter
from fastssl.nn.compression import Compressed, SequenceCompressor
from fastssl.nn.cuda_graphs import CudaGraphs
from fastssl.nn.linear import casts_together
from fastssl.nn.prepacked import check_stays, parameter_count
from fastssl.nn.waveforms import as_samples, normalize_waveforms
from fastssl.packing import Layout, Packed
from fastssl.reading import printable

if TYPE_CHECKING:
    from typing_extensions import Self


#: Whether a call has said in this process that it normalises waveforms because the model's config asks for it.
_said_that_calls_normalize = False


class EncoderOutput(NamedTuple):
    """Output of an encoder for a packed batch.

    Attributes:
        features: (N, D) last hidden state, after the final norm if the encoder has one. If it has a convolutional
            adapter (`AdaptedEncoderConfig.add_adapter`), the output of that, which has fewer frames.
        hidden_states: The input of each layer in order, then the output of the last one after the final norm, each
            (N, D).
        compressed: Result of the compressor on the front end's frames; None if the encoder has no compressor.
    """

    features: Packed  # (N, D)
    hidden_states: list[Packed]  # each (N, D)
    compressed: Compressed | None = None


class SpeechEncoder(nn.Module):
    """Base class of encoders for packed waveforms.

    A call takes raw audio: it scales each utterance to zero mean and unit variance if the model was trained on such
    waveforms (`config.do_normalize`). The attribute `normalize` overrides the config, and the argument `normalize` of a
    call overrides both.

    If the encoder has a compressor, its layers process fewer frames. The rate or frame period that is passed to a call
    decides how many; without either, `compressor.rate` or `compressor.frame_period_ms` does (see
    `nn.SequenceCompressor`).

    Args:
        config: Shape of the encoder.
    """

    #: Class of `config`, and the values of `model_type` that the encoder can open.
    config_class: ClassVar[type[SpeechEncoderConfig]]
    model_types: ClassVar[Iterable[str]]
    config: SpeechEncoderConfig
    encoder: nn.Module  # the layers
    compressor: SequenceCompressor | None
    adapter: ConvolutionalAdapter | None
    #: Whether calls normalise waveforms; None does what `config.do_normalize` says.
    normalize: bool | None = None
    #: Format of the weights if they are prepacked (`models.inference`); None if they are parameters.
    inference: Format | None = None
    _cuda_graphs: CudaGraphs | None = None
    #: Folder that the encoder was opened from, whose README.md `push_to_hub` uploads.
    _folder: Path | None = None

    def __init__(self, config: SpeechEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.adapter = None

    def forward(
        self,
        waveforms: Packed,
        *,
        sampling_rate: int | None = None,
        normalize: bool | None = None,
        rate: float | Tensor | None = None,
        frame_period_ms: float | Tensor | None = None,
    ) -> EncoderOutput:
        """Encode waveforms.

        Args:
            waveforms: (N,) or (N, 1) samples at 16 kHz. An utterance shorter than `config.receptive_field_samples` gets
                no frames.
            sampling_rate: Rate of the samples in Hz, if you want it checked, as by the feature extractors of
                Transformers.
            normalize: Whether to scale each utterance to zero mean and unit variance first; False if that was done
                already. None does what the encoder's `normalize` says, and if that is None, its config.
            rate: Rate of the compressor, one number or (B,); 0 keeps every frame. None uses the compressor's setting.
            frame_period_ms: Mean frame period to compress to, in milliseconds, one number or (B,); give this or `rate`,
                not both.

        Returns:
            Features and hidden states, and the compressor's result.

        Raises:
            ValueError: `waveforms` does not have shape (N,) or (N, 1), or is not floating point; `normalize` is not a
                bool; `sampling_rate` is not 16 kHz; a rate or period is out of range; or one is given, but the encoder
                has no compressor or one with a fixed factor.
        """
        if sampling_rate is not None and sampling_rate != SAMPLE_RATE_HZ:
            example = f"torchaudio.functional.resample(waveform, {sampling_rate}, {SAMPLE_RATE_HZ})"
            raise ValueError(
                f"sampling_rate: the encoder takes waveforms at {SAMPLE_RATE_HZ} Hz, got {sampling_rate}; resample "
                f"each, for example with {example}"
            )
        waveforms = self._samples(waveforms, normalize)
        if self._cuda_graphs is not None and rate is None and frame_period_ms is None:
            hidden_states = self._cuda_graphs.run(self, self._hidden_states, self._ask, waveforms)
            if hidden_states is not None:
                return EncoderOutput(hidden_states[-1], hidden_states)
        with casts_together(self):
            return self.encode(self._front_end(waveforms), rate=rate, frame_period_ms=frame_period_ms)

    def _hidden_states(self, waveforms: Packed) -> list[Packed]:
        with casts_together(self):
            return self.encode(self._front_end(waveforms)).hidden_states

    def use_cuda_graphs(self, enabled: bool = True, *, max_graphs: int = 32, max_duration_s: float = 60.0) -> "Self":
        """Run the forward pass by CUDA graphs where possible: for short inputs, which wait for the host on a fast GPU.

        Not measured on a GPU yet. For a few seconds of audio, the host takes longer to launch kernels than the GPU
        takes to run them. A CUDA graph launches all of them at once. One is captured for each bucket of batches of
        about the same size, when the first such batch comes. This takes as long as a few calls, and the graph's hidden
        states stay in GPU memory. A batch is filled up with zeros to the size of its bucket, by about an eighth of its
        samples at most. Features are the same as without graphs, up to rounding.

        A call uses a graph if it is `encoder(waveforms)` on a GPU, in evaluation mode, under `torch.no_grad` or
        `torch.inference_mode`, with at most `max_duration_s` of audio. Any other call runs as before: in training, with
        gradients, inside `torch.compile` or another graph, if a module has a hook, and if only `extract_features` or
        `encode` is called. Weights that change in place have effect. If a parameter, a buffer or a module is replaced,
        graphs are captured again. After a change of a module's code, or of a setting of PyTorch's backends other than
        `fp32_precision`, call this method again. Call the encoder in one thread and on one stream. A call raises a
        ValueError if an op has no kernel for it but the reference, which reads lengths on the host.

        Args:
            enabled: Whether to use graphs; False drops those that exist.
            max_graphs: Number of graphs to keep; the one that was not used for the longest time is dropped.
            max_duration_s: Seconds of audio of a batch above which it runs without a graph.

        Returns:
            The encoder.

        Raises:
            ValueError: The encoder has a compressor or a convolutional adapter, which leave a number of frames that
                varies within a bucket; or a limit is not positive.
        """
        if enabled and self.adapter is not None:
            raise ValueError(
                "use_cuda_graphs: this encoder has an adapter after its layers, and how many frames that leaves varies "
                "within a bucket; run it without CUDA graphs"
            )
        if enabled and self.compressor is not None:
            raise ValueError(
                "use_cuda_graphs: this encoder has a compressor, and how many frames it leaves varies within a bucket; "
                "run it without CUDA graphs"
            )
        if max_graphs < 1 or not max_duration_s > 0:
            raise ValueError(f"max_graphs and max_duration_s: must be positive, got {max_graphs} and {max_duration_s}")
        if self._cuda_graphs is not None:
            self._cuda_graphs.clear()
        self._cuda_graphs = None
        if enabled:
            self._cuda_graphs = CudaGraphs(
                receptive_field=self.config.receptive_field_samples,
                hop=self.config.samples_per_frame,
                max_graphs=max_graphs,
                max_samples=int(max_duration_s * SAMPLE_RATE_HZ),
            )
        return self

    def _ask(self, layout: Layout) -> Layout:
        """Ask the layout of the samples for what a forward pass needs (`Layout.plan`); return that of the frames."""
        raise NotImplementedError

    def extract_features(self, waveforms: Packed, *, normalize: bool | None = None) -> Packed:
        """Compute the front end's output, which is the input of `encode`; nothing is compressed yet.

        Args:
            waveforms: (N,) or (N, 1) samples at 16 kHz.
            normalize: As in `forward`.

        Returns:
            Packed frames: those of the convolutions (N_out, C), or of BEST-RQ's log-mel filters (N_out, bands).

        Raises:
            ValueError: `waveforms` does not have shape (N,) or (N, 1), or is not floating point.
        """
        return self._front_end(self._samples(waveforms, normalize))

    @property
    def normalizes(self) -> bool:
        """Whether the waveforms that the encoder computes with are scaled to zero mean and unit variance."""
        return self.config.do_normalize if self.normalize is None else self.normalize

    @property
    def unrecorded_normalize(self) -> bool:
        """What fastssl 0.1.0, which did not read processor_config.json, took for `config.do_normalize`."""
        if self._folder is None or not (self._folder / "config.json").exists():
            return self.config.do_normalize
        before = read_config(self._folder, model_types=self.model_types, preprocessors=["preprocessor_config.json"])
        return bool(before.get("do_normalize", self.config_class.do_normalize))

    def _samples(self, waveforms: Packed, normalize: bool | None) -> Packed:
        """Return the samples (N, 1) that the front end takes; `normalize` as in `forward`."""
        samples, chosen = as_samples(waveforms), self.normalizes if normalize is None else normalize
        if not isinstance(chosen, bool):  # text such as "no" would count as true
            raise ValueError(f"normalize: must be True, False or None, got {chosen!r}")
        if not chosen:
            return samples
        if normalize is None and self.normalize is None:
            _say_that_calls_normalize()
        return normalize_waveforms(samples)

    def _front_end(self, samples: Packed) -> Packed:
        """Compute the result of `extract_features` from the samples (N, 1) that `_samples` returned."""
        raise NotImplementedError

    def encode(
        self,
        frames: Packed,
        *,
        rate: float | Tensor | None = None,
        frame_period_ms: float | Tensor | None = None,
    ) -> EncoderOutput:
        """Encode the result of `extract_features`; the other arguments and the errors are those of `forward`."""
        raise NotImplementedError

    def compress(
        self, frames: Packed, *, rate: float | Tensor | None, frame_period_ms: float | Tensor | None
    ) -> tuple[Packed, Compressed | None]:
        """Compress frames if the encoder has a compressor.

        The errors are those of `forward`.

        Args:
            frames: (N, C) packed frames.
            rate: As in `forward`.
            frame_period_ms: As in `forward`.

        Returns:
            The frames for the layers, and the compressor's result; without a compressor, `frames` and None.
        """
        if self.compressor is None:
            if rate is not None or frame_period_ms is not None:
                raise ValueError("rate and frame_period_ms: this encoder has no compressor; call it without them")
            return frames, None
        compressed = self.compressor(frames, rate=rate, frame_period_ms=frame_period_ms)
        return compressed.frames, compressed

    def json_files(self) -> dict[str, dict[str, Any]]:
        """Return the contents of the JSON files that `save_pretrained` writes next to the weights, by file name."""
        raise NotImplementedError

    def save_pretrained(self, folder: str | Path, *, card: ModelCard | None = None) -> None:
        """Write configs, weights and README.md to a folder. Transformers and the Hub can read an `Encoder`'s folder.

        The attribute `normalize` is not saved: an encoder that is loaded again does as its config says. A
        processor_config.json that is there gets the settings of preprocessor_config.json, which it would hide.

        Args:
            folder: Folder to write to; created if missing.
            card: Facts about the encoder's training, for README.md; without a card, an existing README.md is kept.

        Raises:
            ValueError: A processor_config.json that is there is damaged; nothing was written.
            WriteError: The system refused to write.
        """
        folder = Path(folder)
        make_folder(folder)
        read_processor(folder)  # if it is damaged, nothing has been written yet
        for name, values in self.json_files().items():
            write_json(folder / name, values)
        follow_preprocessor(folder)
        if card is not None or not (folder / "README.md").exists():
            parameters = parameter_count(self)
            rounded_to = None if self.inference == "fp32" else self.inference
            text = (card or ModelCard()).as_markdown(self.config, parameters=parameters, rounded_to=rounded_to)
            write_text(folder / "README.md", text)
        write_encoder_weights(folder, self.state_dict())

    def push_to_hub(
        self,
        name: str,
        *,
        card: ModelCard | None = None,
        private: bool | None = None,
        token: str | None = None,
        message: str = "Upload a speech encoder of fastssl",
    ) -> str:
        """Upload the encoder to the Hugging Face Hub, with the files of `save_pretrained`; needs huggingface_hub.

        Args:
            name: Name of the model, such as "me/my-encoder"; it is created if it does not exist.
            card: Facts about the encoder for README.md. Without a card, the README.md of a model that exists is kept.
                A new one gets the README.md of the folder that the encoder was opened from, such as that of a run, so
                give a card if you have trained the encoder further.
            private: Whether a new model is private; None leaves that to the Hub.
            token: Access token; None uses the one that `hf auth login` stored.
            message: Message of the commit.

        Returns:
            The address of the commit.

        Raises:
            ValueError: huggingface_hub is not installed, or the Hub refuses.
        """
        readme = None if self._folder is None else self._folder / "README.md"
        return upload(
            lambda folder: self.save_pretrained(folder, card=card),
            name,
            readme=readme if card is None and readme is not None and readme.is_file() else None,
            replaces_card=card is not None,
            private=private,
            token=token,
            message=message,
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, inference: Format | None = None) -> "Self":
        """Open an encoder that `save_pretrained` wrote, or the encoder inside a saved model with a head.

        Args:
            folder: Folder with config.json and weights.
            inference: As in `load_encoder`.

        Raises:
            ValueError: The folder contains no model of one of the `model_types`, or its weights do not fit its config.
        """
        folder = Path(folder)
        values = read_config(folder, model_types=cls.model_types)
        try:
            config = cls.config_class.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{folder / 'config.json'}: {error}") from None
        encoder = cls.from_weights(config, read_weights(folder), name=str(folder), inference=inference)
        encoder._folder = folder.absolute()
        return encoder

    @classmethod
    def from_weights(
        cls,
        config: SpeechEncoderConfig,
        weights: Mapping[str, Tensor],
        *,
        name: str,
        inference: Format | None = None,
    ) -> "Self":
        """Build an encoder and load its weights, after checking that config and weights fit each other.

        Nothing is built before, because a file may claim any size.

        Args:
            config: Shape of the encoder, an instance of `config_class`.
            weights: Tensors by name, as read from a file.
            name: Name of the folder or file, for error messages.
            inference: As in `load_encoder`.

        Raises:
            ValueError: The weights do not fit the config, are not finite, or do not fit into memory.
        """
        if config.num_modules > len(weights):
            raise ValueError(
                f"{name}: the config describes {config.num_modules} layers, but there are only {len(weights)} weights"
            )
        try:
            shape = skeleton(lambda: cls(config))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        found = shape.matching_weights(weights, name=name)
        check_matching(shape, found, name=name)
        check_stored(found, name=name)
        if inference is not None:
            check_finite(((key, tensor.float()) for key, tensor in found.items() if not tensor.is_meta), name=name)
            return shape._prepacked(inference, found)
        try:
            with torch.device("cpu"):
                encoder = cls(config)
        except (RuntimeError, MemoryError) as error:
            raise ValueError(f"{name}: cannot be built: {str(error).partition(chr(10))[0]}") from error
        encoder.load_weights(weights, name=name)
        return encoder

    def prepack(self, format: Format) -> "Self":
        """Lay out the weights for inference on the CPU, in place; see `load_encoder`.

        Args:
            format: "fp32", "bf16" or "int8".

        Returns:
            The encoder, in evaluation mode.

        Raises:
            ValueError: The weights are prepacked already or not on the CPU, or this processor lacks the instructions.
        """
        if self.inference is not None:
            raise ValueError(f"inference: the weights are prepacked as {self.inference!r} already; load them again")
        devices = {parameter.device.type for parameter in self.parameters()}
        if devices != {"cpu"}:
            raise ValueError(f"inference: prepacked weights run on the CPU, the encoder is on {', '.join(devices)}")
        return self._prepacked(format, None)

    def _prepacked(self, format: Format, weights: Mapping[str, Tensor] | None) -> "Self":
        prepack_encoder(self.eval(), format, weights)
        self.inference = format
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Self":
        check_stays(self, fn)  # or the parameters before the first prepacked layer would change, and the others not
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def own_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Pick the encoder's weights from those of an encoder, or of a model with a head.

        Args:
            weights: Tensors by name, as read from a file.

        Returns:
            The encoder's tensors by the names of this module's state dict.
        """
        raise NotImplementedError

    def load_weights(self, weights: Mapping[str, Tensor], *, name: str, fresh_compressor: bool = False) -> None:
        """Load the weights of an encoder, or the encoder's part of the weights of a model with a head.

        Args:
            weights: Tensors by name.
            name: Name of the file or model, for error messages.
            fresh_compressor: Allow `weights` to contain no compressor; the encoder's compressor then stays unchanged.

        Raises:
            ValueError: A weight is missing, has the wrong shape, is NaN or infinite, or has no counterpart in this
                encoder, such as those of a compressor that `fastssl.accelerate` added to a Transformers model.
        """
        load_matching(self, self.matching_weights(weights, name=name, fresh_compressor=fresh_compressor), name=name)

    def matching_weights(
        self, weights: Mapping[str, Tensor], *, name: str, fresh_compressor: bool = False
    ) -> dict[str, Tensor]:
        """Pick the encoder's weights as `own_weights` does, and explain what is wrong with those of a compressor.

        The arguments are those of `load_weights`.

        Raises:
            ValueError: The weights of a compressor are missing, or belong to a model that `fastssl.accelerate` changed.
        """
        own, found = self.state_dict(), self.own_weights(weights)
        if fresh_compressor and not any(key.startswith(COMPRESSOR_PREFIX) for key in found):
            found |= {key: tensor for key, tensor in own.items() if key.startswith(COMPRESSOR_PREFIX)}
        if any(key.startswith(COMPRESSOR_PREFIX) for key in own.keys() - found.keys()):
            raise ValueError(
                f"{name}: weights are missing: those of {COMPRESSOR_FILE}, which Transformers does not write; copy "
                "this file from the folder where fastssl saved the encoder"
            )
        if put_on := [key for key in weights if f"{ACCELERATED_COMPRESSOR}." in key]:
            raise ValueError(
                f"{name}: contains a compressor that `fastssl.accelerate` added ({printable(put_on[0])}, ...) and that "
                "a fastssl encoder cannot load; remove it with `fastssl.restore(model)` and save the model again"
            )
        return found


def _say_that_calls_normalize() -> None:
    """Warn once per process that calls scale waveforms, which was left to the caller in fastssl 0.1.0."""
    global _said_that_calls_normalize
    if _said_that_calls_normalize or torch.compiler.is_compiling():
        return
    _said_that_calls_normalize = True
    warnings.warn(
        "the encoder scales each waveform to zero mean and unit variance, because its config has do_normalize=True; "
        "earlier versions left this to the caller. Give `load_encoder` or the call normalize=True to keep it without "
        "this message, or normalize=False if your waveforms are scaled already or for the features of earlier versions",
        stacklevel=6,  # where the encoder was called
    )

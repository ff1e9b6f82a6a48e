"""Time other libraries' models before and after `accelerate`: `python -m benchmarks.bench_drop_in --device cpu|cuda`.

Covers the forward pass and the training step of every architecture, on the workloads `read-speech` and `equal`; `equal`
needs no padding. The Conformer has no training step, because only its evaluation is accelerated. The weights are
random. Layer drop and SpecAugment are off, so that every step does the same work; dropout is on.
"""

import copy
import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastssl
from benchmarks import limits, rivals, workloads
from benchmarks.harness import Contenders, Outputs, Row, compare
from benchmarks.recipes import recipe_model
from benchmarks.report import Rows, main
from benchmarks.targets import Target
from fastssl.models.encoder import EncoderConfig
from fastssl.packing import Packed

_GATE_S = [1.0, 0.7]
_TOLERANCES = {"forward": {torch.float32: 2e-4, torch.bfloat16: 0.1}, "training": {torch.float32: 1e-3}}
_BASE = EncoderConfig()
_LARGE = EncoderConfig(
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    intermediate_size=4096,
    feat_extract_norm="layer",
    conv_bias=True,
    do_stable_layer_norm=True,
)
_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "feat_extract_norm",
    "conv_bias",
    "do_stable_layer_norm",
)
_SEW_MID = EncoderConfig(
    hidden_size=512,
    num_hidden_layers=24,
    num_attention_heads=8,
    intermediate_size=2048,
    num_conv_pos_embeddings=31,
    conv_dim=(64, *[128] * 4, *[256] * 4, *[512] * 4),
    conv_kernel=(10, *[3, 1] * 4, *[2, 1] * 2),
    conv_stride=(5, *[2, 1] * 6),
)
_CONFORMER_LARGE = replace(_LARGE, num_hidden_layers=6)
# data2vec has five positional convolutions of 19 taps, which take as many multiplications as one of 95 taps.
_DATA2VEC = EncoderConfig(feat_extract_norm="layer", num_conv_pos_embeddings=95)


class Architecture(NamedTuple):
    """Model of another library.

    Args:
        make: Builds the model with random weights.
        encode: Runs the model: (model, (B, T) samples, (B,) lengths or None) -> (B, F, D) features.
        shape: A fastssl config with the same matrix products; the limits are computed from it.
        takes_lengths: Whether the original takes lengths; torchaudio's WavLM treats padding as audio.
        gemms: Function from the shape and the numbers of samples to the matrix products, see `benchmarks.limits`.
        works: What the rows measure.
    """

    make: Callable[[], nn.Module]
    encode: Callable[[Any, Tensor, Tensor | None], Tensor]
    shape: EncoderConfig
    takes_lengths: bool = True
    gemms: Callable[..., list[limits.Gemm]] = limits.encoder
    works: tuple[str, ...] = ("forward", "training")


def _transformers(family: str, **settings: Any) -> nn.Module:
    library = importlib.import_module("transformers")
    config = getattr(library, f"{family}Config")(**{"layerdrop": 0.0, "apply_spec_augment": False} | settings)
    model: nn.Module = getattr(library, f"{family}Model")(config)
    return model


def _encode_transformers(model: Any, audio: Tensor, lengths: Tensor | None) -> Tensor:
    mask = None
    if lengths is not None:
        mask = (torch.arange(audio.shape[1], device=audio.device) < lengths.unsqueeze(1)).long()
    out: Tensor = model(audio, attention_mask=mask).last_hidden_state
    return out


def _torchaudio(factory: str) -> nn.Module:
    model: nn.Module = getattr(importlib.import_module("torchaudio.models"), factory)(encoder_layer_drop=0.0)
    return model


def _encode_torchaudio(model: Any, audio: Tensor, lengths: Tensor | None) -> Tensor:
    out: Tensor = model(audio, lengths)[0]
    return out


def _of_transformers(family: str, shape: EncoderConfig, **settings: Any) -> Architecture:
    if shape in (_LARGE, _SEW_MID, _CONFORMER_LARGE):
        settings = {name: getattr(shape, name) for name in _FIELDS} | settings
    return Architecture(partial(_transformers, family, **settings), _encode_transformers, shape)


ARCHITECTURES = {
    "wav2vec2-base": _of_transformers("Wav2Vec2", _BASE),
    "wav2vec2-large": _of_transformers("Wav2Vec2", _LARGE),
    "hubert-base": _of_transformers("Hubert", _BASE),
    "wavlm-base": _of_transformers("WavLM", _BASE),
    "wavlm-large": _of_transformers("WavLM", _LARGE),
    "data2vec-base": _of_transformers("Data2VecAudio", _DATA2VEC),
    "unispeech-base": _of_transformers("UniSpeech", _BASE),
    "unispeech-sat-base": _of_transformers("UniSpeechSat", _BASE),
    "sew-mid-100k": _of_transformers("SEW", _SEW_MID, num_conv_pos_embeddings=31)._replace(
        gemms=partial(limits.squeezed_encoder, factor=2)
    ),
    # All 24 layers take 2.4 GB, and their copy in fp64, which the outputs are checked against, twice as much.
    "wav2vec2-conformer-rope-large-6-of-24-layers": _of_transformers(
        "Wav2Vec2Conformer", _CONFORMER_LARGE, hidden_act="swish", position_embeddings_type="rotary"
    )._replace(gemms=limits.conformer, works=("forward",)),
    "torchaudio-wav2vec2-base": Architecture(partial(_torchaudio, "wav2vec2_base"), _encode_torchaudio, _BASE),
    "torchaudio-hubert-base": Architecture(partial(_torchaudio, "hubert_base"), _encode_torchaudio, _BASE),
    "torchaudio-wavlm-base": Architecture(
        partial(_torchaudio, "wavlm_base"), _encode_torchaudio, _BASE, takes_lengths=False
    ),
}


def _lengths_s(name: str, workload: str, device: torch.device) -> list[float]:
    """Return the lengths of the utterances in seconds: about 15 to 40 s of audio on a CPU, 400 s on a GPU."""
    large = ARCHITECTURES[name].shape.hidden_size == _LARGE.hidden_size
    if device.type == "cpu":
        return workloads.equal(1) if workload == "equal" else workloads.read_speech(2 if large else 3)
    return workloads.equal(26) if workload == "equal" else workloads.read_speech(workloads.utterances_for(400))


def drop_in(name: str, work: str, workload: str, device: torch.device) -> Row:
    """Compare a model with its accelerated copy: in fp32 on the CPU, in bf16 or under bf16 autocast on a GPU.

    Args:
        name: Key of `ARCHITECTURES`.
        work: "forward" or "training".
        workload: "read-speech" or "equal".
        device: Device to measure on.
    """
    torch.manual_seed(0)
    architecture, training = ARCHITECTURES[name], work == "training"
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    original = architecture.make().to(device)
    exact = rivals.in_double(original)
    if not training:
        original = original.to(dtype).eval()
    ours = fastssl.accelerate(copy.deepcopy(original))
    lengths_s = _lengths_s(name, workload, device)
    batch = workloads.waveforms(lengths_s, device)
    audio, mask = workloads.padded(batch)
    lengths = mask.sum(1)
    if not training:
        audio = audio.to(dtype)

    def contender(model: nn.Module, given: Tensor | None) -> tuple[Callable[[], Any], Callable[[], Outputs]]:
        encode = partial(architecture.encode, model)
        run = partial(_step, model, encode, audio, given) if training else partial(_forward, encode, audio, given)
        together = model is ours
        return run, partial(_gate_outputs, model, architecture, device, together=together, training=training)

    contenders = Contenders()
    contenders.add("fastssl", *contender(ours, lengths))
    contenders.add("original", *contender(original, lengths if architecture.takes_lengths else None))
    gemms = architecture.gemms(architecture.shape, workloads.samples_of(lengths_s), backward=training)
    return compare(
        f"{name}, {work}, {workload}",
        contenders,
        reference=partial(_gate_outputs, exact, architecture, device, together=False, training=training),
        tolerance=_TOLERANCES[work].get(dtype, 0.1),
        device=device,
        limits=lambda: limits.gemm_limits(gemms, dtype, device),
        audio_s=sum(lengths_s),
        budget_s=5,
        notes=[f"padded batch: {workloads.padding_factor(lengths_s):.2f} times the valid audio"],
    )


@torch.no_grad()
def _forward(encode: Callable[[Tensor, Tensor | None], Tensor], audio: Tensor, lengths: Tensor | None) -> None:
    encode(audio, lengths)


def _step(
    model: nn.Module, encode: Callable[[Tensor, Tensor | None], Tensor], audio: Tensor, lengths: Tensor | None
) -> None:
    model.train()
    model.zero_grad(set_to_none=True)
    with torch.autocast(audio.device.type, torch.bfloat16, enabled=audio.is_cuda):
        features = encode(audio, lengths)
    features.float().square().mean().backward()


def _gate_outputs(
    model: nn.Module, architecture: Architecture, device: torch.device, *, together: bool, training: bool
) -> Outputs:
    """Compute the features of two utterances and, for training, the gradients of a weighted sum of the features.

    With `together`, the utterances form one padded batch; otherwise each is encoded alone.
    """
    model.eval()
    dtype = next(model.parameters()).dtype
    batch = workloads.waveforms(_GATE_S, device)
    half = training and device.type == "cuda" and dtype != torch.float64
    with torch.set_grad_enabled(training), torch.autocast(device.type, torch.bfloat16, enabled=half):
        if together:
            audio, mask = workloads.padded(batch)
            padded = architecture.encode(model, audio.to(dtype), mask.sum(1))
            frames = workloads.frames(_GATE_S)
            features = [row[:length] for row, length in zip(padded, frames, strict=True)]
        else:
            features = [architecture.encode(model, x.t().to(dtype), None)[0] for x in batch.unpack()]
    outputs = {f"utterance {i}": x.detach() for i, x in enumerate(features)}
    if not training:
        return outputs
    weights = [torch.sin(torch.arange(x.numel(), device=device)).view_as(x) for x in features]
    torch.stack([(x * weight).sum() for x, weight in zip(features, weights, strict=True)]).sum().backward()
    # Leave out the keys' bias: the softmax is invariant to it, so its gradient is only rounding error.
    grads = {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return outputs | {n: grad for n, grad in grads.items() if not n.endswith("k_proj.bias")}


def pretraining(workload: str, device: torch.device) -> Row:
    """Compare Transformers' `Wav2Vec2ForPreTraining` with its accelerated copy, forward and backward with its loss.

    Masks and negatives are drawn before the timed part. On a GPU the step runs under bf16 autocast.
    """
    torch.manual_seed(0)
    library = importlib.import_module("transformers")
    original = library.Wav2Vec2ForPreTraining(library.Wav2Vec2Config(layerdrop=0.0)).to(device)
    ours = fastssl.accelerate(copy.deepcopy(original))
    lengths_s = _lengths_s("wav2vec2-base", workload, device)
    batch = workloads.waveforms(lengths_s, device)
    inputs = _pretraining_inputs(original, batch)

    def step(model: Any) -> None:
        model.train()
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(**inputs).loss
        loss.backward()

    def gradients(model: Any) -> Outputs:
        model.eval()
        model.quantizer.train()  # in evaluation mode it has no gradient
        torch.manual_seed(1)  # the same noise for both models
        loss = model(**gate_inputs | {"input_values": gate_inputs["input_values"].to(model.project_q.weight)}).loss
        loss.backward()
        grads = {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return {"loss": loss.detach()} | {n: grad for n, grad in grads.items() if not n.endswith("k_proj.bias")}

    gate_inputs = _pretraining_inputs(original, workloads.waveforms([1.0, 1.0], device))
    contenders = Contenders()
    contenders.add("fastssl", partial(step, ours), partial(gradients, ours))
    contenders.add("original", partial(step, original), partial(gradients, original))
    samples = workloads.samples_of(lengths_s)
    masked = inputs["mask_time_indices"].sum(1).tolist()
    gemms = limits.pretraining(recipe_model("wav2vec2-base"), samples, masked)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return compare(
        f"wav2vec2-base for pre-training, training, {workload}",
        contenders,
        reference=partial(gradients, rivals.in_double(original)),
        tolerance=1e-3,  # always in fp32: with logits in bf16 the quantiser would choose other codes
        device=device,
        limits=lambda: limits.gemm_limits(gemms, dtype, device),
        audio_s=sum(lengths_s),
        budget_s=5,
        notes=[f"padded batch: {workloads.padding_factor(lengths_s):.2f} times the valid audio"],
    )


def _pretraining_inputs(model: Any, batch: Packed) -> dict[str, Tensor]:
    audio, attention_mask = workloads.padded(batch)
    mask, negatives = rivals.transformers_masks(model, attention_mask)
    return {
        "input_values": audio,
        "attention_mask": attention_mask,
        "mask_time_indices": mask,
        "sampled_negative_indices": negatives,
    }


def _rows(sets: Sequence[str]) -> dict[str, Callable[[torch.device], Row]]:
    return {
        f"{name}-{work}-{workload}": partial(drop_in, name, work, workload)
        for name in ARCHITECTURES
        for work in ARCHITECTURES[name].works
        for workload in sets
    }


ROWS: Rows = _rows(("read-speech", "equal")) | {
    f"wav2vec2-pretraining-{workload}": partial(pretraining, workload) for workload in ("read-speech", "equal")
}
_PROMISED = [Target(row, row, 1.0, "original") for row in ROWS]

if __name__ == "__main__":
    main(ROWS, __doc__, targets={"cpu": _PROMISED, "cuda": _PROMISED})

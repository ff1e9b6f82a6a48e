"""Measure training steps: `python -m benchmarks.bench_train_step --device cpu|cuda [--only ROW] [--output JSON]`.

A pre-training step is everything from a batch in memory to updated weights: masks, negatives, forward, losses,
backward, clipping, AdamW. Layer drop is off, so that every step does the same work; dropout is on, with the recipe's
probabilities. The features penalty, which Transformers does not have, has weight 0, and the front end's gradient is not
scaled.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import limits, rivals, workloads
from benchmarks.harness import Contenders, Entry, Outputs, Row, compare
from benchmarks.recipes import recipe_model
from benchmarks.report import Rows, main
from fastssl.models.encoder import Encoder
from fastssl.models.wav2vec2 import Wav2Vec2Config, Wav2Vec2ForPreTraining
from fastssl.nn.masking import sample_negatives, sample_span_mask
from fastssl.nn.random import draw_keys, gumbel, utterance_keys
from fastssl.packing import Packed

_TEMPERATURE = 2.0
_GATE_S = [1.0, 1.0]  # seconds; equal, because Transformers' group norm includes padding
_TOLERANCE, _BF16_TOLERANCE = 1e-3, 0.1


def pretraining(title: str, config: Wav2Vec2Config, lengths_s: Sequence[float], device: torch.device) -> Row:
    """Compare whole wav2vec 2.0 pre-training steps with Transformers', in fp32 on the CPU, bf16 autocast on a GPU.

    The gate uses fp32 on every device: rounding the logits to bf16 would make the quantiser choose other codes.

    Args:
        title: Title of the row.
        config: Config of the model.
        lengths_s: Lengths of the utterances in seconds.
        device: Device to measure on.
    """
    torch.manual_seed(0)
    model = Wav2Vec2ForPreTraining(config).to(device).train()
    theirs = rivals.transformers_pretraining(model).train()
    theirs.set_gumbel_temperature(_TEMPERATURE)
    batch = workloads.waveforms(lengths_s, device)
    audio, attention_mask = workloads.padded(batch)
    generator = torch.Generator(device).manual_seed(0)

    def our_loss() -> Tensor:
        keys = draw_keys(len(lengths_s), generator=generator, device=device)
        output = model(batch, keys=keys, gumbel_temperature=_TEMPERATURE)
        loss: Tensor = output.loss / output.masked_frames
        return loss

    def their_loss(forward: Any) -> Tensor:
        mask, negatives = rivals.transformers_masks(theirs, attention_mask)
        output = forward(
            audio, attention_mask=attention_mask, mask_time_indices=mask, sampled_negative_indices=negatives
        )
        loss: Tensor = output.loss / mask.sum()
        return loss

    inputs = _GateInputs(model, device)
    check_theirs = partial(_their_gradients, theirs, inputs)

    def transformers(forward: Any) -> Entry:
        return Step(theirs, partial(their_loss, forward), device), check_theirs

    contenders = Contenders()
    contenders.add("fastssl", Step(model, our_loss, device), partial(_our_gradients, model, inputs))
    contenders.add("Transformers, eager", *transformers(theirs))
    rivals.add_compiled(contenders, device, lambda: compiling(*transformers(rivals.compiled(theirs))), quick=False)
    samples = workloads.samples_of(lengths_s)
    masked = [round(0.49 * frames) for frames in workloads.frames(lengths_s)]
    gemms = limits.pretraining(config, samples, masked)
    return compare(
        title,
        contenders,
        reference=lambda: _their_gradients(rivals.in_double(theirs), inputs),
        tolerance=_TOLERANCE,
        device=device,
        limits=lambda: limits.gemm_limits(gemms, dtype_of(device), device),
        audio_s=sum(lengths_s),
        notes=[f"padded batch: {workloads.padding_factor(lengths_s):.2f} times the valid audio"],
    )


def encoder_training(device: torch.device) -> Row:
    """Compare the encoder's forward and backward passes with dropout 0.1, without masks, losses or optimiser."""
    torch.manual_seed(0)
    lengths_s = workloads.read_speech(4)
    config = replace(recipe_model("wav2vec2-base"), layerdrop=0.0, feature_grad_mult=1.0)
    encoder = Encoder(config).to(device).train()
    theirs = rivals.transformers_encoder(encoder).train()
    batch = workloads.waveforms(lengths_s, device)
    audio, mask = workloads.padded(batch)
    lengths = batch.layout.cu_seqlens.diff()

    def step(model: nn.Module, features: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            model.zero_grad(set_to_none=True)
            with autocast(device):
                out = features()
            out.float().square().mean().backward()

        return run

    def transformers(forward: Any) -> Entry:
        run = step(theirs, lambda: forward(audio, attention_mask=mask).last_hidden_state)
        alone = _each_alone(lambda x: theirs(x).last_hidden_state)
        return run, partial(_encoder_gradients, theirs, alone, device)

    def torchaudio() -> Entry:
        model = rivals.torchaudio_encoder(encoder).train()
        run = step(model, lambda: model.extract_features(audio, lengths)[0][-1])
        alone = _each_alone(lambda x: model.extract_features(x)[0][-1])
        return run, partial(_encoder_gradients, model, alone, device, rivals.from_torchaudio)

    def fastssl() -> Entry:
        run = step(encoder, lambda: encoder(batch).features.values)
        together = lambda xs: encoder(Packed.pack(xs)).features.unpack()  # noqa: E731
        return run, partial(_encoder_gradients, encoder, together, device)

    contenders = Contenders()
    contenders.add("fastssl", *fastssl())
    contenders.add("Transformers, eager", *transformers(theirs))
    contenders.invite("torchaudio", torchaudio)
    rivals.add_compiled(contenders, device, lambda: compiling(*transformers(rivals.compiled(theirs))), quick=False)
    in_double = rivals.in_double(theirs)
    alone = _each_alone(lambda x: in_double(x.double()).last_hidden_state)
    gemms = limits.encoder(config, workloads.samples_of(lengths_s), backward=True)
    return compare(
        "encoder training step, wav2vec 2.0 base, dropout 0.1, read-speech batch of 4",
        contenders,
        reference=partial(_encoder_gradients, in_double, alone, device),
        tolerance=_TOLERANCE if device.type == "cpu" else _BF16_TOLERANCE,
        device=device,
        limits=lambda: limits.gemm_limits(gemms, dtype_of(device), device),
        audio_s=sum(lengths_s),
        notes=[f"padded batch: {workloads.padding_factor(lengths_s):.2f} times the valid audio"],
    )


class Step:
    """One update: loss, backward, clipping, AdamW. The optimiser's moments are allocated before the first step."""

    def __init__(self, model: nn.Module, loss: Callable[[], Tensor], device: torch.device) -> None:
        self.model, self.loss, self.device = model, loss, device
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def __call__(self) -> None:
        with autocast(self.device):
            loss = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 10.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class _GateInputs:
    """Inputs of the gate: equal lengths, and the same mask, negatives and Gumbel noise for both libraries."""

    def __init__(self, model: Wav2Vec2ForPreTraining, device: torch.device) -> None:
        config = model.config
        self.batch = workloads.waveforms(_GATE_S, device)
        layout = model.wav2vec2.extract_features(self.batch).layout
        keys = utterance_keys(0, 0, torch.arange(len(_GATE_S), device=device))
        self.mask = sample_span_mask(layout, keys, probability=0.65, length=10, min_spans=2)
        self.negatives = sample_negatives(self.mask, layout, keys, count=config.num_negatives)
        codes = config.num_codevector_groups * config.num_codevectors_per_group
        counters = torch.arange(layout.total * codes, device=device).view(-1, codes)
        self.noise = gumbel(keys[layout.sequence_ids].unsqueeze(1), counters, stream=0)
        self.rows = self.mask.nonzero().squeeze(1)


def _our_gradients(model: Wav2Vec2ForPreTraining, inputs: _GateInputs) -> Outputs:
    model.eval()
    output = model.compare(
        model.wav2vec2.extract_features(inputs.batch),
        mask=inputs.mask,
        negatives=inputs.negatives,
        gumbel_noise=inputs.noise[inputs.rows],
        gumbel_temperature=_TEMPERATURE,
    )
    return {"loss": output.loss.detach()} | gradients(model, output.loss)


def _their_gradients(model: Any, inputs: _GateInputs) -> Outputs:
    model.eval()
    model.quantizer.train()  # in evaluation mode it has no gradient
    batch, frames = len(_GATE_S), len(inputs.mask) // len(_GATE_S)
    negatives = inputs.rows.new_zeros(len(inputs.mask), inputs.negatives.shape[1])
    negatives[inputs.rows] = inputs.rows[inputs.negatives]
    dtype = next(model.parameters()).dtype
    with mock.patch.object(F, "gumbel_softmax", rivals.gumbel_softmax_with(inputs.noise)):
        output = model(
            inputs.batch.values.view(batch, -1).to(dtype),
            mask_time_indices=inputs.mask.view(batch, frames),
            sampled_negative_indices=negatives.view(batch, frames, -1),
        )
    return {"loss": output.loss.detach()} | gradients(model, output.loss)


def _each_alone(encode: Callable[[Tensor], Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
    """Encode each utterance alone: the rivals' group norm includes padding, which makes padded batches inexact."""
    return lambda waveforms: [encode(x.t())[0] for x in waveforms]


def _encoder_gradients(
    model: nn.Module,
    encode: Callable[[list[Tensor]], list[Tensor]],
    device: torch.device,
    rename: Callable[[str], str] = lambda name: name,
) -> Outputs:
    """Compute the features of two utterances of different lengths, and the gradients of the features' weighted sum."""
    model.eval()
    with autocast(device):
        features = encode(workloads.waveforms([1.0, 0.7], device).unpack())
    weights = [torch.sin(torch.arange(x.numel(), device=device)).view_as(x) for x in features]
    loss = torch.stack([(x * weight).sum() for x, weight in zip(features, weights, strict=True)]).sum()
    outputs = {f"utterance {i}": x.detach() for i, x in enumerate(features)}
    return outputs | gradients(model, loss, rename)


def gradients(model: nn.Module, loss: Tensor, rename: Callable[[str], str] = lambda name: name) -> dict[str, Tensor]:
    """Compute the gradients of all parameters, and leave the model in training mode without gradients.

    The keys' bias is left out: the softmax is invariant to it, so its gradient is only rounding error.

    Args:
        model: Model that the loss depends on.
        loss: Loss to differentiate, a () tensor.
        rename: Translates a parameter's name into the one that fastssl uses.

    Returns:
        Gradients by fastssl's parameter names.
    """
    loss.backward()
    grads = {f"gradient of {rename(name)}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    model.train()
    return {name: grad for name, grad in grads.items() if not name.endswith("k_proj.bias")}


def compiling(run: Callable[[], Any], check: Callable[[], Outputs]) -> Entry:
    """Make the gate also compile a contender: one more call follows its check, and is neither timed nor compared.

    That call may take minutes, and it changes the weights.
    """

    def check_and_compile() -> Outputs:
        outputs = check()
        run()
        return outputs

    return run, check_and_compile


def autocast(device: torch.device) -> torch.autocast:
    """Return a context manager: bf16 autocast on a GPU, no effect on the CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def dtype_of(device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products under `autocast`: bf16 on a GPU, fp32 on the CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _equal_work(preset: str) -> Wav2Vec2Config:
    """Return a recipe's config without layer drop, features penalty or front-end gradient scaling."""
    config: Wav2Vec2Config = recipe_model(preset)
    return replace(config, layerdrop=0.0, features_penalty_weight=0.0, feature_grad_mult=1.0)


def pretrain_base(device: torch.device) -> Row:
    """Measure the base model on a batch of 4 utterances on the CPU, or of 800 s of audio on a GPU."""
    utterances = 4 if device.type == "cpu" else workloads.utterances_for(800)
    title = f"pre-training step, wav2vec 2.0 base, read-speech batch of {utterances}"
    return pretraining(title, _equal_work("wav2vec2-base"), workloads.read_speech(utterances), device)


ROWS: Rows = {
    "pretrain-base": pretrain_base,
    "encoder-train": encoder_training,
    "pretrain-tiny": partial(
        pretraining, "wav2vec2-tiny update, 12 crops of 4 s", _equal_work("wav2vec2-tiny"), workloads.CROPS
    ),
    "pretrain-uneven": partial(
        pretraining,
        "pre-training step, wav2vec 2.0 base, 3, 16, 7 and 12 s",
        _equal_work("wav2vec2-base"),
        workloads.FOUR_UNEVEN,
    ),
}

if __name__ == "__main__":
    main(ROWS, __doc__)

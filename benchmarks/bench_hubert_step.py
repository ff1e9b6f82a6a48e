"""Compare HuBERT pre-training steps with torchaudio's: `python -m benchmarks.bench_hubert_step --device cpu|cuda`.

A step is everything from a batch in memory to updated weights: masks, forward, loss on masked frames, backward,
clipping, AdamW. Layer drop and the features penalty are off, and the front end's gradient is not scaled. Dropout is on,
with the recipe's probabilities.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import limits, rivals, workloads
from benchmarks.bench_train_step import Step, compiling, dtype_of, gradients
from benchmarks.harness import Contenders, Entry, Outputs, Row, compare
from benchmarks.recipes import recipe_model
from benchmarks.report import Rows, main
from fastssl.models.hubert import HubertConfig, HubertForPreTraining
from fastssl.nn.masking import sample_span_mask
from fastssl.nn.random import draw_keys, utterance_keys

_GATE_S = [1.0, 1.0]  # seconds; equal, because torchaudio's group norm includes padding
_TOLERANCE = 1e-3
_EQUAL_CROPS = "torchaudio, equal crops, torch.compile"


def pretraining(title: str, config: HubertConfig, lengths_s: Sequence[float], device: torch.device) -> Row:
    """Compare whole HuBERT pre-training steps, in fp32 on the CPU and under bf16 autocast on a GPU.

    Args:
        title: Title of the row.
        config: Config of the model.
        lengths_s: Lengths of the utterances in seconds.
        device: Device to measure on.
    """
    torch.manual_seed(0)
    model = HubertForPreTraining(config).to(device).train()
    batch = workloads.waveforms(lengths_s, device)
    audio, _ = workloads.padded(batch)
    lengths = batch.layout.cu_seqlens.diff()
    frames = workloads.frames(lengths_s)
    classes = torch.randint(config.num_clusters, (len(frames), max(frames)), device=device)
    packed_classes = torch.cat([row[:count] for row, count in zip(classes, frames, strict=True)])
    generator = torch.Generator(device).manual_seed(0)

    def our_loss() -> Tensor:
        keys = draw_keys(len(lengths_s), generator=generator, device=device)
        output = model(batch, keys=keys, labels=packed_classes)
        loss: Tensor = output.loss / output.masked_frames
        return loss

    gate = _Gate(model, device)

    def torchaudio() -> Entry:
        theirs = rivals.torchaudio_hubert(model).train()

        def loss() -> Tensor:
            logits, _, _ = theirs(audio, classes, lengths)
            return F.cross_entropy(logits.float(), logits.new_zeros(len(logits), dtype=torch.long))

        return Step(theirs, loss, device), partial(gate.theirs, theirs)

    def equal_crops() -> Entry:
        theirs = rivals.torchaudio_hubert_compiled(model).train()
        crops, _ = workloads.padded(workloads.waveforms(_equal_crops(lengths_s), device))
        crop_classes = torch.randint(
            config.num_clusters, (len(crops), workloads.frames(_equal_crops(lengths_s))[0]), device=device
        )

        def loss() -> Tensor:
            logits, _, _ = theirs(crops, crop_classes)
            return F.cross_entropy(logits.float(), logits.new_zeros(len(logits), dtype=torch.long))

        return compiling(Step(theirs, loss, device), partial(gate.theirs, theirs))

    contenders = Contenders()
    contenders.add("fastssl", Step(model, our_loss, device), partial(gate.ours, model))
    contenders.invite("torchaudio", torchaudio)
    if rivals.compiles(device):
        contenders.invite(_EQUAL_CROPS, equal_crops)
    else:
        contenders.skipped[_EQUAL_CROPS] = rivals.NOT_COMPILED
    gemms = limits.encoder(config, workloads.samples_of(lengths_s), backward=True)
    masked = round(0.56 * sum(frames))  # share of frames masked when spans of 10 start at 8 % of them
    gemms += limits.linear(masked, config.hidden_size, config.final_dim, backward=True)
    gemms += limits.linear(masked, config.final_dim, config.num_clusters, backward=True)
    return compare(
        title,
        contenders,
        reference=lambda: gate.theirs(rivals.in_double(rivals.torchaudio_hubert(model))),
        tolerance=_TOLERANCE,
        device=device,
        limits=lambda: limits.gemm_limits(gemms, dtype_of(device), device),
        audio_s=sum(lengths_s),
        notes=[
            f"padded batch: {workloads.padding_factor(lengths_s):.2f} times the valid audio",
            f"equal crops, as minimal-hubert trains: {len(lengths_s)} of {_equal_crops(lengths_s)[0]:.2f} s",
        ],
    )


def _equal_crops(lengths_s: Sequence[float]) -> list[float]:
    """Return lengths of as many crops, all equal, that add up to as many seconds."""
    return [sum(lengths_s) / len(lengths_s)] * len(lengths_s)


class _Gate:
    """Inputs of the gate: utterances of equal length, with the same classes and mask for both libraries."""

    def __init__(self, model: HubertForPreTraining, device: torch.device) -> None:
        self.batch = workloads.waveforms(_GATE_S, device)
        layout = model.hubert.extract_features(self.batch).layout
        keys = utterance_keys(0, 0, torch.arange(len(_GATE_S), device=device))
        self.mask = sample_span_mask(layout, keys, probability=0.8, length=10, min_spans=2)
        self.classes = torch.arange(layout.total, device=device) * 7 % model.config.num_clusters

    def ours(self, model: HubertForPreTraining) -> Outputs:
        model.eval()
        output = model.predict(model.hubert.extract_features(self.batch), mask=self.mask, labels=self.classes)
        return {"loss": output.loss.detach()} | gradients(model, output.loss)

    def theirs(self, model: Any) -> Outputs:
        model.eval()
        rows = len(_GATE_S)
        mask = self.mask.view(rows, -1)

        def masked(x: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
            return torch.where(mask.unsqueeze(2), model.mask_generator.mask_embedding, x), mask

        audio = self.batch.values.view(rows, -1).to(next(model.parameters()).dtype)
        with mock.patch.object(model.mask_generator, "forward", masked):
            logits, _, _ = model(audio, self.classes.view(rows, -1))
        loss = F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long), reduction="sum")
        return {"loss": loss.detach()} | gradients(model, loss, rivals.from_torchaudio_hubert)


def _equal_work(preset: str, **changes: Any) -> HubertConfig:
    """Return a recipe's config without layer drop, features penalty or front-end gradient scaling."""
    config: HubertConfig = recipe_model(preset)
    return replace(config, layerdrop=0.0, features_penalty_weight=0.0, feature_grad_mult=1.0, **changes)


def hubert_base(device: torch.device) -> Row:
    """Measure the base model as in HuBERT's second iteration, with 500 classes.

    The batch has 4 utterances on the CPU and 800 s of audio on a GPU.
    """
    utterances = 4 if device.type == "cpu" else workloads.utterances_for(800)
    title = f"pre-training step, HuBERT base, 500 classes, read-speech batch of {utterances}"
    return pretraining(title, _equal_work("hubert-base", num_clusters=500), workloads.read_speech(utterances), device)


ROWS: Rows = {
    "hubert-base": hubert_base,
    # minimal-hubert takes at most 175 s of audio per GPU and update. It publishes 1944 s of audio per second and H100.
    "hubert-base-175s": partial(
        pretraining,
        "pre-training step, HuBERT base, 500 classes, 11 crops of 15.6 s",
        _equal_work("hubert-base", num_clusters=500),
        workloads.equal(11),
    ),
    "hubert-tiny": partial(
        pretraining, "hubert-tiny update, 12 crops of 4 s", _equal_work("hubert-tiny"), workloads.CROPS
    ),
}

if __name__ == "__main__":
    main(ROWS, __doc__)

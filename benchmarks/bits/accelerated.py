"""Record outputs and gradients of Transformers' and torchaudio's models after `accelerate`.

Run it as `python -m benchmarks.bits.accelerated RESULTS MATCH`. RESULTS is the file to write; only calls whose name
contains MATCH are made.
"""

import contextlib
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastssl
from benchmarks.bits.encoders import disturb, evaluate, waveforms
from benchmarks.bits.record import Record, drawing, with_gradients

TINY: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": [32] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.1,
    "feat_proj_dropout": 0.1,
    "final_dropout": 0.1,
    "feat_quantizer_dropout": 0.1,
    "layerdrop": 0.0,
    "mask_time_length": 3,
    "num_codevectors_per_group": 20,
    "codevector_dim": 16,
    "proj_codevector_dim": 24,
    "num_negatives": 7,
    "vocab_size": 11,
    "num_labels": 5,
    "classifier_proj_size": 20,
}
LARGE: dict[str, Any] = {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True}
BUCKETS: dict[str, Any] = {"num_buckets": 20, "max_bucket_distance": 25}
ADAPTER: dict[str, Any] = {"add_adapter": True, "output_hidden_size": 40, "num_adapter_layers": 2}
#: For each variant, the family of Transformers' classes and the changes to TINY.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "wav2vec2 base": ("Wav2Vec2", {}),
    "wav2vec2 large": ("Wav2Vec2", LARGE),
    "wav2vec2 base, layer norm": ("Wav2Vec2", {"feat_extract_norm": "layer", "conv_bias": True}),
    "wav2vec2 base, adapter": ("Wav2Vec2", ADAPTER),
    "wav2vec2 large, adapters": ("Wav2Vec2", LARGE | ADAPTER | {"adapter_attn_dim": 8, "output_hidden_size": 48}),
    "hubert base": ("Hubert", {}),
    "hubert large": ("Hubert", LARGE),
    "hubert without projection norm": ("Hubert", {"feat_proj_layer_norm": False}),
    "wavlm base": ("WavLM", BUCKETS),
    "wavlm large": ("WavLM", LARGE | BUCKETS),
    "data2vec": ("Data2VecAudio", {"num_conv_pos_embeddings": 3, "conv_pos_kernel_size": 7}),
    "data2vec, bias, even kernel": (
        "Data2VecAudio",
        {"num_conv_pos_embeddings": 2, "conv_pos_kernel_size": 8, "conv_bias": True},
    ),
    "unispeech base": ("UniSpeech", {}),
    "unispeech large": ("UniSpeech", LARGE),
    "unispeech-sat base": ("UniSpeechSat", {}),
    "unispeech-sat large": ("UniSpeechSat", LARGE),
}
HEADS = ("ForCTC", "ForSequenceClassification")
TORCHAUDIO_TINY: dict[str, Any] = {
    "extractor_mode": "group_norm",
    "extractor_conv_layer_config": [(32, 10, 5)] + [(32, 3, 2)] * 4 + [(32, 2, 2)] * 2,
    "extractor_conv_bias": False,
    "encoder_embed_dim": 48,
    "encoder_projection_dropout": 0.1,
    "encoder_pos_conv_kernel": 16,
    "encoder_pos_conv_groups": 4,
    "encoder_num_layers": 3,
    "encoder_num_heads": 4,
    "encoder_attention_dropout": 0.1,
    "encoder_ff_interm_features": 64,
    "encoder_ff_interm_dropout": 0.1,
    "encoder_dropout": 0.1,
    "encoder_layer_norm_first": False,
    "encoder_layer_drop": 0.0,
    "aux_num_out": None,
}
TORCHAUDIO_LARGE = {"extractor_mode": "layer_norm", "extractor_conv_bias": True, "encoder_layer_norm_first": True}
TORCHAUDIO_WAVLM = {"encoder_num_buckets": 20, "encoder_max_distance": 25}
TORCHAUDIO: dict[str, dict[str, Any]] = {
    "wav2vec2 base": {},
    "wav2vec2 large": TORCHAUDIO_LARGE,
    "wav2vec2 base, odd kernel": {"extractor_mode": "layer_norm", "encoder_pos_conv_kernel": 15},
    "wav2vec2 large, group norm": TORCHAUDIO_LARGE | {"extractor_mode": "group_norm"},
    "wav2vec2 base, logits": {"aux_num_out": 7},
    "wavlm base": TORCHAUDIO_WAVLM,
    "wavlm large": TORCHAUDIO_WAVLM | TORCHAUDIO_LARGE,
}
BATCHES = {"one": [6000], "equal": [5000, 5000], "mixed": [5000, 900, 3300], "extreme": [9000, 400, 719, 720]}
TRAINED_ON = ("mixed", "extreme")


def padded(lengths: list[int]) -> tuple[Tensor, Tensor]:  # (B, T), (B, T)
    """Return noise with these numbers of samples, padded with zeros at the end, and an int64 attention mask."""
    generator = torch.Generator().manual_seed(len(lengths))
    samples = torch.randn(len(lengths), max(lengths), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()
    return samples * mask, mask


def transformers_model(variant: str, head: str = "Model", **options: Any) -> Any:
    """Return a model of Transformers in evaluation mode, not yet accelerated."""
    import transformers

    family, settings = VARIANTS[variant]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**TINY | settings | options)
    model = getattr(transformers, f"{family}{head}")(config).eval()
    disturb(model)
    return model


def torchaudio_model(variant: str, **options: Any) -> Any:
    """Return a model of torchaudio in evaluation mode, not yet accelerated."""
    from torchaudio import models

    torch.manual_seed(0)
    factory = models.wavlm_model if variant.startswith("wavlm") else models.wav2vec2_model
    model = factory(**(TORCHAUDIO_TINY | TORCHAUDIO[variant] | options)).eval()
    disturb(model)
    return model


def without_gradient(call: Callable[[], Any], *, autocast: bool = False) -> Any:
    """Return the result of a call without gradients, optionally under bf16 autocast."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        return call()


def trained(model: nn.Module, call: Callable[[], Any], *, autocast: bool = False) -> dict[str, Any]:
    """Return outputs and gradients of a training step; dropout, masks and layer drop come from a fixed seed."""
    model.train()
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002 - Transformers draws its masks from the global generator
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        return with_gradients(call, dict(model.named_parameters()))


def compressor(kind: Any, factor: int | None = None) -> fastssl.nn.SequenceCompressor:
    """Return a sequence compressor for frames of width 48, always with the same weights."""
    torch.manual_seed(3)
    made = fastssl.nn.SequenceCompressor(48, kind=kind, factor=factor)
    disturb(made)
    return made


def transformers_results(record: Record) -> None:
    """Add the results of all variants of Transformers' models to a record."""

    def forward(model: Any, lengths: list[int], **more: Any) -> Any:
        samples, mask = padded(lengths)
        samples = samples.to(next(model.parameters()).dtype)
        return dict(model(samples, attention_mask=mask, output_hidden_states=True, **more))

    for variant in VARIANTS:
        for norm in ("valid", "padded"):
            name = f"Transformers {variant}/{norm} norm"
            norms: Any = {"norm": norm}
            for words, lengths in BATCHES.items():
                model = fastssl.accelerate(transformers_model(variant), **norms)
                call = partial(forward, model, lengths)
                record.attempt(f"{name}/evaluation/{words}", partial(without_gradient, call))
                if words in TRAINED_ON:
                    record.attempt(f"{name}/training/{words}", partial(trained, model, call))
        name = f"Transformers {variant}/more"
        mixed = BATCHES["mixed"]
        model = fastssl.accelerate(transformers_model(variant, layerdrop=0.5))
        record.attempt(f"{name}/layer drop", partial(trained, model, partial(forward, model, mixed)))
        model = fastssl.accelerate(transformers_model(variant))
        call = partial(forward, model, mixed)
        record.attempt(f"{name}/evaluation, autocast", partial(without_gradient, call, autocast=True))
        record.attempt(f"{name}/training, autocast", partial(trained, model, call, autocast=True))
        model = fastssl.accelerate(transformers_model(variant).bfloat16())
        record.attempt(f"{name}/training, bf16", partial(trained, model, partial(forward, model, mixed)))
        for kind, factor in (("average", 2), ("integrate-and-fire", None)):
            with_fewer = fastssl.accelerate(transformers_model(variant), compressor=compressor(kind, factor))
            call = partial(forward, with_fewer, mixed)
            record.attempt(f"{name}/evaluation, {kind}", partial(without_gradient, call))
            record.attempt(f"{name}/training, {kind}", partial(trained, with_fewer, call))
        for head in HEADS:
            if head == "ForSequenceClassification" and "adapter" in variant:
                continue  # Transformers has no such model
            labels = torch.tensor([[1, 2], [3, -100], [4, 5]] if head == "ForCTC" else [1, 2, 3])
            model = fastssl.accelerate(transformers_model(variant, head))
            record.attempt(f"{name}/{head}", partial(trained, model, partial(forward, model, mixed, labels=labels)))
        if "adapter" not in variant:
            record.attempt(f"{name}/load_encoder", partial(opened, transformers_model(variant)))
    for variant in ("wav2vec2 base", "wav2vec2 large"):
        model = fastssl.accelerate(transformers_model(variant, "ForPreTraining"))
        record.attempt(f"Transformers {variant}/more/ForPreTraining", partial(pre_trained, model))


def pre_trained(model: Any) -> dict[str, Any]:
    """Return outputs and gradients of a wav2vec 2.0 pre-training step, called as in Transformers' example."""
    samples, mask = padded(BATCHES["mixed"])
    frames = [(length - 400) // 320 + 1 for length in BATCHES["mixed"]]
    masked = torch.zeros(3, max(frames), dtype=torch.bool)
    negatives = torch.zeros(3, max(frames), TINY["num_negatives"], dtype=torch.long)
    generator = torch.Generator().manual_seed(5)
    for row, count in enumerate(frames):
        masked[row, : count // 2 + 1] = True
        draws = torch.randint(0, count // 2 + 1, negatives[row].shape, generator=generator)
        negatives[row] = draws + row * max(frames)
    return trained(
        model,
        lambda: dict(model(samples, attention_mask=mask, mask_time_indices=masked, sampled_negative_indices=negatives)),
    )


def opened(model: Any) -> dict[str, Any]:
    """Return outputs and weights of the encoder that `load_encoder` makes from a model."""
    if hasattr(model, "config"):  # not a model of torchaudio, which says itself whether it normalises
        model.config.do_normalize = False  # older trees left this to the caller
    encoder = fastssl.load_encoder(model)
    return {"out": evaluate(encoder, waveforms((5000, 900, 3300))), "weights": encoder.state_dict()}


def torchaudio_results(record: Record) -> None:
    """Add the results of all variants of torchaudio's models to a record."""

    def forward(model: Any, lengths: list[int], **_: Any) -> Any:
        samples, _mask = padded(lengths)
        return model(samples.to(next(model.parameters()).dtype), torch.tensor(lengths))

    for variant in TORCHAUDIO:
        for norm in ("valid", "padded"):
            name = f"torchaudio {variant}/{norm} norm"
            norms: Any = {"norm": norm}
            for words, lengths in BATCHES.items():
                model = fastssl.accelerate(torchaudio_model(variant), **norms)
                call = partial(forward, model, lengths)
                layers = partial(model.extract_features, padded(lengths)[0], torch.tensor(lengths))
                record.attempt(f"{name}/evaluation/{words}", partial(without_gradient, call))
                record.attempt(f"{name}/layers/{words}", partial(without_gradient, layers))
                if words in TRAINED_ON:
                    record.attempt(f"{name}/training/{words}", partial(trained, model, call))
        name = f"torchaudio {variant}/more"
        mixed = BATCHES["mixed"]
        model = fastssl.accelerate(torchaudio_model(variant, encoder_layer_drop=0.5))
        record.attempt(f"{name}/layer drop", partial(trained, model, partial(forward, model, mixed)))
        model = fastssl.accelerate(torchaudio_model(variant))
        call = partial(forward, model, mixed)
        record.attempt(f"{name}/training, autocast", partial(trained, model, call, autocast=True))
        model = fastssl.accelerate(torchaudio_model(variant).bfloat16())
        record.attempt(f"{name}/training, bf16", partial(trained, model, partial(forward, model, mixed)))
        record.attempt(f"{name}/load_encoder", partial(opened, torchaudio_model(variant)))


def main() -> None:
    torch.set_num_threads(1)  # two trees run at the same time
    record = Record(sys.argv[2])
    transformers_results(record)
    torchaudio_results(record)
    record.save(sys.argv[1])


if __name__ == "__main__":
    with drawing():
        main()

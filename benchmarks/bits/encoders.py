"""Record outputs and gradients of our own encoders: `python -m benchmarks.bits.encoders RESULTS MATCH`."""

import contextlib
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastssl
from benchmarks.bits.record import Record, drawing, with_gradients
from fastssl import ConformerConfig, EncoderConfig, Packed

TINY: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": (32,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "do_normalize": False,  # older trees left this to the caller
}
LARGE: dict[str, Any] = {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True}
WAVLM: dict[str, Any] = {"model_type": "wavlm", "num_buckets": 20, "max_bucket_distance": 25}
FIRE: dict[str, Any] = {"compressor": "integrate-and-fire"}
VARIANTS: dict[str, dict[str, Any]] = {
    "wav2vec2 base": {},
    "wav2vec2 large": LARGE,
    "wav2vec2 layer norm, scaled gradient": {"feat_extract_norm": "layer", "feature_grad_mult": 0.1},
    "hubert without projection norm": {"model_type": "hubert", "feat_proj_layer_norm": False},
    "wavlm base": WAVLM,
    "wavlm large": WAVLM | LARGE,
    "data2vec": {
        "model_type": "data2vec-audio",
        "feat_extract_norm": "layer",
        "num_conv_pos_embeddings": 3,
        "num_conv_pos_embedding_groups": 16,
        "conv_pos_kernel_size": 7,
    },
    "unispeech": {"model_type": "unispeech"},
    "unispeech-sat large": {"model_type": "unispeech-sat"} | LARGE,
    "frozen front end": {"feature_grad_mult": 0.0},
    "fire": FIRE,
    "fire, wavlm large": FIRE | WAVLM | LARGE,
    "average": {"compressor": "average", "compressor_factor": 2},
    "strided": {"compressor": "strided", "compressor_factor": 3},
}
CONFORMER: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": (24, 24),
    "conv_depthwise_kernel_size": 7,
}
CONFORMERS: dict[str, dict[str, Any]] = {
    "conformer": {},
    "conformer, fire": FIRE,
    "conformer, average": {"compressor": "average", "compressor_factor": 2},
}
WITH_DROPOUT: dict[str, Any] = {"hidden_dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1}
BATCHES = {"one": (6000,), "mixed": (5000, 1900, 3300), "extreme": (9000, 0, 400, 2719, 1)}


def disturb(model: nn.Module) -> None:
    """Add noise to every parameter; a parameter with its initial value (0 or 1) would hide errors in its use."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter))


def waveforms(lengths: tuple[int, ...]) -> Packed:
    """Return packed Gaussian noise, (N, 1) fp32, with these numbers of samples; always the same noise."""
    generator = torch.Generator().manual_seed(len(lengths))
    return Packed.pack([torch.randn(length, 1, generator=generator) for length in lengths])


def make(name: str, **changes: Any) -> Any:
    """Return an encoder in evaluation mode.

    Args:
        name: Key of `VARIANTS` or `CONFORMERS`.
        changes: Other fields of its config to set.
    """
    torch.manual_seed(0)
    if name in CONFORMERS:
        encoder: Any = fastssl.ConformerEncoder(ConformerConfig(**CONFORMER | CONFORMERS[name] | changes))
    else:
        encoder = fastssl.Encoder(EncoderConfig(**TINY | VARIANTS[name] | changes))
    disturb(encoder)
    return encoder.eval()


def call(encoder: Any, batch: Packed, **rate: Any) -> dict[str, Any]:
    """Run an encoder, and return its outputs by name."""
    out = encoder(batch, **rate)
    return {"features": out.features, "hidden_states": out.hidden_states, "compressed": out.compressed}


def evaluate(encoder: Any, batch: Packed, **rate: Any) -> dict[str, Any]:
    """Run an encoder without gradients, and return its outputs by name."""
    with torch.no_grad():
        return call(encoder, batch, **rate)


def train(encoder: Any, batch: Packed, *, autocast: bool = False, **rate: Any) -> dict[str, Any]:
    """Return outputs and gradients of a training step under a fixed seed, including the gradient of the waveforms."""
    torch.manual_seed(7)
    encoder.train()
    heard = Packed(batch.values.clone().requires_grad_(), batch.layout)
    leaves: dict[str, Tensor] = {"waveforms": heard.values, **dict(encoder.named_parameters())}
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        return with_gradients(lambda: call(encoder, heard, **rate), leaves)


def saved(encoder: Any) -> dict[str, Any]:
    """Save an encoder and load it again; return the outputs and weights of the loaded one, and the saved config."""
    with tempfile.TemporaryDirectory() as folder:
        encoder.save_pretrained(folder)
        again = fastssl.load_encoder(folder)
        config = json.loads((Path(folder) / "config.json").read_text())
        return {"out": evaluate(again, waveforms(BATCHES["mixed"])), "weights": again.state_dict(), "config": config}


def main() -> None:
    torch.set_num_threads(1)  # two trees run at the same time
    record = Record(sys.argv[2])
    for name in (*VARIANTS, *CONFORMERS):
        record.attempt(f"{name}/initial weights", make(name).state_dict)
        rates: dict[str, dict[str, Any]] = {"": {}}
        if "fire" in name:
            rates |= {", rate 0.4": {"rate": 0.4}, ", 60 ms": {"frame_period_ms": 60.0}}
        for words, lengths in BATCHES.items():
            batch = waveforms(lengths)
            for suffix, rate in rates.items():
                record.attempt(f"{name}/evaluation/{words}{suffix}", partial(evaluate, make(name), batch, **rate))
        for suffix, rate in rates.items():
            encoder = make(name, **WITH_DROPOUT)
            batch = waveforms(BATCHES["extreme"])
            record.attempt(f"{name}/training/extreme{suffix}", partial(train, encoder, batch, **rate))
        mixed = waveforms(BATCHES["mixed"])
        record.attempt(f"{name}/training/layer drop", partial(train, make(name, layerdrop=0.5), mixed))
        record.attempt(f"{name}/training/autocast", partial(train, make(name, **WITH_DROPOUT), mixed, autocast=True))
        for dtype in (torch.bfloat16, torch.float64):
            batch = Packed(mixed.values.to(dtype), mixed.layout)
            record.attempt(f"{name}/training/{dtype}", partial(train, make(name).to(dtype), batch))
        record.attempt(f"{name}/saved", partial(saved, make(name)))
    record.save(sys.argv[1])


if __name__ == "__main__":
    with drawing():
        main()

"""Build the best other implementations, and call them as users do: on padded batches, with attention masks and SDPA."""

import copy
import importlib
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Contenders, Entry
from fastssl.models.encoder import Encoder, EncoderConfig
from fastssl.models.hubert import HubertForPreTraining
from fastssl.models.wav2vec2 import Wav2Vec2ForPreTraining
from fastssl.nn.quantizer import GumbelQuantizer

_compiles_everywhere = False
#: Why a contender is not measured if `compiles` returns False.
NOT_COMPILED = "compiling takes more than a minute; --compiled includes it"


def transformers_encoder(encoder: Encoder) -> Any:
    """Return a `transformers.Wav2Vec2Model` with SDPA and the weights of our encoder, on its device."""
    model = _transformers().Wav2Vec2Model(_transformers_config(encoder.config, apply_spec_augment=False))
    model.load_state_dict(encoder.state_dict())
    return model.to(next(encoder.parameters()).device)


def transformers_pretraining(ours: Wav2Vec2ForPreTraining) -> Any:
    """Return a `transformers.Wav2Vec2ForPreTraining` with SDPA and the weights of our model, on its device."""
    model = _transformers().Wav2Vec2ForPreTraining(_transformers_config(ours.config, apply_spec_augment=True))
    model.load_state_dict(ours.state_dict())
    return model.to(next(ours.parameters()).device)


def _transformers(module: str = "") -> Any:
    return importlib.import_module(f"transformers.{module}".rstrip("."))


def _transformers_config(config: EncoderConfig, *, apply_spec_augment: bool) -> Any:
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}
    return _transformers().Wav2Vec2Config(**values, apply_spec_augment=apply_spec_augment, attn_implementation="sdpa")


def transformers_masks(model: Any, attention_mask: Tensor) -> tuple[Tensor, Tensor]:  # (B, T) -> (B, F), (B, F, K)
    """Draw a batch's time mask and negatives with the functions that Transformers' pre-training example calls."""
    modeling = _transformers("models.wav2vec2.modeling_wav2vec2")
    config = model.config
    shape = (len(attention_mask), int(model._get_feat_extract_output_lengths(attention_mask.shape[1])))
    valid = model._get_feature_vector_attention_mask(shape[1], attention_mask)
    masked = modeling._compute_mask_indices(
        shape, config.mask_time_prob, config.mask_time_length, attention_mask=valid, min_masks=2
    )
    negatives = modeling._sample_negative_indices(shape, config.num_negatives, mask_time_indices=masked)
    device = attention_mask.device
    return torch.from_numpy(masked).to(device), torch.from_numpy(negatives).to(device)


def torchaudio_encoder(encoder: Encoder) -> Any:
    """Return torchaudio's wav2vec 2.0 encoder with the weights of our encoder, on its device.

    Raises:
        ImportError: torchaudio is not installed, or was built for another version of torch.
    """
    shape = _torchaudio_shape(encoder.config)
    model = _torchaudio_models().wav2vec2_model(**shape, aux_num_out=None)
    weights = encoder.state_dict()
    model.load_state_dict({name: weights[from_torchaudio(name)] for name in model.state_dict()})
    return model.to(next(encoder.parameters()).device)


def torchaudio_hubert(ours: HubertForPreTraining) -> Any:
    """Return torchaudio's HuBERT for pre-training with the weights of our model; it predicts only masked frames.

    Raises:
        ImportError: torchaudio is not installed, or was built for another version of torch.
    """
    config = ours.config
    model = _torchaudio_models().hubert_pretrain_model(
        **_torchaudio_shape(config),
        mask_prob=config.mask_time_prob,
        mask_selection="static",
        mask_other=0.0,
        mask_length=config.mask_time_length,
        no_mask_overlap=False,
        mask_min_space=1,
        mask_channel_prob=0.0,
        mask_channel_selection="static",
        mask_channel_other=0.0,
        mask_channel_length=10,
        no_mask_channel_overlap=False,
        mask_channel_min_space=1,
        skip_masked=False,
        skip_nomask=True,
        num_classes=config.num_clusters,
        final_dim=config.final_dim,
        feature_grad_mult=None,
    )
    weights = ours.state_dict()
    model.load_state_dict({name: weights[from_torchaudio_hubert(name)] for name in model.state_dict()})
    return model.to(ours.label_embeddings.device)


def torchaudio_hubert_compiled(ours: HubertForPreTraining) -> Any:
    """Return `torchaudio_hubert` whose parts are under `torch.compile(dynamic=True)`, for crops of equal length.

    Without lengths, its attention is SDPA without a mask. This is how minimal-hubert trains (PyPI, 0.0.8). What draws
    layers to drop, masks frames or selects masked ones is not compiled, because sizes there depend on values.

    Raises:
        ImportError: torchaudio is not installed, or was built for another version of torch.
    """
    model = torchaudio_hubert(ours)
    encoder = model.wav2vec2.encoder
    transformer = encoder.transformer
    for part in (
        model.wav2vec2.feature_extractor,
        encoder.feature_projection,
        transformer.pos_conv_embed,
        *transformer.layers,
    ):
        part.compile(dynamic=True)
    return model


def _torchaudio_models() -> Any:
    try:
        import torchaudio.models
    except (ImportError, OSError) as error:  # OSError: torchaudio's library does not load with this version of torch
        raise ImportError(
            f"torchaudio cannot be imported with torch {torch.__version__} ({error}); install the matching version"
        ) from error
    return torchaudio.models


def _torchaudio_shape(config: EncoderConfig) -> dict[str, Any]:
    """Translate an encoder config into arguments of torchaudio's model factories."""
    return {
        "extractor_mode": f"{config.feat_extract_norm}_norm",
        "extractor_conv_layer_config": list(zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True)),
        "extractor_conv_bias": config.conv_bias,
        "encoder_embed_dim": config.hidden_size,
        "encoder_projection_dropout": config.feat_proj_dropout,
        "encoder_pos_conv_kernel": config.num_conv_pos_embeddings,
        "encoder_pos_conv_groups": config.num_conv_pos_embedding_groups,
        "encoder_num_layers": config.num_hidden_layers,
        "encoder_num_heads": config.num_attention_heads,
        "encoder_attention_dropout": config.attention_dropout,
        "encoder_ff_interm_features": config.intermediate_size,
        "encoder_ff_interm_dropout": config.activation_dropout,
        "encoder_dropout": config.hidden_dropout,
        "encoder_layer_norm_first": config.do_stable_layer_norm,
        "encoder_layer_drop": config.layerdrop,
    }


def from_torchaudio(name: str) -> str:
    """Translate a parameter name in torchaudio's encoder into fastssl's, which Transformers uses too."""
    name = name.replace("encoder.transformer.", "encoder.").replace(
        "encoder.feature_projection.", "feature_projection."
    )
    name = name.replace("weight_g", "parametrizations.weight.original0")
    return name.replace("weight_v", "parametrizations.weight.original1")


def from_torchaudio_hubert(name: str) -> str:
    """Translate a parameter name in torchaudio's HuBERT for pre-training into fastssl's."""
    if name.startswith("wav2vec2."):
        return "hubert." + from_torchaudio(name.removeprefix("wav2vec2."))
    return "hubert.masked_spec_embed" if name == "mask_generator.mask_embedding" else name.partition(".")[2]


def contrastive_loss(context: Tensor, targets: Tensor, negatives: Tensor, *, temperature: float) -> Tensor:
    """Compute the contrastive loss with Transformers' formula, but on the masked frames only.

    All negatives are gathered into one tensor (K + 1, N, D).

    Args:
        context: (N, D) context vectors of the masked frames.
        targets: (N, D) quantised targets.
        negatives: (N, K) rows of `targets` to use as negatives.
        temperature: Divisor of the cosine similarities.

    Returns:
        (N,) loss of each masked frame.
    """
    gathered = targets[negatives].permute(1, 0, 2)
    candidates = torch.cat([targets[None], gathered])
    logits = torch.cosine_similarity(context.float(), candidates.float(), dim=-1).type_as(candidates) / temperature
    same = (targets == gathered).all(-1)
    logits = torch.cat([logits[:1], logits[1:].masked_fill(same, float("-inf"))])
    labels = torch.zeros(len(context), dtype=torch.long, device=context.device)
    return F.cross_entropy(logits.t().float(), labels, reduction="none")


def transformers_quantizer(ours: GumbelQuantizer) -> Any:
    """Return Transformers' Gumbel quantiser with the weights of our quantiser, on its device."""
    c_in, width = ours.weight_proj.in_features, ours.groups * ours.codevectors.shape[2]
    config = _transformers().Wav2Vec2Config(
        num_codevector_groups=ours.groups,
        num_codevectors_per_group=ours.codes,
        codevector_dim=width,
        conv_dim=[c_in] * 7,
    )
    quantizer = _transformers("models.wav2vec2.modeling_wav2vec2").Wav2Vec2GumbelVectorQuantizer(config)
    quantizer.load_state_dict(ours.state_dict())
    return quantizer.to(ours.codevectors.device)


def gumbel_softmax_with(noise: Tensor) -> Callable[..., Tensor]:
    """Return a replacement for `F.gumbel_softmax` that uses this noise, the same for all contenders in the gate."""

    def gumbel_softmax(logits: Tensor, tau: float, hard: bool) -> Tensor:
        noisy = logits + noise.view_as(logits)
        soft = F.softmax(noisy / tau, -1)
        return F.one_hot(noisy.argmax(-1), logits.shape[-1]) + (soft - soft.detach())

    return gumbel_softmax


def integrate_and_fire_two_sums(x: Tensor, weights: Tensor, slots: int) -> Tensor:  # (B, T, C), (B, T) -> (B, S, C)
    """Integrate and fire as other PyTorch implementations do: each frame contributes to one or two slots.

    Args:
        x: (B, T, C) frames.
        weights: (B, T) weights, at most 1 each.
        slots: Number of output slots per sequence, S.
    """
    total = weights.double().cumsum(1)
    after = total.floor()
    before = F.pad(after[:, :-1], (1, 0))
    rest = torch.where(after > before, total - after, torch.zeros_like(total)).to(x.dtype)
    row = torch.arange(len(x), device=x.device).unsqueeze(1) * (slots + 1)  # with an extra slot, dropped below
    out = x.new_zeros(len(x) * (slots + 1), x.shape[2])
    out = out.index_add(
        0, (row + before.long()).flatten(), ((weights.to(x.dtype) - rest).unsqueeze(2) * x).flatten(0, 1)
    )
    fires = (after > before).flatten().nonzero().squeeze(1)  # frames that complete a slot
    second = rest.flatten()[fires].unsqueeze(1) * x.flatten(0, 1)[fires]
    out = out.index_add(0, (row + after.long()).flatten()[fires], second)
    return out.view(len(x), slots + 1, -1)[:, :slots]


def integrate_and_fire_product(x: Tensor, weights: Tensor, slots: int) -> Tensor:  # (B, T, C), (B, T) -> (B, S, C)
    """Integrate and fire as a product with a dense (B, S, T) matrix of how much each frame adds to each slot."""
    after = weights.double().cumsum(1)
    before = F.pad(after[:, :-1], (1, 0))
    slot = torch.arange(slots, device=x.device, dtype=after.dtype).unsqueeze(1)
    overlap = torch.minimum(after.unsqueeze(1), slot + 1) - torch.maximum(before.unsqueeze(1), slot)
    return torch.bmm(overlap.clamp(min=0).to(x.dtype), x)


def compile_everywhere() -> None:
    """Include `torch.compile` in all comparisons, even where compiling takes minutes."""
    global _compiles_everywhere
    _compiles_everywhere = True


def add_compiled(contenders: Contenders, device: torch.device, make: Callable[[], Entry], *, quick: bool) -> None:
    """Add Transformers under `torch.compile` on a GPU or if it compiles quickly; otherwise note it as skipped.

    Args:
        contenders: Contenders to add it to.
        device: Device of the comparison.
        make: Builds the compiled contender.
        quick: Whether compiling takes only seconds.
    """
    name = "Transformers, torch.compile"
    if quick or compiles(device):
        contenders.add(name, *make())
    else:
        contenders.skipped[name] = NOT_COMPILED


def compiles(device: torch.device) -> bool:
    """Return whether comparisons on a device include contenders that take minutes to compile."""
    return device.type == "cuda" or _compiles_everywhere


def compiled(model: nn.Module) -> Any:
    """Return the model under `torch.compile`; both share their parameters.

    Raises:
        RuntimeError: No compiler is available to generate code.
    """
    return torch.compile(model, dynamic=False)


def in_double(model: nn.Module) -> Any:
    """Return a copy of the model in fp64 and evaluation mode."""
    return copy.deepcopy(model).double().eval()

"""The strongest other implementations, run as their users run them: padded batches, with attention masks and SDPA."""

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


def transformers_encoder(encoder: Encoder) -> Any:
    """`transformers.Wav2Vec2Model` with SDPA and the weights of ours."""
    model = _transformers().Wav2Vec2Model(_transformers_config(encoder.config, apply_spec_augment=False))
    model.load_state_dict(encoder.state_dict())
    return model.to(next(encoder.parameters()).device)


def transformers_pretraining(ours: Wav2Vec2ForPreTraining) -> Any:
    """`transformers.Wav2Vec2ForPreTraining` with SDPA and the weights of ours."""
    model = _transformers().Wav2Vec2ForPreTraining(_transformers_config(ours.config, apply_spec_augment=True))
    model.load_state_dict(ours.state_dict())
    return model.to(next(ours.parameters()).device)


def _transformers(module: str = "") -> Any:
    return importlib.import_module(f"transformers.{module}".rstrip("."))


def _transformers_config(config: EncoderConfig, *, apply_spec_augment: bool) -> Any:
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}
    return _transformers().Wav2Vec2Config(**values, apply_spec_augment=apply_spec_augment, attn_implementation="sdpa")


def transformers_masks(model: Any, attention_mask: Tensor) -> tuple[Tensor, Tensor]:  # (B, T) -> (B, F), (B, F, K)
    """Time mask and negatives of a batch, by the functions that Transformers' pre-training example calls."""
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
    """torchaudio's wav2vec 2.0 encoder with the weights of ours.

    Raises:
        ImportError: torchaudio is not there, or not built for this torch.
    """
    shape = _torchaudio_shape(encoder.config)
    model = _torchaudio_models().wav2vec2_model(**shape, aux_num_out=None)
    weights = encoder.state_dict()
    model.load_state_dict({name: weights[from_torchaudio(name)] for name in model.state_dict()})
    return model.to(next(encoder.parameters()).device)


def torchaudio_hubert(ours: HubertForPreTraining) -> Any:
    """torchaudio's HuBERT for pre-training with the weights of ours, which predicts masked frames alone.

    Raises:
        ImportError: torchaudio is not there, or not built for this torch.
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


def _torchaudio_models() -> Any:
    try:
        import torchaudio.models
    except (ImportError, OSError) as error:  # OSError: its library does not load beside this torch
        raise ImportError(f"torchaudio does not import beside torch {torch.__version__}: {error}") from error
    return torchaudio.models


def _torchaudio_shape(config: EncoderConfig) -> dict[str, Any]:
    """What its factories take for an encoder."""
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
    """Our and Transformers' name of a parameter of torchaudio's encoder."""
    name = name.replace("encoder.transformer.", "encoder.").replace(
        "encoder.feature_projection.", "feature_projection."
    )
    name = name.replace("weight_g", "parametrizations.weight.original0")
    return name.replace("weight_v", "parametrizations.weight.original1")


def from_torchaudio_hubert(name: str) -> str:
    """Our name of a parameter of torchaudio's HuBERT for pre-training."""
    if name.startswith("wav2vec2."):
        return "hubert." + from_torchaudio(name.removeprefix("wav2vec2."))
    return "hubert.masked_spec_embed" if name == "mask_generator.mask_embedding" else name.partition(".")[2]


def contrastive_loss(context: Tensor, targets: Tensor, negatives: Tensor, *, temperature: float) -> Tensor:
    """Transformers' formula on the masked frames alone: every negative is gathered, (K + 1, N, D)."""
    gathered = targets[negatives].permute(1, 0, 2)
    candidates = torch.cat([targets[None], gathered])
    logits = torch.cosine_similarity(context.float(), candidates.float(), dim=-1).type_as(candidates) / temperature
    same = (targets == gathered).all(-1)
    logits = torch.cat([logits[:1], logits[1:].masked_fill(same, float("-inf"))])
    labels = torch.zeros(len(context), dtype=torch.long, device=context.device)
    return F.cross_entropy(logits.t().float(), labels, reduction="none")


def transformers_quantizer(ours: GumbelQuantizer) -> Any:
    """Transformers' quantiser with the weights of ours."""
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
    """What stands for `F.gumbel_softmax` while a gate compares, so that the noise is the same everywhere."""

    def gumbel_softmax(logits: Tensor, tau: float, hard: bool) -> Tensor:
        noisy = logits + noise.view_as(logits)
        soft = F.softmax(noisy / tau, -1)
        return F.one_hot(noisy.argmax(-1), logits.shape[-1]) + (soft - soft.detach())

    return gumbel_softmax


def integrate_and_fire_two_sums(x: Tensor, weights: Tensor, slots: int) -> Tensor:  # (B, T, C), (B, T) -> (B, S, C)
    """The form that plain PyTorch implementations share, for weights of at most 1: a frame gives to one slot or two."""
    total = weights.double().cumsum(1)
    after = total.floor()
    before = F.pad(after[:, :-1], (1, 0))
    rest = torch.where(after > before, total - after, torch.zeros_like(total)).to(x.dtype)
    row = torch.arange(len(x), device=x.device).unsqueeze(1) * (slots + 1)  # the last slot of each is left over
    out = x.new_zeros(len(x) * (slots + 1), x.shape[2])
    out = out.index_add(
        0, (row + before.long()).flatten(), ((weights.to(x.dtype) - rest).unsqueeze(2) * x).flatten(0, 1)
    )
    fires = (after > before).flatten().nonzero().squeeze(1)  # only these have a rest
    second = rest.flatten()[fires].unsqueeze(1) * x.flatten(0, 1)[fires]
    out = out.index_add(0, (row + after.long()).flatten()[fires], second)
    return out.view(len(x), slots + 1, -1)[:, :slots]


def integrate_and_fire_product(x: Tensor, weights: Tensor, slots: int) -> Tensor:  # (B, T, C), (B, T) -> (B, S, C)
    """A product with the dense matrix of what every frame gives to every slot, (B, S, T)."""
    after = weights.double().cumsum(1)
    before = F.pad(after[:, :-1], (1, 0))
    slot = torch.arange(slots, device=x.device, dtype=after.dtype).unsqueeze(1)
    overlap = torch.minimum(after.unsqueeze(1), slot + 1) - torch.maximum(before.unsqueeze(1), slot)
    return torch.bmm(overlap.clamp(min=0).to(x.dtype), x)


def compile_everywhere() -> None:
    """Let `torch.compile` take part where it compiles for minutes, too."""
    global _compiles_everywhere
    _compiles_everywhere = True


def add_compiled(contenders: Contenders, device: torch.device, make: Callable[[], Entry], *, quick: bool) -> None:
    """Transformers under `torch.compile`: on a GPU and where it compiles quickly; elsewhere it is noted as left out."""
    name = "Transformers, torch.compile"
    if device.type == "cuda" or quick or _compiles_everywhere:
        contenders.add(name, *make())
    else:
        contenders.skipped[name] = "compiling takes a minute and more; it takes part with --compiled"


def compiled(model: nn.Module) -> Any:
    """The model under `torch.compile`, sharing its parameters.

    Raises:
        RuntimeError: There is no compiler to generate code with.
    """
    return torch.compile(model, dynamic=False)


def in_double(model: nn.Module) -> Any:
    """A copy in fp64, in evaluation mode."""
    return copy.deepcopy(model).double().eval()

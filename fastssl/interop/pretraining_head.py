"""Accelerate the quantiser and the contrastive loss of Transformers' `Wav2Vec2ForPreTraining`, on padded batches.

The original gathers the negatives of every frame, padding included, and multiplies every code with every frame.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastssl import ops
from fastssl.interop import encoders
from fastssl.interop.calls import as_original, recorded_by
from fastssl.interop.classes import AcceleratedClasses
from fastssl.kernels.gumbel_quantize.op import GumbelQuantized

_MODULE = "transformers.models.wav2vec2.modeling_wav2vec2"


def _quantize(
    self: Any,
    hidden_states: Tensor,  # (B, F, C)
    mask_time_indices: Tensor | None = None,  # (B, F)
) -> tuple[Tensor, Tensor]:  # (B, F, D), ()
    """Quantise every frame; return the vectors, and the codes' perplexity over masked frames (all without a mask)."""
    shape = (self.num_groups, self.num_vars)
    logits = self.weight_proj(hidden_states).flatten(0, 1).unflatten(1, shape)
    noise = None
    if self.training:
        # The same random draws as `torch.nn.functional.gumbel_softmax`, in the same order.
        noise = -torch.empty_like(logits, dtype=torch.float32).exponential_().log()
    else:
        logits = logits.detach()
    codevectors = self.codevectors.view(*shape, -1)

    def quantized(rows: Tensor | None) -> GumbelQuantized:
        some = logits if rows is None else logits.index_select(0, rows)
        drawn = noise if rows is None or noise is None else noise.index_select(0, rows)
        return ops.gumbel_quantize(some, codevectors, noise=drawn, temperature=self.temperature)

    if mask_time_indices is None:
        counted, frames = quantized(None), len(logits)
        values = counted.values
    else:
        mask = mask_time_indices.flatten()
        masked = mask.nonzero().squeeze(1)  # the host waits for their number, once
        rest = (~mask).nonzero_static(size=len(mask) - len(masked)).squeeze(1)
        counted, frames = quantized(masked), len(masked)
        values = counted.values.new_empty(len(logits), counted.values.shape[1])
        values = values.index_copy(0, masked, counted.values).index_copy(0, rest, quantized(rest).values)
    sums = counted.probability_sums if self.training else counted.counts.to(counted.probability_sums.dtype)
    shares = sums / frames
    perplexity = torch.exp(-torch.xlogy(shares, shares).sum(-1)).sum()
    if not self.training:  # where the original counts codes in the dtype of the logits
        perplexity = perplexity.to(logits.dtype)
    return values.unflatten(0, hidden_states.shape[:2]), perplexity


def _losses(config: Any, output: Any, mask: Tensor | None, negatives: Tensor) -> dict[str, Tensor]:
    """Compute the losses that the original adds to its output if it is given negatives.

    Args:
        config: Config of the model.
        output: Output of the original forward without losses.
        mask: (B, F), the masked frames.
        negatives: (B, F, K) indices into the flattened B * F frames.

    Raises:
        ValueError: `mask` is None.
    """
    if mask is None:
        raise ValueError(
            "mask_time_indices: missing, but sampled_negative_indices was given; pass both to get the loss, or neither"
        )
    mask = mask.bool()
    context, targets = output.projected_states, output.projected_quantized_states
    # Index -1 marks "no negative"; a frame without negatives contributes no loss.
    chosen = torch.where(mask.unsqueeze(2), negatives.long(), -1).flatten(0, 1)
    losses, _ = ops.contrastive_loss(
        context.flatten(0, 1),
        targets.flatten(0, 1).to(context.dtype),
        chosen,
        temperature=config.contrastive_logits_temperature,
    )
    codes = config.num_codevectors_per_group * config.num_codevector_groups
    contrastive, diversity = losses.sum(), (codes - output.codevector_perplexity) / codes * mask.sum()
    loss = contrastive + config.diversity_loss_weight * diversity
    return {"loss": loss, "contrastive_loss": contrastive, "diversity_loss": diversity}


def _original_runs(module: nn.Module) -> bool:
    name = CLASSES.replaced(module)
    return encoders.original_runs(module, (), name and f"the model has a replaced `{name}`")


def _methods(original: type[nn.Module]) -> dict[str, Any]:
    if original.__name__ == "Wav2Vec2GumbelVectorQuantizer":

        def quantize(self: Any, **given: Any) -> Any:
            if recorded_by(given.values()) or _original_runs(self):
                return original.forward(self, **given)
            return _quantize(self, **given)

        return {"forward": as_original(original.forward, quantize)}

    def forward(self: Any, **given: Any) -> Any:
        if recorded_by(given.values()) or _original_runs(self):  # if it is recorded, the encoder warns
            return original.forward(self, **given)
        return_dict, negatives = given.pop("return_dict", None), given.pop("sampled_negative_indices", None)
        if return_dict is None:
            return_dict = getattr(self.config, "return_dict", True)
        # Without negatives, the original computes everything except the losses.
        output = original.forward(self, return_dict=True, **given)
        if negatives is not None:
            output = type(output)(**output | _losses(self.config, output, given.get("mask_time_indices"), negatives))
        return output.to_tuple() if return_dict is False else output

    return {"forward": as_original(original.forward, forward)}


CLASSES = AcceleratedClasses(
    __name__,
    {"Wav2Vec2ForPreTraining": _MODULE, "Wav2Vec2GumbelVectorQuantizer": _MODULE},
    _methods,
    not_called=("compute_contrastive_loss", "_compute_perplexity"),
)
__getattr__ = CLASSES.by_name  # for pickle

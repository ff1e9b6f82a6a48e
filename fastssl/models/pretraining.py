"""What systems that predict discrete targets of masked frames have in common: HuBERT and BEST-RQ."""

from dataclasses import dataclass

from torch import Tensor

from fastssl.packing import Packed


@dataclass(frozen=True)
class PredictionOutput:
    """Loss and statistics of one batch; sums over its M masked frames unless a line says otherwise."""

    loss: Tensor  # () fp32, what is minimised: prediction + weighted features penalty
    prediction_loss: Tensor  # () fp32, cross-entropy of the targets, nats
    features_penalty: Tensor  # () fp32, unweighted; 0 where the system has none
    correct: Tensor  # () int64, masked frames whose own target scores highest
    masked_frames: int  # M
    code_counts: Tensor  # (V,) int64, how often each code is the target, over all frames, masked or not
    features: Packed  # (N, D) of the masked input

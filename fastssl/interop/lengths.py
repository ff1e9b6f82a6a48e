"""Lengths of a padded batch as torchaudio's encoders take them: of any dtype, and beyond the batch.

TorchScript compiles these functions too.
"""

import torch
from torch import Tensor


def frame_lengths(lengths: Tensor, convolutions: list[tuple[int, int]]) -> Tensor:
    """Return how many frames torchaudio says that utterances have, with its own arithmetic.

    Args:
        lengths: (B,) samples, of any dtype that can be subtracted and divided.
        convolutions: Kernel size and stride of each convolution, from first to last.

    Returns:
        (B,) frames in the dtype of `lengths`; they may be more than the batch has, or NaN.
    """
    for kernel, stride in convolutions:
        lengths = torch.div(lengths - kernel, stride, rounding_mode="floor") + 1
        lengths = torch.max(torch.zeros_like(lengths), lengths)
    return lengths


def frames_after(samples: int, convolutions: list[tuple[int, int]]) -> int:
    """Return the number of frames that the convolutions make of `samples` samples."""
    for kernel, stride in convolutions:
        samples = max(0, (samples - kernel) // stride + 1)
    return samples


def valid_samples(lengths: Tensor, frames: Tensor, samples: int, convolutions: list[tuple[int, int]]) -> Tensor:
    """Return how many samples of each row to use, so that it has the frames that torchaudio takes for valid.

    Args:
        lengths: (B,) samples, as `frame_lengths` takes them.
        frames: (B,) result of `frame_lengths`.
        samples: Number T of samples per row of the batch.
        convolutions: Kernel size and stride of each convolution, from first to last.

    Returns:
        (B,) int64 from 0 to T: the lengths without their fractions where they are in this range. Where they are not,
        or are rounded in a dtype of few bits, the nearest number that has those frames.
    """
    receptive, hop = 1, 1
    for kernel, stride in convolutions:
        receptive += (kernel - 1) * hop
        hop *= stride
    positions = torch.arange(frames_after(samples, convolutions), device=frames.device)
    valid = torch.logical_not(positions >= frames.unsqueeze(1)).sum(1)  # a row of length NaN has no padding
    least = torch.where(valid > 0, receptive + (valid - 1) * hop, 0)
    most = torch.where(valid > 0, least + hop - 1, receptive - 1).clamp(max=samples)
    whole = lengths.double().nan_to_num(float(samples)).clamp(0, samples).floor().long()
    return torch.maximum(torch.minimum(whole, most), least)

"""A linear head for frames of any length; `fastssl.eval.probe.adaptive` uses it to learn a compressor's rate."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastssl.eval.probe.heads import Window, convolve
from fastssl.nn.rates import mix_weights, rate_for_period
from fastssl.packing import Layout, Packed


class RateHead(nn.Module):
    """A probe head for frames of any length: weighted sum of layers, then a linear map of a window of frames.

    The window's weights are a function of time, linear between points that are one front-end frame apart; each frame of
    the window takes the weights at its distance from the middle frame. The head has two such functions and biases, one
    for the shortest frames and one for the longest, and interpolates between them in the logarithm of the frame period.
    It is initialised like `heads.Head`: weights of zero, biases from `prior`.

    Args:
        layers: Number of layers, L.
        width: Dimension of the frames, D.
        prior: (C,) share of each class, or for CTC of the blank and each symbol, among the outputs.
        reach: Number of points on either side of the middle one.
    """

    def __init__(self, layers: int, width: int, prior: Tensor, *, reach: int) -> None:
        super().__init__()
        self.reach = reach
        self.layer_logits = nn.Parameter(torch.zeros(layers))
        self.weight = nn.Parameter(torch.zeros(2, len(prior), width, 2 * reach + 1))
        self.bias = nn.Parameter(prior.clamp(min=1e-6).log().repeat(2, 1))

    def forward(self, values: Tensor, layout: Layout, *, window: Window, length: float, mixture: float) -> Packed:
        """Compute the logits of a batch of examples.

        Args:
            values: (L, N, D) frames of each layer, with `window.reach` rows of zeros before and after each example.
            layout: Layout of the N rows, where the rows of zeros belong to their examples.
            window: Frames that each output sees.
            length: Mean length of a frame, in front-end frames.
            mixture: Position between the head of the shortest frames (0) and that of the longest (1).

        Returns:
            Packed logits (N_out, C).
        """
        steps = torch.arange(-window.reach, window.reach + 1, device=values.device)
        points = torch.arange(-self.reach, self.reach + 1, device=values.device)
        places = (steps * length).clamp(-self.reach, self.reach)
        shares = (1 - (places - points[:, None]).abs()).clamp(min=0)  # (2 reach + 1, taps)
        weight, bias = (torch.lerp(of_both[0], of_both[1], mixture) for of_both in (self.weight, self.bias))
        mixed = (self.layer_logits.softmax(0) @ values.flatten(1)).view(values.shape[1:])
        return convolve(mixed, weight @ shares, bias, layout, stride=window.stride)


class FrameLengths(NamedTuple):
    """Mean frame lengths, in front-end frames, at the lower and the upper bound of a compressor's rate.

    Args:
        shortest: Mean length at the lower bound of the rate.
        longest: Mean length at the upper bound.
        mean_weight: Mean of the compressor's learned weights (alpha of arXiv:2211.02332), a () tensor.
    """

    shortest: float
    longest: float
    mean_weight: Tensor  # ()

    @classmethod
    def between(cls, low: float, high: float, *, mean_weight: Tensor, most: float) -> "FrameLengths":
        """Compute the mean lengths at two rates.

        Args:
            low: Lower bound of the rate.
            high: Upper bound of the rate.
            mean_weight: Mean of the compressor's learned weights, a () tensor.
            most: Upper limit for both mean lengths.
        """
        shares = mix_weights(mean_weight, mean_weight.new_tensor([low, high])).clamp(min=1 / most)
        shortest, longest = (1 / shares).tolist()
        return cls(shortest, longest, mean_weight)

    def rate_at(self, share: float) -> Tensor:
        """Return the rate at which frames have a given length, as a () fp32 tensor.

        Args:
            share: Position between the shortest (0) and the longest frames (1), in the logarithm of the length.
        """
        length = self.shortest * (self.longest / self.shortest) ** share
        return rate_for_period(torch.tensor(length, dtype=torch.float64, device="cpu"), self.mean_weight, 1.0).float()

    def mixture(self, length: float) -> float:
        """Return where a length lies between the shortest (0) and the longest (1), on a logarithmic scale.

        Args:
            length: Mean length of a frame, in front-end frames; lengths out of range are clamped.

        Returns:
            A number from 0 to 1; 0 if shortest and longest are equal.
        """
        between = math.log(self.longest / self.shortest)
        return 0.0 if between <= 0 else min(max(math.log(length / self.shortest) / between, 0.0), 1.0)

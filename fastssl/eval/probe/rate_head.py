"""A linear head for frames of any length, with which `adaptive` learns a rate."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastssl.eval.probe.heads import Window, convolve
from fastssl.nn.rates import mix_weights, rate_for_period
from fastssl.packing import Layout, Packed


class RateHead(nn.Module):
    """A probe's head for frames of any length: weighted sum of layers, then a linear map of a window of its frames.

    The window's weights are a function of time, linear between points one frame of the front end apart; frames take
    those at their distance from the middle one. There are two such functions and biases, of the shortest frames and of
    the longest; between them, in the logarithm of the frame period, a head is a mixture. It begins as the probe's does.

    Args:
        layers: L.
        width: D.
        prior: (C,) share of each class, or of each symbol and the blank among outputs.
        reach: Points on either side of the middle one.
    """

    def __init__(self, layers: int, width: int, prior: Tensor, *, reach: int) -> None:
        super().__init__()
        self.reach = reach
        self.layer_logits = nn.Parameter(torch.zeros(layers))
        self.weight = nn.Parameter(torch.zeros(2, len(prior), width, 2 * reach + 1))
        self.bias = nn.Parameter(prior.clamp(min=1e-6).log().repeat(2, 1))

    def forward(self, values: Tensor, layout: Layout, *, window: Window, length: float, mixture: float) -> Packed:
        """Logits (N_out, C) of examples.

        Args:
            values: (L, N, D) frames of each layer, with as many rows of zeros before and after each example as the
                window reaches.
            layout: Of the examples with these rows.
            window: Frames that an output sees.
            length: Of a frame, in frames of the front end.
            mixture: 0 for the head of the shortest frames, 1 for that of the longest.
        """
        steps = torch.arange(-window.reach, window.reach + 1, device=values.device)
        points = torch.arange(-self.reach, self.reach + 1, device=values.device)
        places = (steps * length).clamp(-self.reach, self.reach)
        shares = (1 - (places - points[:, None]).abs()).clamp(min=0)  # (2 reach + 1, taps)
        weight, bias = (torch.lerp(of_both[0], of_both[1], mixture) for of_both in (self.weight, self.bias))
        mixed = (self.layer_logits.softmax(0) @ values.flatten(1)).view(values.shape[1:])
        return convolve(mixed, weight @ shares, bias, layout, stride=window.stride)


class FrameLengths(NamedTuple):
    """Lengths of frames, in frames of the front end, from one bound of the rate to the other."""

    shortest: float
    longest: float
    mean_weight: Tensor  # () of the learned ones

    @classmethod
    def between(cls, low: float, high: float, *, mean_weight: Tensor, most: float) -> "FrameLengths":
        """At these rates, on average; none is longer than `most`."""
        shares = mix_weights(mean_weight, mean_weight.new_tensor([low, high])).clamp(min=1 / most)
        shortest, longest = (1 / shares).tolist()
        return cls(shortest, longest, mean_weight)

    def rate_at(self, share: float) -> Tensor:
        """() The rate at which frames have this place between the shortest (0) and the longest (1)."""
        length = self.shortest * (self.longest / self.shortest) ** share
        return rate_for_period(torch.tensor(length, dtype=torch.float64), self.mean_weight, 1.0).float()

    def mixture(self, length: float) -> float:
        """The place of frames of such a length; 0 where all are as long."""
        between = math.log(self.longest / self.shortest)
        return 0.0 if between <= 0 else min(max(math.log(length / self.shortest) / between, 0.0), 1.0)

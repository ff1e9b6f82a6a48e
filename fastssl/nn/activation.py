"""Activations with the same bits wherever in a batch a frame lies."""

import torch
from torch import Tensor


def sigmoid(x: Tensor) -> Tensor:
    """`torch.sigmoid`. On a CPU PyTorch ends each thread's share by another exponential; fp64 hides it."""
    if x.device.type != "cpu" or x.dtype == torch.float64:
        return torch.sigmoid(x)
    return torch.sigmoid(x.double()).to(x.dtype)

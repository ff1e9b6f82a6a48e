"""Results of an update on their way from the device to the host."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fastssl.data.batches import AudioBatch
from fastssl.data.corpus import Problem


class UpdateResult(NamedTuple):
    """What the host has read of an update.

    Attributes:
        update: Number of the update, from 1.
        values: Counts, mean loss and scores over all processes, gradient norm, learning rate and schedules, by name.
        code_counts: (V,) number of times each code was the target; empty if the system has no code counts.
        problems: Recordings of this process that could not be used.
    """

    update: int
    values: dict[str, float]
    code_counts: Tensor
    problems: list[Problem]


@dataclass
class Unread:
    """The sums of an update over its batches and processes, and its gradient norm, not yet read by the host.

    The copy to the host begins with this object, and nobody waits for it before `read`.

    Args:
        update: Number of the update, from 1.
        on_device: (n,) float64, the sums, then the gradient norm.
        rates: Learning rate and schedules of the update, by name.
        batches: The update's batches in this process, each with its own sums.
    """

    update: int
    on_device: Tensor
    rates: dict[str, float]
    batches: list[tuple[Tensor, AudioBatch]]
    _copied: torch.cuda.Event | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._values = self.on_device
        if self.on_device.device.type == "cuda":
            own = self.on_device
            self._values = torch.empty(own.shape, dtype=own.dtype, device="cpu", pin_memory=True)
            self._values.copy_(self.on_device, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> Tensor:
        """Wait for the copy, and return the (n,) values on the CPU."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values

    def problems(self) -> list[Problem]:
        """Return the recordings of the batches that could not be used."""
        return [problem for _, batch in self.batches for problem in batch.problems]

"""Buckets of batches: fill a batch up to a size that others share, without changing what its utterances give."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, NoReturn

from torch import Tensor

from fastssl.packing import Layout, kept_by_plan

#: Sizes of buckets for each doubling of the number of samples, and the least difference between two sizes. Smaller
#: differences mean less filling, and more graphs.
_STEPS, _LEAST_STEP = 8, 2048


class Bucket(NamedTuple):
    """What the launches of a filled batch depend on.

    Attributes:
        samples: N, the number of samples with the filler.
        sequences: B, the number of sequences: the utterances, at least 0 empty sequences, and the filler.
        longest: Upper limit of the length of a sequence, in samples.
    """

    samples: int
    sequences: int
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int], *, receptive_field: int, hop: int) -> "Bucket":
        """Return the smallest bucket that has room for a batch and its filler.

        Args:
            lengths: Number of samples of each utterance.
            receptive_field: Number of samples that a frame is computed from.
            hop: Number of samples from one frame to the next.
        """
        sequences = _power_of_two(len(lengths) + 1)
        # With so many samples, a filler gets at least 0 frames in every layer, see `FilledLayout`.
        samples = sum(lengths) + sequences * receptive_field + hop
        step = max(_LEAST_STEP, _power_of_two(samples) // (2 * _STEPS))
        samples = -(-samples // step) * step
        return cls(samples, sequences, _power_of_two(max(*lengths, samples - sum(lengths))))


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _frames(length: int, kernel: int, stride: int) -> int:
    return max(0, (length - kernel) // stride + 1)


class UnreadableLengths(Sequence[int]):
    """Stands for the lengths on the host in a layout that a graph captures: only their number is the same in each run.

    Args:
        number: B, the number of sequences.
    """

    def __init__(self, number: int) -> None:
        self._number = number

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, index: object) -> NoReturn:
        """Refuse to return a length.

        Raises:
            TypeError: Always, as PyTorch does where it expects a tuple of lengths.
        """
        raise TypeError("lengths on the host differ between the batches of a bucket")


class FilledLayout(Layout):
    """Layout of a batch that is filled up to a bucket: utterances, then empty sequences, then the filler.

    After a convolution, the utterances have the frames that they always have, and the filler gets some of its own
    frames, so that the total is the same for all batches of the bucket. `max_length` is an upper limit.
    """

    @classmethod
    def fill(cls, lengths: Sequence[int], bucket: Bucket) -> "FilledLayout":
        """Return the layout of utterances with the given lengths, filled up to a bucket; on the host."""
        empty = (0,) * (bucket.sequences - len(lengths) - 1)
        return cls._of((*lengths, *empty, bucket.samples - sum(lengths)), bucket.longest)

    @classmethod
    def _of(cls, lengths: Sequence[int], longest: int) -> "FilledLayout":
        exact = Layout.from_lengths(lengths)
        return cls(exact.lengths, exact.cu_seqlens, longest, exact.total)

    def holding(self, tensors: Iterator[Tensor]) -> Layout:
        """Return a copy for a graph, as `Layout.holding` does; reading `lengths` of it is a TypeError."""
        held = super().holding(tensors)
        for layout in (held, *held._parts().values()):
            if isinstance(layout, Layout):
                object.__setattr__(layout, "lengths", UnreadableLengths(len(layout.lengths)))
        return held

    @kept_by_plan
    def after_conv(self: Layout, kernel: int, stride: int) -> Layout:
        """Return the filled layout after an unpadded convolution; arguments and errors as in `Layout.after_conv`.

        Raises:
            ValueError: Also if the filler is too short, as with a kernel that is smaller than its stride.
        """
        # Not by `Layout.after_conv`, which computes tensors as well: this runs in each call of an encoder.
        *lengths, most, longest = (_frames(length, kernel, stride) for length in (*self.lengths, self.max_length))
        # B sequences with N samples have at least (N - B (K - 1)) / S frames, whatever their lengths are.
        total = (self.total - len(self.lengths) * (kernel - 1)) // stride
        filler = total - sum(lengths)
        if not 0 <= filler <= most:
            raise ValueError(f"kernel: CUDA graphs need one of at least the stride, got {kernel} and {stride}")
        return FilledLayout._of((*lengths, filler), longest)

"""Versions of the random draws of dropout, so that an old run continues with the same masks.

1. Each element has a draw of 32 bits. It is kept if the draw is at least floor(p 2^32). Kept elements are multiplied by
   1 / (1 - p).
2. A word of 32 random bits serves two elements, each with a draw of 16 bits. An element is kept if its draw is at
   least t = min(floor(p 2^16 + 1/2), 2^16 - 1). Kept elements are multiplied by 1 / (1 - t / 2^16), so the expected
   result is the input. This takes half as many random words.

Every op with dropout takes the version as `randomness`; None is the version in force, which is the newest unless
`using_randomness` has changed it. Ops keep their version for the backward pass. A run keeps the version that its
`config.yaml` records; runs from before versions were recorded have version 1.
"""

from collections.abc import Iterator
from contextlib import contextmanager

#: The newest version, which new runs use.
RANDOMNESS = 2
#: The version of whatever was made before versions were recorded.
OLDEST_RANDOMNESS = 1

_in_force = RANDOMNESS


def resolve_randomness(randomness: int | None, name: str = "randomness") -> int:
    """Return the version to use, after checking it.

    Args:
        randomness: Version of the random draws, or None for the version in force.
        name: Name of the argument, for the error message.

    Raises:
        ValueError: The version is unknown.
    """
    if randomness is None:
        return _in_force
    if randomness not in range(OLDEST_RANDOMNESS, RANDOMNESS + 1):
        raise ValueError(
            f"{name}: must be from {OLDEST_RANDOMNESS} to {RANDOMNESS}, got {randomness}; "
            "a larger one needs a newer fastssl"
        )
    return randomness


@contextmanager
def using_randomness(randomness: int) -> Iterator[None]:
    """Return a context in which ops draw random numbers by a version, in all threads.

    With activation checkpointing, the backward pass computes the forward pass again, so it must be inside the context
    too. Otherwise it need not be.

    Args:
        randomness: Version of the random draws.

    Raises:
        ValueError: The version is unknown.
    """
    global _in_force
    before, _in_force = _in_force, resolve_randomness(randomness)
    try:
        yield
    finally:
        _in_force = before


def dropout_threshold(dropout_p: float, randomness: int) -> int:
    """Return the smallest draw of an element that is kept, as a number of 32 bits.

    In version 2, the draw is in the upper 16 bits, and the lower bits of the threshold are 0. So a draw may be compared
    with the threshold whatever its lower bits are.

    Args:
        dropout_p: Probability of dropping an element, at least 0 and less than 1.
        randomness: Version of the random draws.
    """
    if randomness == 1:
        return int(dropout_p * 2**32)
    return min(int(dropout_p * 2**16 + 0.5), 2**16 - 1) << 16


def kept_fraction(dropout_p: float, randomness: int) -> float:
    """Return the probability of keeping an element; kept elements are divided by it.

    Args:
        dropout_p: Probability of dropping an element, at least 0 and less than 1.
        randomness: Version of the random draws.
    """
    return 1 - dropout_p if randomness == 1 else 1 - dropout_threshold(dropout_p, randomness) / 2**32

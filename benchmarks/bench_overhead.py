"""Measure the overhead of Python in an encoder's training step on the CPU: `python -m benchmarks.bench_overhead`.

Times a narrow model. It has the same layers, calls and number of utterances as the real one, but few channels and only
0.1 s of audio per utterance. Nearly all of its time is Python, dispatch and autograd. Its time divided by that of the
real step is therefore an upper bound on their share. The extra time per additional utterance is the cost of Python
loops over utterances, such as the one in the positional convolution.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks import workloads
from benchmarks.machine import seconds_of, undisturbed, wait_until_quiet
from benchmarks.recipes import recipe_model
from fastssl import ops
from fastssl.models.encoder import Encoder
from fastssl.packing import Layout

CPU = torch.device("cpu")
BASE = replace(recipe_model("wav2vec2-base"), layerdrop=0.0)
NARROW = replace(
    BASE,
    conv_dim=(4,) * 7,
    hidden_size=16,
    intermediate_size=16,
    num_attention_heads=1,
    num_conv_pos_embeddings=2,
    num_conv_pos_embedding_groups=4,
)


def encoder_step(config: Any, lengths_s: Sequence[float]) -> Callable[[], None]:
    """Return a function that runs an encoder forward and backward on noise of these lengths in seconds."""
    encoder, batch = Encoder(config).train(), workloads.waveforms(lengths_s, CPU)
    return lambda: encoder(batch).features.values.square().mean().backward()


def positional_step(lengths: Sequence[int], width: int, taps: int, groups: int) -> Callable[[], None]:
    """Return a function that runs `ops.positional_conv` forward and backward.

    Args:
        lengths: Number of frames of each utterance.
        width: Number of channels.
        taps: Kernel size.
        groups: Number of groups.
    """
    layout = Layout.from_lengths(lengths)
    x = torch.randn(layout.total, width, requires_grad=True)
    weight = torch.randn(width, width // groups, taps, requires_grad=True)
    return lambda: ops.positional_conv(x, weight, layout).sum().backward()


def milliseconds(step: Callable[[], None], repeats: int) -> float:
    """Return the median time of a step in milliseconds, over `repeats` calls after one warm-up call."""
    step()
    return 1e3 * statistics.median(undisturbed(lambda: [seconds_of(step, CPU) for _ in range(repeats)]))


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(2)
    wait_until_quiet()
    print(f"{'':24s} {'batch':24s} {'step, ms':>9s} {'overhead, ms':>13s} {'share':>7s}")
    batches = {"read-speech batch of 4": workloads.read_speech(4), "short batch of 16": workloads.short(16)}
    overheads: dict[str, dict[int, float]] = {}
    for batch, lengths_s in batches.items():
        count = len(lengths_s)
        parts: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
            "encoder": (partial(encoder_step, BASE, lengths_s), partial(encoder_step, NARROW, [0.1] * count)),
            "positional convolution": (
                partial(positional_step, workloads.frames(lengths_s), 768, 128, 16),
                partial(positional_step, [1] * count, 16, 2, 4),
            ),
        }
        for part, (whole, narrow) in parts.items():
            whole_ms, overhead_ms = milliseconds(whole(), 3), milliseconds(narrow(), 20)
            overheads.setdefault(part, {})[count] = overhead_ms
            print(f"{part:24s} {batch:24s} {whole_ms:9.1f} {overhead_ms:13.2f} {overhead_ms / whole_ms:7.2%}")
    for part, by_count in overheads.items():
        (few, few_ms), (many, many_ms) = by_count.items()
        print(f"{part}: {(many_ms - few_ms) / (many - few):.3f} ms per additional utterance")


if __name__ == "__main__":
    main()

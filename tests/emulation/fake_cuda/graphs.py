"""Scenarios of CUDA graphs: what is captured for two batches of a bucket, and what a call does afterwards."""

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from itertools import zip_longest

import torch

from fastssl.models.speech_encoder import SpeechEncoder
from fastssl.packing import Packed
from tests.emulation.fake_cuda.record import Record
from tests.emulation.fake_cuda.scenario import Scenario, Watch
from tests.emulation.fake_cuda.training import PRECISIONS, encoder_of, waveforms_of

_RECIPES = {
    "wav2vec2 base": "wav2vec2-base",
    "wav2vec2 large": "wav2vec2-large",
    "wavlm": "wavlm-tiny",
    "hubert": "hubert-tiny",
    "best-rq": "best-rq-tiny",
}
#: Lengths in seconds of the utterances of batches, which all belong to the same bucket but for the last.
_BATCHES = ((4.0, 7.3, 2.2), (6.1, 4.417, 3.003), (0.0, 7.9, 5.6), (4.0, 7.3, 4.2))

_COPIES = ("copy to device", "copy to host")


def scenarios() -> Iterator[tuple[str, Scenario]]:
    """Yield the name of each scenario, and the scenario."""
    for name, recipe in _RECIPES.items():
        for precision in (*PRECISIONS, "bf16-true"):
            yield f"graphs/{name}/{precision}", partial(_run, recipe=recipe, precision=precision)


def _run(watch: Watch, *, recipe: str, precision: str) -> None:
    encoder, dtype = encoder_of(watch, recipe, precision)
    autocast = PRECISIONS.get(precision)

    def forward(batch: Packed) -> None:
        with torch.inference_mode(), nullcontext() if autocast is None else torch.autocast("cuda", autocast):
            encoder(batch)

    with watch.unwatched():
        batches = [waveforms_of(seconds).to("cuda") for seconds in _BATCHES]
        batches = [Packed(samples.to(dtype), layout) for samples, layout in batches]
        captures = [_captured(watch, encoder, partial(forward, batch)) for batch in batches]
        forward(batches[0])  # another bucket than that of the last capture
        count = len(watch.mode.captures)
    for batch in batches:
        with watch.phase("replay"):
            forward(batch)
    first, *same, other = [record.trace or [] for record in captures]
    watch.found.notes |= {
        "captures": count,
        "captures while replayed": len(watch.mode.captures) - count,
        "captured waits": sum((record.waits for record in captures), Counter()),
        "captured copies": sum(record.launches[name] for record in captures for name in _COPIES),
        "states": encoder.config.num_hidden_layers + 1,
        "captured launches": sum(captures[0].launches.values()),
        "differences": [_difference(first, trace) for trace in same if trace != first],
        "another bucket differs": other != first,
    }


def _captured(watch: Watch, encoder: SpeechEncoder, forward: partial[None]) -> Record:
    """Capture what a batch launches, in a graph of its own."""
    encoder.use_cuda_graphs()
    forward()
    return watch.mode.captures[-1]


def _difference(first: list[str], second: list[str]) -> str:
    """Return the first step in which two traces differ."""
    return next(f"{one} and {other}" for one, other in zip_longest(first, second) if one != other)

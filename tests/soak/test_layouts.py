"""Random batches: the features of an utterance are those it has alone, bit for bit, whatever it is batched with."""

import dataclasses
import random
from typing import Any

import torch

from fastssl.models.config import SpeechEncoderConfig
from fastssl.models.speech_encoder import SpeechEncoder
from fastssl.packing import Packed
from fastssl.train.systems import build_model
from tests.soak.cases import generator
from tests.soak.conftest import Count
from tests.train.conftest import model_of

_COMPRESSORS: tuple[dict[str, Any], ...] = (
    {},
    {"compressor": "average", "compressor_factor": 2},
    {"compressor": "strided", "compressor_factor": 3},
    {"compressor": "integrate-and-fire"},
)


def _configs() -> list[SpeechEncoderConfig]:
    """Return tiny models with both norms of the front end and both orders of the layer norm, plain and compressed."""
    first = [model_of(system) for system in ("wav2vec2", "wavlm", "best-rq")]
    large: dict[str, Any] = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
    first.append(dataclasses.replace(model_of("wav2vec2"), **large))
    return [dataclasses.replace(config, **changes) for config in first for changes in _COMPRESSORS]


def _length(random: random.Random) -> int:
    """Draw a length in samples: none, less than a frame, a few frames, or up to 2 s."""
    return random.choice((0, random.randrange(400), random.randrange(400, 3000), random.randrange(3000, 32_000)))


@torch.inference_mode()
def _differs(encoder: SpeechEncoder, random: random.Random) -> str | None:
    """Return what differs between a random batch and its utterances alone."""
    lengths = [_length(random) for _ in range(random.randrange(1, 9))]
    torch.manual_seed(random.randrange(2**31))
    waveforms = [torch.randn(length, 1) for length in lengths]
    fires = encoder.compressor is not None and encoder.compressor.factor is None
    rates = torch.rand(len(lengths)) * 2 if fires else None
    together = encoder(Packed.pack(waveforms), rate=rates)
    states = [together.features, *together.hidden_states]
    for index, waveform in enumerate(waveforms):
        alone = encoder(Packed.pack([waveform]), rate=None if rates is None else rates[index : index + 1])
        for number, (one, other) in enumerate(zip(states, [alone.features, *alone.hidden_states], strict=True)):
            if not torch.equal(one.unpack()[index], other.values):
                return f"utterance {index} of {lengths}, state {number}"
    return None


def test_batch_mates_change_nothing(count: Count, seed: int) -> None:
    torch.manual_seed(seed)
    encoders = [build_model(config).speech_encoder.eval() for config in _configs()]
    wrong = []
    for case in range(count(300)):
        random = generator(seed, case)
        number = random.randrange(len(encoders))
        if (text := _differs(encoders[number], random)) is not None:
            wrong.append(f"case {case}, model {number}: {text}")
    assert not wrong, "\n".join(wrong[:20])

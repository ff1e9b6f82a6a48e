"""WavLM pre-training (Chen et al. 2021, arXiv 2110.13900), on packed batches: HuBERT's objective on mixed utterances.

The targets are those of the clean utterance, so the model learns to denoise. In training, an utterance may be mixed
with another from its batch, so its input depends on the batch. The features of a given waveform do not.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastssl.kernels import splitmix
from fastssl.models.bounds import bounded
from fastssl.models.encoder import Encoder
from fastssl.models.hubert import HubertConfig, HubertForPreTraining
from fastssl.models.pretraining import Needs, PredictionOutput, StepContext
from fastssl.nn.random import noise_seeds, uniform
from fastssl.nn.waveforms import as_samples, normalize_waveforms
from fastssl.packing import Packed, send

if TYPE_CHECKING:
    from fastssl.data.batches import AudioBatch

_STREAM_MIXING, _STREAM_PARTNERS = 5, 6
#: Energy of the utterance relative to that of the signal mixed into it, in dB: lowest, highest if that signal is
#: speech, and highest if it is noise.
_LOWEST_DB, _HIGHEST_SPEECH_DB, _HIGHEST_NOISE_DB = -5.0, 5.0, 20.0


@dataclass(frozen=True)
class WavLMConfig(HubertConfig):
    """HuBERT's settings, for an encoder with gated relative position bias, and how to mix utterances.

    Args:
        mixing_prob: Fraction of the training utterances that speech or noise is mixed into.
        mixing_noise_prob: Fraction of these that are mixed with a recording from data.noise; the rest are mixed with
            another utterance of their batch. Without data.noise, all are mixed with another utterance.

    Raises:
        ValueError: A value is out of bounds, or values do not fit together.
    """

    model_type: str = "wavlm"
    mixing_prob: float = bounded(0.2, least=0, most=1)
    mixing_noise_prob: float = bounded(0.1, least=0, most=1)

    @property
    def noise_share(self) -> float:
        """Fraction of the training utterances that need a noise recording, from 0 to 1."""
        return self.mixing_prob * self.mixing_noise_prob


class WavLMForPreTraining(HubertForPreTraining):
    """`HubertForPreTraining` with WavLM's encoder and mixed input; the encoder has the parameter names of Transformers.

    Args:
        config: Shape of the encoder, and settings of the objective and of the mixing.
    """

    title = "WavLM"
    encoder_name = "wavlm"
    config_class = WavLMConfig
    needs = Needs(labels=True, noise=True)
    config: WavLMConfig
    wavlm: Encoder

    def step(self, batch: "AudioBatch", context: StepContext) -> PredictionOutput:
        """Run HuBERT's step: on mixed utterances in training mode, on clean ones in evaluation mode."""
        if self.training:
            (keys,) = send([context.keys], batch.waveforms.values.device)
            waveforms = mix_utterances(batch.waveforms, keys, self.config, noise=batch.noise)
            batch = replace(batch, waveforms=waveforms)
        return super().step(batch, context)


def mix_utterances(waveforms: Packed, keys: Tensor, config: WavLMConfig, *, noise: Packed | None = None) -> Packed:
    """Mix a part of another utterance, or of a recording of noise, into some of the utterances of a batch.

    The part is at most half as long as the utterance and at most as long as its source. Its positions in both are
    random. It is scaled so that the energies of the whole clean signals have a random ratio from -5 dB to 5 dB (speech)
    or 20 dB (noise). Silent utterances are left unmixed, and silent sources are not used. The public code
    (microsoft/UniSpeech, `mixing_collated_audios`) differs in one point: it mixes in place, so later utterances of a
    batch can receive parts of mixtures.

    Args:
        waveforms: (N,) or (N, 1) samples of B utterances.
        keys: (B,) int64 on the device of the waveforms. The mixture of an utterance depends on its key and on the other
            keys of the batch, but not on their order.
        config: Probabilities of mixing, and whether to scale mixtures to zero mean and unit variance.
        noise: (M,) or (M, 1) samples of noise in B sequences. An utterance whose sequence is not empty is mixed with
            it.

    Returns:
        (N, 1) samples; utterances that are not mixed are unchanged.
    """
    waveforms = as_samples(waveforms)
    noise = None if noise is None else as_samples(noise, "noise")
    layout = replace(waveforms.layout)  # a copy, because a layout caches the indices that are computed from it
    batch, device = len(layout.lengths), waveforms.values.device
    if batch == 0:
        return waveforms
    index = torch.arange(batch, device=device)
    clean = waveforms.values
    lengths, starts, powers = layout.device_lengths, layout.cu_seqlens[:-1].long(), _powers(waveforms)
    partner, is_noise, probability = _partners(keys), torch.zeros_like(index, dtype=torch.bool), config.mixing_prob
    sources, source_lengths, source_starts, source_powers = clean, lengths, starts, powers
    if noise is not None:
        sources = torch.cat((clean, noise.values))
        source_lengths = torch.cat((lengths, noise.layout.device_lengths))
        source_starts = torch.cat((starts, noise.layout.cu_seqlens[:-1] + len(clean)))
        source_powers = torch.cat((powers, _powers(noise)))
        is_noise = noise.layout.device_lengths > 0
        partner = torch.where(is_noise, batch + index, partner)
        # Utterances with noise have been drawn already; this is the probability of speech for the others.
        probability = (config.mixing_prob - config.noise_share) / max(1 - config.noise_share, 1e-9)

    drawn = uniform(keys.unsqueeze(1), torch.arange(5, device=device), stream=_STREAM_MIXING).double()
    whether, long, place, place_in_source, loud = drawn.unbind(1)
    length = torch.floor(long * (lengths // 2 + 1)).long().minimum(source_lengths[partner])
    start = torch.floor(place * (lengths - length + 1)).long()
    source_start = torch.floor(place_in_source * (source_lengths[partner] - length + 1)).long()
    highest = torch.where(is_noise, _HIGHEST_NOISE_DB, _HIGHEST_SPEECH_DB)
    ratio = 10 ** ((_LOWEST_DB + (highest - _LOWEST_DB) * loud) / 10)
    mixes = is_noise | ((whether < probability) & (partner != index))
    # A factor that is not positive and finite comes from silence, or from samples too small or too large for fp32.
    factor = (powers / (source_powers[partner] * ratio)).sqrt().to(clean.dtype)
    mixes &= (length > 0) & (factor > 0) & (factor < torch.inf)
    scale = torch.where(mixes, factor, 0.0)

    ids = layout.sequence_ids
    offset = layout.positions - start[ids]
    inside = (offset >= 0) & (offset < length[ids]) & mixes[ids]
    rows = torch.where(inside, (source_starts[partner] + source_start)[ids] + offset, 0)
    added = torch.where(inside.unsqueeze(1), sources.index_select(0, rows) * scale[ids].unsqueeze(1), 0.0)
    mixed = Packed(clean + added, waveforms.layout)
    if config.do_normalize:
        normalised = normalize_waveforms(mixed).values
        mixed = Packed(torch.where(mixes[ids].unsqueeze(1), normalised, clean), waveforms.layout)
    return mixed


def _partners(keys: Tensor) -> Tensor:  # (B,) -> (B,)
    """Return the index of a random partner for each utterance (its own in a batch of one), whatever their order."""
    seeds = noise_seeds(keys, torch.zeros_like(keys), stream=_STREAM_PARTNERS)
    ranks = splitmix.mix(seeds.unsqueeze(1) ^ keys)
    ranks.fill_diagonal_(torch.iinfo(ranks.dtype).max)
    return ranks.argmin(1)


def _powers(signals: Packed) -> Tensor:  # (B,)
    """Return the mean square of each signal in fp64, 0 if empty.

    Each signal is summed on its own, so that its bits do not depend on the batch.
    """
    squares = torch.stack([signal.double().square().sum() for signal in signals.unpack()])
    return squares / signals.layout.divisors

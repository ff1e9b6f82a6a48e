"""WavLM pre-training (Chen et al. 2021, arXiv 2110.13900), on packed batches: HuBERT's objective on mixed utterances.

Targets stay those of the clean utterance, so the model learns to denoise. Because an utterance may be mixed with
another of its batch, batch-mates change the training input; the features of given audio still depend on it alone.
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
from fastssl.packing import Packed

if TYPE_CHECKING:
    from fastssl.data.batches import AudioBatch

_STREAM_MIXING, _STREAM_PARTNERS = 5, 6
#: Energy of the utterance over that of what is mixed into it, dB: lowest, highest with speech, highest with noise.
_LOWEST_DB, _HIGHEST_SPEECH_DB, _HIGHEST_NOISE_DB = -5.0, 5.0, 20.0
_EPS = 1e-7  # of the variance, as `data.waveforms.pack_waveforms` has it


@dataclass(frozen=True)
class WavLMConfig(HubertConfig):
    """HuBERT's objective, an encoder with gated relative position bias, and how utterances are mixed.

    Args:
        mixing_prob: Fraction of the training utterances that something is mixed into.
        mixing_noise_prob: Fraction of these that a recording of `data.noise` is mixed into; the others, and all if
            `data.noise` is not given, are mixed with another utterance of their batch.
    """

    model_type: str = "wavlm"
    mixing_prob: float = bounded(0.2, least=0, most=1)
    mixing_noise_prob: float = bounded(0.1, least=0, most=1)

    @property
    def noise_share(self) -> float:
        """The fraction of training utterances to read a recording of noise for."""
        return self.mixing_prob * self.mixing_noise_prob


class WavLMForPreTraining(HubertForPreTraining):
    """`HubertForPreTraining` with WavLM's encoder and input; the encoder's names are those of Transformers.

    Args:
        config: Shape, objective and mixing.
    """

    title = "WavLM"
    encoder_name = "wavlm"
    config_class = WavLMConfig
    needs = Needs(labels=True, noise=True)
    config: WavLMConfig
    wavlm: Encoder

    def step(self, batch: "AudioBatch", context: StepContext) -> PredictionOutput:
        """HuBERT's step; in training mode on the mixture, in evaluation mode on the clean utterances."""
        if self.training:
            waveforms = mix_utterances(batch.waveforms, context.keys, self.config, noise=batch.noise)
            batch = replace(batch, waveforms=waveforms)
        return super().step(batch, context)


def mix_utterances(waveforms: Packed, keys: Tensor, config: WavLMConfig, *, noise: Packed | None = None) -> Packed:
    """Mix part of another utterance, or of a noise, into some of the utterances of a batch.

    The part is at most half as long as the utterance and as long as its source, and its place in both is random. The
    energy ratio is that of the whole clean signals (public code: microsoft/UniSpeech, `mixing_collated_audios`, which
    mixes in place, so that there later utterances get mixtures of mixtures). Nothing is mixed into or from silence.

    Args:
        waveforms: (N, 1) samples of B utterances.
        keys: (B,) int64 on the device of the waveforms. The mixture is a function of the utterance's key and of the
            set of keys in the batch, whatever their order.
        config: Probabilities, and whether mixtures are normalised to zero mean and unit variance.
        noise: (M, 1) samples in B sequences; an utterance is mixed with its own sequence here if that is not empty.

    Returns:
        (N, 1), the mixtures; the samples of utterances without one are unchanged.
    """
    layout = replace(waveforms.layout)  # a copy, because the layout keeps the indices that are computed from it
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
        # The noise of some utterances is drawn already; this is the share of speech among the others.
        probability = (config.mixing_prob - config.noise_share) / max(1 - config.noise_share, 1e-9)

    drawn = uniform(keys.unsqueeze(1), torch.arange(5, device=device), stream=_STREAM_MIXING).double()
    whether, long, place, place_in_source, loud = drawn.unbind(1)
    length = torch.floor(long * (lengths // 2 + 1)).long().minimum(source_lengths[partner])
    start = torch.floor(place * (lengths - length + 1)).long()
    source_start = torch.floor(place_in_source * (source_lengths[partner] - length + 1)).long()
    highest = torch.where(is_noise, _HIGHEST_NOISE_DB, _HIGHEST_SPEECH_DB)
    ratio = 10 ** ((_LOWEST_DB + (highest - _LOWEST_DB) * loud) / 10)
    mixes = is_noise | ((whether < probability) & (partner != index))
    # Positive and finite: not from silence, nor from samples so small or so large that fp32 has no factor for them.
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
        normalised = torch.cat([_normalise(part) for part in mixed.unpack()])
        mixed = Packed(torch.where(mixes[ids].unsqueeze(1), normalised, clean), waveforms.layout)
    return mixed


def _partners(keys: Tensor) -> Tensor:  # (B,) -> (B,)
    """Another utterance of the batch for each, whatever their order; itself where there is no other."""
    seeds = noise_seeds(keys, torch.zeros_like(keys), stream=_STREAM_PARTNERS)
    ranks = splitmix.mix(seeds.unsqueeze(1) ^ keys)
    ranks.fill_diagonal_(torch.iinfo(ranks.dtype).max)
    return ranks.argmin(1)


def _powers(signals: Packed) -> Tensor:  # (B,)
    """Mean square of each signal, fp64, 0 for an empty one; each is summed alone, so batch-mates change no bit."""
    squares = torch.stack([signal.double().square().sum() for signal in signals.unpack()])
    return squares / signals.layout.device_lengths.clamp(min=1)


def _normalise(x: Tensor) -> Tensor:  # (T, 1)
    exact = x.double()
    centred = exact - exact.mean()
    return (centred / (centred.square().mean() + _EPS).sqrt()).to(x.dtype)

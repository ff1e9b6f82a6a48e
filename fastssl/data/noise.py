"""Recordings of noise that a system mixes into its training utterances."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from lhotse.cut import Cut

from fastssl.data.audio import AudioError, read_waveform
from fastssl.data.corpus import Problem, cut_name
from fastssl.data.waveforms import waveform_batch
from fastssl.names import encoded
from fastssl.packing import Packed


class NoiseProblem(Problem):
    """A recording of noise that cannot be used; its utterance is then used without noise."""


@dataclass(frozen=True)
class NoiseRecordings:
    """A corpus of noise.

    Args:
        cuts: Recordings of noise, at least one.
        share: Fraction of utterances that get noise.
        channel: Channel to read from recordings with several; None averages them.
    """

    cuts: tuple[Cut, ...]
    share: float
    channel: int | None = None

    def draw(self, utterance: str, *, seed: int, update: int) -> Cut | None:
        """Draw an utterance's noise for one update, as a function of the arguments alone; None if it gets no noise."""
        name = f"noise/{seed}/{update}/{utterance}"
        drawn = int.from_bytes(hashlib.blake2b(encoded(name), digest_size=8).digest(), "little")
        if drawn % (1 << 32) >= self.share * (1 << 32):
            return None
        return self.cuts[(drawn >> 32) % len(self.cuts)]

    def read(self, utterances: Sequence[str], *, seed: int, update: int) -> tuple[Packed, tuple[NoiseProblem, ...]]:
        """Draw and decode the noise of a batch.

        Args:
            utterances: Ids of the B utterances.
            seed: Seed of the run.
            update: Number of the optimiser update.

        Returns:
            The noise, (M, 1) samples at 16 kHz in B sequences (of length 0 for utterances without noise), and the
            recordings that cannot be decoded. Their utterances get no noise.
        """
        waveforms, problems = [], []
        for utterance in utterances:
            cut = self.draw(utterance, seed=seed, update=update)
            waveform = np.empty(0, np.float32)
            if cut is not None:
                try:
                    waveform = read_waveform(cut, channel=self.channel)
                except AudioError as error:
                    problems.append(NoiseProblem(f"noise {cut_name(cut)}", str(error)))
            waveforms.append(waveform)
        return waveform_batch(waveforms, normalize=False), tuple(problems)

"""BEST-RQ pre-training (Chiu et al. 2022, arXiv 2202.01855), on packed batches."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.data.segments import FrameSegments
from fastssl.models.bounds import bounded
from fastssl.models.config import MaskedConfig
from fastssl.models.conformer import (
    MEL_FRAMES_PER_FRAME,
    ConformerConfig,
    ConformerEncoder,
    subsampled_layout,
)
from fastssl.models.draws import Draws, draw_mask
from fastssl.models.pretraining import (
    PREDICTION,
    PredictionOutput,
    PretrainingModel,
    StepContext,
    count_codes,
    prediction_scores,
)
from fastssl.nn.linear import PackedLinear
from fastssl.nn.log_mel import mel_layout
from fastssl.nn.random import normal
from fastssl.nn.random_projection import RandomProjectionQuantizer
from fastssl.packing import Layout, Packed, send

if TYPE_CHECKING:
    from fastssl.data.batches import AudioBatch

_STREAM_NOISE = 4


@dataclass(frozen=True)
class BestRqConfig(MaskedConfig, ConformerConfig):
    """Encoder and objective of BEST-RQ; the defaults are those of SpeechBrain's recipe.

    Args:
        mask_noise_std: Standard deviation of the noise that replaces masked log-mel frames.
        codebook_size: Number of codes.
        codebook_dim: Width of the codes.

    Raises:
        ValueError: A value is out of bounds, or values do not fit together.
    """

    # SpeechBrain masks blocks of four mel frames, aligned to the 40 ms frames. Its mask_prob of 0.15 per mel frame and
    # mask_length of 4 mask 60 % of the 40 ms frames, each drawn independently.
    mask_time_prob: float = 0.6
    mask_time_length: int = 1
    mask_time_min_masks: int = 1
    mask_noise_std: float = bounded(0.1, least=0)
    codebook_size: int = bounded(8192, least=1)
    codebook_dim: int = bounded(16, least=1)


class BestRqForPreTraining(PretrainingModel):
    """Encoder, frozen random-projection quantiser that makes the targets, and classifier that predicts them.

    Args:
        config: Shape of the encoder, and settings of the objective.
    """

    title = "BEST-RQ"
    encoder_name = "best_rq"
    config_class = BestRqConfig
    main_scores = PREDICTION
    counts_codes = True
    config: BestRqConfig

    def __init__(self, config: BestRqConfig) -> None:
        super().__init__(config)
        self.best_rq = ConformerEncoder(config)
        self.quantizer = RandomProjectionQuantizer(
            MEL_FRAMES_PER_FRAME * config.num_mel_bins, codes=config.codebook_size, code_width=config.codebook_dim
        )
        self.classifier = PackedLinear(config.hidden_size, config.codebook_size)
        nn.init.xavier_uniform_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    @property
    def score_names(self) -> tuple[str, ...]:
        """Names of the values in `PredictionOutput.scores`, in the order of metrics.csv."""
        return prediction_scores(self.config)

    def step(self, batch: "AudioBatch", context: StepContext) -> PredictionOutput:
        """Run `forward` on a batch."""
        output: PredictionOutput = self(
            batch.waveforms,
            keys=context.keys,
            layer_drop=context.layer_drop,
            segments=batch.segments,
            draws=batch.draws,
        )
        return output

    @classmethod
    def draw(cls, config: BestRqConfig, samples: Layout, keys: Tensor, *, training: bool) -> Draws | None:
        """Draw the masks of the 40 ms frames."""
        return draw_mask(config, subsampled_layout(mel_layout(samples)), keys)

    def forward(
        self,
        waveforms: Packed,
        *,
        keys: Tensor,
        layer_drop: torch.Generator | None = None,
        segments: FrameSegments | None = None,
        draws: Draws | None = None,
    ) -> PredictionOutput:
        """Replace masked frames with noise, encode, and predict the codes of the masked frames.

        If the encoder has a compressor, each compressed frame predicts the codes of the masked frames in it.

        Args:
            waveforms: (N,) or (N, 1) samples at 16 kHz, already of zero mean and unit variance if `config.do_normalize`
                is true. A batch without utterances is allowed and adds nothing to the sums.
            keys: (B,) int64 from `nn.random.utterance_keys` or `draw_keys`. They determine the compression rate, mask
                and noise of each utterance. On the CPU, the host need not wait for a GPU to count the masked frames.
            layer_drop: CPU generator that decides which layers to skip; None uses PyTorch's global generator.
            segments: Segments of the 40 ms frames, which teach a compressor where to fire, or None.
            draws: Result of `draw` for these waveforms and keys, on the device of the waveforms; None draws here.
        """
        config = self.config
        mel = self.best_rq.extract_features(waveforms, normalize=False)
        layout = subsampled_layout(mel.layout)
        targets = self.targets(mel)
        device = waveforms.values.device
        draws = draw_mask(config, layout, keys).sent(device) if draws is None else draws
        rows = draws.rows
        masked_input = self._put_noise(mel, layout, send([keys], device)[0], rows)
        features, _, compressed = self.best_rq.encode(
            masked_input, layer_drop=layer_drop, **self.draw_compression(keys)
        )
        states = features.values if compressed is None else compressed.upsample(features.values)
        logits = self.classifier(states.index_select(0, rows)).float()  # (M, V)
        wanted = targets.index_select(0, rows)
        prediction_loss = F.cross_entropy(logits, wanted, reduction="sum")
        loss, compression = self.with_compression_loss(
            prediction_loss,
            compressed,
            draws.counts,
            segments,
        )
        return PredictionOutput(
            loss=loss,
            prediction_loss=prediction_loss.detach(),
            features_penalty=loss.new_zeros(()),
            correct=(logits.detach().argmax(1) == wanted).sum(),
            masked_frames=len(rows),
            code_counts=count_codes(targets, size=config.codebook_size),
            features=features,
            compression=compression,
        )

    def targets(self, mel: Packed) -> Tensor:  # (N_mel, bands) -> (N,)
        """Compute the target code of each encoder frame: frame t is quantised from mel frames 4t to 4t + 3.

        Args:
            mel: (N_mel, bands) log-mel frames from `extract_features`, before masking.

        Returns:
            (N,) int64 codes, one per encoder frame (40 ms).
        """
        layout = subsampled_layout(mel.layout)
        every = torch.arange(layout.total, device=mel.values.device)
        stacked = mel.values.index_select(0, _mel_rows(every, layout, mel.layout).flatten())
        codes: Tensor = self.quantizer(stacked.view(layout.total, MEL_FRAMES_PER_FRAME * self.config.num_mel_bins))
        return codes

    def _put_noise(self, mel: Packed, layout: Layout, keys: Tensor, rows: Tensor) -> Packed:
        """Replace mel frames 4t to 4t + 3 of each masked frame t with noise that depends only on key and position."""
        mel_rows = _mel_rows(rows, layout, mel.layout)  # (M, 4)
        bands = mel.values.shape[1]
        first = layout.positions[rows] * MEL_FRAMES_PER_FRAME * bands
        counters = first.unsqueeze(1) + torch.arange(MEL_FRAMES_PER_FRAME * bands, device=rows.device)
        noise = self.config.mask_noise_std * normal(
            keys[layout.sequence_ids[rows]].unsqueeze(1), counters, stream=_STREAM_NOISE
        )
        values = mel.values.index_copy(0, mel_rows.flatten(), noise.view(-1, bands).to(mel.values.dtype))
        return Packed(values, mel.layout)


def _mel_rows(rows: Tensor, layout: Layout, mel_layout: Layout) -> Tensor:  # (M,) -> (M, 4)
    """Return the rows in `mel_layout` of mel frames 4t to 4t + 3 for each encoder frame t, given by row in `layout`."""
    first = mel_layout.rows(layout.sequence_ids[rows], MEL_FRAMES_PER_FRAME * layout.positions[rows])
    return first.unsqueeze(1) + torch.arange(MEL_FRAMES_PER_FRAME, device=rows.device)

"""HuBERT pre-training (Hsu et al. 2021, arXiv 2106.07447), on packed batches."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.data.segments import FrameSegments
from fastssl.models.bounds import bounded
from fastssl.models.config import MaskedConfig
from fastssl.models.draws import Draws, draw_mask, masked_by_utterance
from fastssl.models.encoder import Encoder, EncoderConfig, Projected
from fastssl.models.losses import add_weighted
from fastssl.models.pretraining import (
    PREDICTION,
    Needs,
    PredictionOutput,
    PretrainingModel,
    StepContext,
    count_codes,
    features_penalty,
    prediction_scores,
)
from fastssl.nn.linear import PackedLinear
from fastssl.packing import Layout, Packed

if TYPE_CHECKING:
    from fastssl.data.batches import AudioBatch

#: Class of frames that do not count, for `torch.nn.functional.cross_entropy`.
_IGNORED = -100


@dataclass(frozen=True)
class HubertConfig(MaskedConfig, EncoderConfig):
    """Encoder, pre-training head and objective of HuBERT.

    The defaults are the values of fairseq's hubert_base_librispeech.yaml.

    Args:
        num_clusters: Number of classes to predict; must match the labels.
        final_dim: Width of the projected frames, and of the class embeddings that they are compared with.
        logit_temperature: Temperature that divides the cosine similarities.
        features_penalty_weight: Weight of the features penalty, the mean square of the front end's frames.

    Raises:
        ValueError: A value is out of bounds, or values do not fit together.
    """

    model_type: str = "hubert"
    activation_dropout: float = 0.0
    feat_proj_dropout: float = 0.1
    layerdrop: float = 0.05
    do_normalize: bool = False
    feature_grad_mult: float = 0.1
    mask_time_prob: float = 0.8
    num_clusters: int = bounded(100, least=2)
    final_dim: int = bounded(256, least=1)
    logit_temperature: float = bounded(0.1, above=0)
    features_penalty_weight: float = bounded(10.0, least=0)


class HubertForPreTraining(PretrainingModel):
    """Encoder, projection and one embedding per class; the encoder has the parameter names of Transformers.

    Args:
        config: Shape of the encoder, and settings of the objective.
    """

    title = "HuBERT"
    encoder_name = "hubert"
    config_class = HubertConfig
    needs = Needs(labels=True)
    main_scores = PREDICTION
    counts_codes = True
    config: HubertConfig
    hubert: Encoder

    def __init__(self, config: HubertConfig) -> None:
        super().__init__(config)
        self.add_module(self.encoder_name, Encoder(config))
        self.final_proj = PackedLinear(config.hidden_size, config.final_dim)
        self.label_embeddings = nn.Parameter(torch.rand(config.num_clusters, config.final_dim))

    @property
    def score_names(self) -> tuple[str, ...]:
        """Names of the values in `PredictionOutput.scores`, in the order of metrics.csv."""
        return prediction_scores(self.config)

    @property
    def speech_encoder(self) -> Encoder:
        """The encoder, without the head."""
        encoder = getattr(self, self.encoder_name)
        assert isinstance(encoder, Encoder)
        return encoder

    def step(self, batch: "AudioBatch", context: StepContext) -> PredictionOutput:
        """Run `forward` on a batch, with the labels of the batch as targets."""
        assert batch.labels is not None
        output: PredictionOutput = self(
            batch.waveforms,
            keys=context.keys,
            labels=batch.labels,
            layer_drop=context.layer_drop,
            segments=batch.segments,
            draws=batch.draws,
        )
        return output

    @classmethod
    def draw(cls, config: HubertConfig, samples: Layout, keys: Tensor, *, training: bool) -> Draws | None:
        """Draw the masks; None if a compressor decides on the frames."""
        return None if config.compressor != "none" else draw_mask(config, config.frame_layout(samples), keys)

    def forward(
        self,
        waveforms: Packed,
        *,
        keys: Tensor,
        labels: Tensor,
        layer_drop: torch.Generator | None = None,
        segments: FrameSegments | None = None,
        draws: Draws | None = None,
    ) -> PredictionOutput:
        """Mask spans of frames, encode, and predict the class of every masked frame.

        If the encoder has a compressor, spans of compressed frames are masked. All front-end frames that went into
        them count as masked, and the class of each of these is predicted.

        Args:
            waveforms: (N,) or (N, 1) samples at 16 kHz, already of zero mean and unit variance if `config.do_normalize`
                is true. A batch without utterances is allowed and adds nothing to the sums.
            keys: (B,) int64 from `nn.random.utterance_keys` or `draw_keys`. They determine the compression rate and the
                mask of each utterance. On the CPU, the host need not wait for a GPU to count the masked frames.
            labels: (T,) int64, the class of each front-end frame, from 0 to num_clusters - 1.
            layer_drop: CPU generator that decides which layers to skip; None uses PyTorch's global generator.
            segments: Segments of the front end's T frames, which teach a compressor where to fire, or None.
            draws: Result of `draw` for these waveforms and keys, on the device of the waveforms; None draws here.

        Raises:
            ValueError: `labels` does not have shape (T,).
        """
        config = self.config
        encoder = self.speech_encoder
        frames = encoder.extract_features(waveforms, normalize=False)
        if labels.shape != (frames.layout.total,):
            raise ValueError(
                f"labels: expected one for each frame, shape ({frames.layout.total},), got {tuple(labels.shape)}"
            )
        projected = encoder.project(frames, **self.draw_compression(keys))
        if draws is None:
            draws = draw_mask(config, projected.frames.layout, keys).sent(waveforms.values.device)
        return self.predict(
            frames,
            mask=draws.mask,
            rows=draws.rows,
            counts=draws.counts,
            labels=labels,
            layer_drop=layer_drop,
            projected=projected,
            segments=segments,
        )

    def predict(
        self,
        frames: Packed,
        *,
        mask: Tensor,
        labels: Tensor,
        rows: Tensor | None = None,
        counts: Tensor | None = None,
        layer_drop: torch.Generator | None = None,
        projected: Projected | None = None,
        segments: FrameSegments | None = None,
    ) -> PredictionOutput:
        """Compute the objective (arXiv 2106.07447, equations 1 and 3, for masked frames only) for a given mask.

        Args:
            frames: (T, C) front-end frames.
            mask: (N,) bool, one entry for each frame that enters the transformer, True if it is masked.
            labels: (T,) int64, the class of each front-end frame.
            rows: (M,) int64, `mask.nonzero()`, if the caller has it; None computes it, and the host waits.
            counts: (B,) fp32, `draws.masked_by_utterance`, if the caller has it; None computes it.
            layer_drop: As in `forward`.
            projected: `speech_encoder.project(frames)`, if the caller has it; None computes it.
            segments: As in `forward`.
        """
        config = self.config
        encoder = self.speech_encoder
        (hidden, layout), _, compressed = projected or encoder.project(frames)
        masked_input = torch.where(mask.unsqueeze(1), encoder.masked_spec_embed.to(hidden.dtype), hidden)
        features = encoder.encoder(Packed(masked_input, layout), layer_drop=layer_drop)[-1]

        states = features.values
        if compressed is not None:
            mask, states = compressed.upsample(mask), compressed.upsample(states)
            rows = counts = None  # of the front end's frames, which only the device knows
        if rows is None and (compressed is None or mask.device.type == "cpu"):
            rows = mask.nonzero().squeeze(1)
        prediction_loss, correct = self._prediction(states, labels, mask, rows)
        masked = masked_by_utterance(mask, frames.layout) if counts is None else counts
        penalty = features_penalty(frames, masked)
        loss, compression = self.with_compression_loss(
            add_weighted(prediction_loss, (config.features_penalty_weight, penalty)),
            compressed,
            masked,
            segments,
        )
        return PredictionOutput(
            loss=loss,
            prediction_loss=prediction_loss.detach(),
            features_penalty=penalty.detach(),
            correct=correct,
            masked_frames=mask.sum() if rows is None else len(rows),
            code_counts=count_codes(labels, size=config.num_clusters),
            features=features,
            compression=compression,
        )

    def _prediction(
        self, states: Tensor, labels: Tensor, mask: Tensor, rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:  # (), ()
        """Return the summed cross-entropy of the classes of the masked frames, and how many of them are predicted.

        Without `rows`, the host would have to wait for their number, so the other frames are computed too and ignored.
        """
        if rows is None:
            targets = torch.where(mask, labels, _IGNORED)
        else:
            states, targets = states.index_select(0, rows), labels.index_select(0, rows)
        logits = self._logits(self.final_proj(states))
        loss = F.cross_entropy(logits, targets, ignore_index=_IGNORED, reduction="sum")
        return loss, (logits.argmax(1) == targets).sum()

    def _logits(self, x: Tensor) -> Tensor:  # (M, final_dim) -> (M, num_clusters) fp32
        """Return cosine similarities divided by the temperature, in fp32 because bf16 is not precise enough."""
        with torch.autocast(x.device.type, enabled=False):
            x = F.normalize(x.float(), dim=1)
            return x @ F.normalize(self.label_embeddings.float(), dim=1).t() / self.config.logit_temperature

"""wav2vec 2.0 pre-training (Baevski et al. 2020, arXiv 2006.11477), on packed batches."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from fastssl import ops
from fastssl.data.segments import FrameSegments
from fastssl.models.bounds import bounded, check_bounds
from fastssl.models.compression import CompressionScores
from fastssl.models.config import MaskedConfig
from fastssl.models.encoder import Encoder, EncoderConfig, Projected
from fastssl.models.pretraining import (
    ACCURACY,
    PretrainingModel,
    Score,
    StepContext,
    draw_mask,
    features_penalty,
    masked_by_utterance,
    perplexity,
)
from fastssl.nn.linear import PackedLinear
from fastssl.nn.masking import sample_negatives
from fastssl.nn.quantizer import GumbelQuantizer
from fastssl.nn.random import noise_seeds
from fastssl.packing import Layout, Packed

if TYPE_CHECKING:
    from fastssl.data.batches import AudioBatch

_STREAM_GUMBEL = 3


@dataclass(frozen=True)
class GumbelTemperature:
    """Temperature of the Gumbel softmax that chooses codes: start * decay^update, never below end.

    Args:
        start: Temperature of the first update.
        end: The lowest temperature.
        decay: Factor per update.
    """

    start: float = bounded(2.0, above=0)
    end: float = bounded(0.5, above=0)
    decay: float = bounded(0.999995, above=0, most=1)

    def __post_init__(self) -> None:
        check_bounds(self, "gumbel_temperature.")

    def at(self, update: int) -> float:
        """The temperature of an update, counted from 0."""
        return float(max(self.end, self.start * self.decay**update))


@dataclass(frozen=True)
class Wav2Vec2Config(MaskedConfig, EncoderConfig):
    """An encoder with its pre-training head and objective; names of Transformers' `Wav2Vec2Config`.

    The defaults are the values of fairseq's wav2vec2_base_librispeech.yaml.

    Args:
        num_negatives: Distractors per masked frame.
        contrastive_logits_temperature: Temperature of the contrastive loss.
        num_codevector_groups: Groups of the quantiser.
        num_codevectors_per_group: Codes in each group.
        codevector_dim: Width of the quantised vector.
        proj_codevector_dim: Width in which context and target are compared.
        feat_quantizer_dropout: Dropout on the frames that the quantiser takes.
        diversity_loss_weight: Weight of the diversity loss.
        features_penalty_weight: Weight of the mean square of the front end's frames (fairseq: 10).
        gumbel_temperature: Schedule of the quantiser's temperature in training, which `config.json` does not keep.
    """

    activation_dropout: float = 0.0
    feat_proj_dropout: float = 0.1
    layerdrop: float = 0.05
    do_normalize: bool = False
    feature_grad_mult: float = 0.1
    num_negatives: int = bounded(100, least=1)
    contrastive_logits_temperature: float = bounded(0.1, above=0)
    num_codevector_groups: int = bounded(2, least=1)
    num_codevectors_per_group: int = bounded(320, least=1)
    codevector_dim: int = bounded(256, least=1)
    proj_codevector_dim: int = bounded(256, least=1)
    feat_quantizer_dropout: float = bounded(0.1, least=0, below=1)
    diversity_loss_weight: float = bounded(0.1, least=0)
    features_penalty_weight: float = bounded(10.0, least=0)
    gumbel_temperature: GumbelTemperature = field(default_factory=GumbelTemperature)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.codevector_dim % self.num_codevector_groups:
            raise ValueError(
                f"codevector_dim: {self.codevector_dim} is not divisible by num_codevector_groups="
                f"{self.num_codevector_groups}"
            )


@dataclass(frozen=True)
class PretrainingOutput:
    """Loss and statistics of one batch; sums over its M masked frames unless a line says otherwise."""

    loss: Tensor  # () fp32, contrastive + weighted diversity and features penalty
    contrastive_loss: Tensor  # () fp32, nats
    diversity_loss: Tensor  # () fp32 in [0, 1), of the batches of all processes; not a sum
    features_penalty: Tensor  # () fp32, over utterances: mean square of its frames x its masked frames
    correct: Tensor  # () int64, masked frames whose own target scores highest
    chance: Tensor  # () fp32, of 1 / (1 + negatives)
    masked_frames: int  # M
    code_perplexity: Tensor  # (G,) fp32, of the chosen codes; not a sum
    prob_perplexity: Tensor  # (G,) fp32, of the mean probabilities of all processes; not a sum
    features: Packed  # (N, D) of the masked input
    compression: CompressionScores | None = None

    @property
    def code_counts(self) -> None:
        """Of several groups there is no one distribution; the perplexities are among the scores."""
        return None

    def scores(self) -> dict[str, Tensor]:
        """Sums by the names of `Wav2Vec2ForPreTraining.score_names`."""
        frames = self.masked_frames
        groups = range(len(self.code_perplexity))
        return {
            "contrastive_loss": self.contrastive_loss,
            "accuracy": self.correct,
            "chance": self.chance,
            "diversity_loss": self.diversity_loss * frames,
            "features_penalty": self.features_penalty,
            # No sum over batches gives the perplexity of their union: an average by masked frames stands for it.
            **{f"code_perplexity_{group}": self.code_perplexity[group] * frames for group in groups},
            **{f"prob_perplexity_{group}": self.prob_perplexity[group] * frames for group in groups},
            **({} if self.compression is None else self.compression._asdict()),
        }


class Wav2Vec2ForPreTraining(PretrainingModel):
    """Encoder, quantiser and projections; the state dict is that of Transformers' class of this name.

    Args:
        config: Shape and objective.
    """

    title = "wav2vec 2.0"
    encoder_name = "wav2vec2"
    config_class = Wav2Vec2Config
    main_scores: ClassVar = {"contrastive_loss": Score("contrastive loss, nats", "contrastive loss"), **ACCURACY}
    config: Wav2Vec2Config

    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__(config)
        self.wav2vec2 = Encoder(config)
        self.dropout_features = nn.Dropout(config.feat_quantizer_dropout)
        self.quantizer = GumbelQuantizer(
            config.conv_dim[-1],
            groups=config.num_codevector_groups,
            codes=config.num_codevectors_per_group,
            width=config.codevector_dim,
        )
        self.project_hid = PackedLinear(config.hidden_size, config.proj_codevector_dim)
        self.project_q = PackedLinear(config.codevector_dim, config.proj_codevector_dim)

    @property
    def score_names(self) -> tuple[str, ...]:
        """As in `PretrainingOutput.scores`."""
        groups = range(self.config.num_codevector_groups)
        perplexities = [f"{kind}_perplexity_{group}" for kind in ("code", "prob") for group in groups]
        compression = CompressionScores._fields if self.config.draws_rates else ()
        names = ("contrastive_loss", "accuracy", "chance", "diversity_loss", "features_penalty")
        return (*names, *perplexities, *compression)

    def schedules(self, update: int) -> dict[str, float]:
        """The Gumbel softmax's temperature."""
        return {"temperature": self.config.gumbel_temperature.at(update)}

    def step(self, batch: "AudioBatch", context: StepContext) -> PretrainingOutput:
        """`forward` at the temperature of the update."""
        output: PretrainingOutput = self(
            batch.waveforms,
            keys=context.keys,
            gumbel_temperature=self.config.gumbel_temperature.at(context.update),
            layer_drop=context.layer_drop,
            segments=batch.segments,
        )
        return output

    def forward(
        self,
        waveforms: Packed,
        *,
        keys: Tensor,
        gumbel_temperature: float,
        layer_drop: torch.Generator | None = None,
        segments: FrameSegments | None = None,
    ) -> PretrainingOutput:
        """Compress where there is a compressor, mask, encode, quantise and compare.

        Args:
            waveforms: (N, 1) samples at 16 kHz; a batch of no utterances is legal and contributes nothing.
            keys: (B,) int64 from `nn.random.utterance_keys` or `draw_keys`, on the device of the waveforms; rate, mask,
                negatives and Gumbel noise of an utterance follow from its key.
            gumbel_temperature: Of the quantiser's softmax.
            layer_drop: CPU generator for the layers to skip; None takes torch's own.
            segments: Segments of the front end's T frames that a compressor should learn; None for no guidance.
        """
        config = self.config
        frames = self.wav2vec2.extract_features(waveforms)
        projected = self.wav2vec2.project(frames, **self.draw_compression(keys))
        layout = projected.frames.layout
        mask = draw_mask(config, layout, keys)
        rows = mask.nonzero().squeeze(1)  # the host waits for the device, once: it must know M
        negatives = sample_negatives(mask, layout, keys, count=config.num_negatives, rows=rows)
        seeds = self._gumbel_seeds(rows, layout, keys) if self.training else None
        return self.compare(
            frames,
            mask=mask,
            negatives=negatives,
            gumbel_seeds=seeds,
            gumbel_temperature=gumbel_temperature,
            layer_drop=layer_drop,
            rows=rows,
            projected=projected,
            segments=segments,
        )

    def _gumbel_seeds(self, rows: Tensor, layout: Layout, keys: Tensor) -> Tensor:  # (M,) -> (M,)
        codes = self.quantizer.groups * self.quantizer.codes
        return noise_seeds(keys[layout.sequence_ids[rows]], layout.positions[rows] * codes, stream=_STREAM_GUMBEL)

    def compare(
        self,
        frames: Packed,
        *,
        mask: Tensor,
        negatives: Tensor,
        gumbel_temperature: float,
        gumbel_noise: Tensor | None = None,
        gumbel_seeds: Tensor | None = None,
        layer_drop: torch.Generator | None = None,
        rows: Tensor | None = None,
        projected: Projected | None = None,
        segments: FrameSegments | None = None,
    ) -> PretrainingOutput:
        """The objective (arXiv 2006.11477, equations 2 to 4) with everything random already drawn.

        Args:
            frames: (T, C) of the front end.
            mask: (N,) bool, True where masked; of the frames that the transformer takes.
            negatives: (M, K) rows of masked frames, -1 for none.
            gumbel_temperature: Of the quantiser's softmax.
            gumbel_noise: (M, G * V) for the quantiser.
            gumbel_seeds: (M,) int64 from which it is drawn instead; neither for no noise.
            layer_drop: As in `forward`.
            rows: (M,) int64, `mask.nonzero()`, from a caller who has it.
            projected: `wav2vec2.project(frames)`, from a caller who has it.
            segments: As in `forward`.
        """
        config = self.config
        (hidden, layout), normalised, compressed = projected or self.wav2vec2.project(frames)
        masked_input = torch.where(mask.unsqueeze(1), self.wav2vec2.masked_spec_embed.to(hidden.dtype), hidden)
        features = self.wav2vec2.encoder(Packed(masked_input, layout), layer_drop=layer_drop)[-1]

        rows = mask.nonzero().squeeze(1) if rows is None else rows
        targets = self.dropout_features(normalised.index_select(0, rows))
        quantized = self.quantizer(targets, temperature=gumbel_temperature, noise=gumbel_noise, seeds=gumbel_seeds)
        losses, correct = ops.contrastive_loss(
            self.project_hid(features.values.index_select(0, rows)),
            self.project_q(quantized.values),
            negatives,
            temperature=config.contrastive_logits_temperature,
        )
        contrastive = losses.sum()
        prob_perplexity = perplexity(_mean_over_processes(quantized.probability_sums, len(rows)))
        total_codes = config.num_codevector_groups * config.num_codevectors_per_group
        diversity = (total_codes - prob_perplexity.sum()) / total_codes
        masked = masked_by_utterance(mask, layout)
        penalty = features_penalty(frames, masked)
        loss = contrastive + config.features_penalty_weight * penalty
        loss = loss + config.diversity_loss_weight * len(rows) * diversity
        loss, compression = self.with_compression_loss(loss, compressed, masked, segments)
        return PretrainingOutput(
            loss=loss,
            contrastive_loss=contrastive.detach(),
            diversity_loss=diversity.detach(),
            features_penalty=penalty.detach(),
            correct=correct.sum(),
            chance=(1 / (1 + (negatives >= 0).sum(1))).sum(),
            masked_frames=len(rows),
            code_perplexity=perplexity(quantized.counts / max(1, len(rows))),
            prob_perplexity=prob_perplexity.detach(),
            features=features,
            compression=compression,
        )


class _SumOverProcesses(torch.autograd.Function):
    """All-reduce whose backward is one too: every process's loss depends on every process's summand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        torch.distributed.all_reduce(grad)
        return grad


def _mean_over_processes(total: Tensor, frames: int) -> Tensor:  # (G, V) -> (G, V)
    """Mean over the masked frames of all processes, with gradient, from the sum over this one's."""
    count = torch.full((), frames, dtype=total.dtype, device=total.device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        total = _SumOverProcesses.apply(total)
        torch.distributed.all_reduce(count)
    return total / count.clamp(min=1)

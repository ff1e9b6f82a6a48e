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
from fastssl.models.draws import Draws, draw_mask, masked_by_utterance
from fastssl.models.encoder import Encoder, EncoderConfig, Projected
from fastssl.models.losses import add_weighted
from fastssl.models.pretraining import (
    ACCURACY,
    PretrainingModel,
    Score,
    StepContext,
    features_penalty,
    perplexity,
)
from fastssl.nn.linear import PackedLinear
from fastssl.nn.masking import choose_negatives, negative_choices
from fastssl.nn.quantizer import GumbelQuantizer
from fastssl.nn.random import noise_seeds
from fastssl.packing import Layout, Packed, send

if TYPE_CHECKING:
    from fastssl.data.batches import AudioBatch

_STREAM_GUMBEL = 3


@dataclass(frozen=True)
class GumbelTemperature:
    """Temperature of the Gumbel softmax that chooses codes: max(end, start * decay^update).

    Args:
        start: Temperature at the first update.
        end: Lowest temperature.
        decay: Factor that multiplies the temperature after each update.
    """

    start: float = bounded(2.0, above=0)
    end: float = bounded(0.5, above=0)
    decay: float = bounded(0.999995, above=0, most=1)

    def __post_init__(self) -> None:
        check_bounds(self, "gumbel_temperature.")

    def at(self, update: int) -> float:
        """Return the temperature at an update.

        Args:
            update: Number of the update, from 0.
        """
        return float(max(self.end, self.start * self.decay**update))


@dataclass(frozen=True)
class Wav2Vec2Config(MaskedConfig, EncoderConfig):
    """Encoder, pre-training head and objective of wav2vec 2.0, named as in Transformers' `Wav2Vec2Config`.

    The defaults are the values of fairseq's wav2vec2_base_librispeech.yaml.

    Args:
        num_negatives: Number of negatives (distractors) per masked frame.
        contrastive_logits_temperature: Temperature of the contrastive loss.
        num_codevector_groups: Number of groups of the quantiser.
        num_codevectors_per_group: Number of codes in each group.
        codevector_dim: Width of the quantised vector; must be divisible by num_codevector_groups.
        proj_codevector_dim: Width of the projected encoder outputs, and of the projected targets that they are compared
            with.
        feat_quantizer_dropout: Dropout on the quantiser's input.
        diversity_loss_weight: Weight of the diversity loss.
        features_penalty_weight: Weight of the features penalty, the mean square of the front end's frames.
        gumbel_temperature: Schedule of the quantiser's temperature in training; not written to `config.json`.

    Raises:
        ValueError: A value is out of bounds, or values do not fit together.
    """

    activation_dropout: float = 0.0
    feat_proj_dropout: float = 0.1
    layerdrop: float = 0.05
    do_normalize: bool = False
    feature_grad_mult: float = 0.1
    num_negatives: int = bounded(100, least=1, ceiling=65_536)
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
                f"codevector_dim: must be divisible by num_codevector_groups={self.num_codevector_groups}, "
                f"got {self.codevector_dim}"
            )


@dataclass(frozen=True)
class PretrainingOutput:
    """Loss and statistics of wav2vec 2.0 for one batch; sums over its M masked frames unless stated otherwise.

    Attributes:
        loss: () fp32, the value to minimise: contrastive loss, weighted diversity loss and features penalty, and the
            compressor's losses.
        contrastive_loss: () fp32, in nats.
        diversity_loss: () fp32 in [0, 1), not a sum; computed from the batches of all processes.
        features_penalty: () fp32, before weighting, from `pretraining.features_penalty`.
        correct: () int64, number of masked frames whose own target scores highest.
        chance: () fp32, sum of 1 / (1 + number of negatives), the accuracy of guessing.
        masked_frames: M, the number of masked frames.
        code_perplexity: (G,) fp32, not a sum; perplexity of the chosen codes of each group.
        argmax_perplexity: (G,) fp32, not a sum; perplexity of the codes with the largest logits, without noise. Its sum
            over the groups is what fairseq calls `code_perplexity`.
        prob_perplexity: (G,) fp32, not a sum; perplexity of the mean code probabilities over all processes.
        features: (N, D) last hidden state of the encoder for the masked input.
        compression: Scores of an integrate-and-fire compressor, or None.
    """

    loss: Tensor  # ()
    contrastive_loss: Tensor  # ()
    diversity_loss: Tensor  # ()
    features_penalty: Tensor  # ()
    correct: Tensor  # ()
    chance: Tensor  # ()
    masked_frames: int
    code_perplexity: Tensor  # (G,)
    argmax_perplexity: Tensor  # (G,)
    prob_perplexity: Tensor  # (G,)
    features: Packed  # (N, D)
    compression: CompressionScores | None = None

    @property
    def code_counts(self) -> None:
        """None: the quantiser has several groups of codes, so perplexities are reported per group, as scores."""
        return None

    def scores(self) -> dict[str, Tensor]:
        """Return sums over the masked frames as () tensors, by the names in `Wav2Vec2ForPreTraining.score_names`."""
        frames = self.masked_frames
        # Perplexities cannot be summed over batches; the mean, weighted by masked frames, is an approximation.
        perplexities = torch.stack([self.code_perplexity, self.prob_perplexity, self.argmax_perplexity]) * frames
        return {
            "contrastive_loss": self.contrastive_loss,
            "accuracy": self.correct,
            "chance": self.chance,
            "diversity_loss": self.diversity_loss * frames,
            "features_penalty": self.features_penalty,
            **dict(zip(perplexity_names(len(self.code_perplexity)), perplexities.flatten().unbind(), strict=True)),
            **({} if self.compression is None else self.compression._asdict()),
        }


def perplexity_names(groups: int) -> list[str]:
    """Return the names of the perplexities, those of the chosen codes first.

    Args:
        groups: G, the number of groups of codes.
    """
    return [f"{kind}_perplexity_{group}" for kind in ("code", "prob", "argmax") for group in range(groups)]


class Wav2Vec2ForPreTraining(PretrainingModel):
    """Encoder, quantiser and projections of wav2vec 2.0, with the state dict of Transformers' class of the same name.

    Args:
        config: Shape of the encoder, and settings of the objective.
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
        """Names of the values in `PretrainingOutput.scores`, in the order of metrics.csv."""
        perplexities = perplexity_names(self.config.num_codevector_groups)
        compression = CompressionScores._fields if self.config.draws_rates else ()
        names = ("contrastive_loss", "accuracy", "chance", "diversity_loss", "features_penalty")
        return (*names, *perplexities, *compression)

    def schedules(self, update: int) -> dict[str, float]:
        """Return the temperature of the Gumbel softmax at an update, under the name `temperature`."""
        return {"temperature": self.config.gumbel_temperature.at(update)}

    def step(self, batch: "AudioBatch", context: StepContext) -> PretrainingOutput:
        """Run `forward` on a batch, at the Gumbel temperature of the update."""
        output: PretrainingOutput = self(
            batch.waveforms,
            keys=context.keys,
            gumbel_temperature=self.config.gumbel_temperature.at(context.update),
            layer_drop=context.layer_drop,
            segments=batch.segments,
            draws=batch.draws,
        )
        return output

    @classmethod
    def draw(cls, config: Wav2Vec2Config, samples: Layout, keys: Tensor, *, training: bool) -> Draws | None:
        """Draw masks, negatives and seeds of the quantiser's noise; None if a compressor decides on the frames."""
        if config.compressor != "none":
            return None
        layout = config.frame_layout(samples)
        draws = draw_mask(config, layout, keys)
        return _draw_for_masked(config, draws, layout, keys, keys.device, training=training)

    def forward(
        self,
        waveforms: Packed,
        *,
        keys: Tensor,
        gumbel_temperature: float,
        layer_drop: torch.Generator | None = None,
        segments: FrameSegments | None = None,
        draws: Draws | None = None,
    ) -> PretrainingOutput:
        """Encode masked waveforms, quantise the masked frames, and compare them (arXiv 2006.11477, equations 2 to 4).

        If the encoder has a compressor, the compressed frames are masked and encoded.

        Args:
            waveforms: (N,) or (N, 1) samples at 16 kHz, already of zero mean and unit variance if `config.do_normalize`
                is true. A batch without utterances is allowed and adds nothing to the sums.
            keys: (B,) int64 from `nn.random.utterance_keys` or `draw_keys`. They determine the compression rate, mask,
                negatives and Gumbel noise of each utterance. On the CPU, the host need not wait for a GPU to count the
                masked frames.
            gumbel_temperature: Temperature of the quantiser's softmax.
            layer_drop: CPU generator that decides which layers to skip; None uses PyTorch's global generator.
            segments: Segments of the front end's T frames, which teach a compressor where to fire, or None.
            draws: Result of `draw` for these waveforms and keys, on the device of the waveforms; None draws here.
        """
        config = self.config
        frames = self.wav2vec2.extract_features(waveforms, normalize=False)
        projected = self.wav2vec2.project(frames, **self.draw_compression(keys))
        layout = projected.frames.layout
        if draws is None:
            draws = draw_mask(config, layout, keys)
            draws = _draw_for_masked(config, draws, layout, keys, waveforms.values.device, training=self.training)
        assert draws.negatives is not None
        return self.compare(
            frames,
            mask=draws.mask,
            negatives=draws.negatives,
            gumbel_seeds=draws.noise_seeds,
            gumbel_temperature=gumbel_temperature,
            layer_drop=layer_drop,
            rows=draws.rows,
            counts=draws.counts,
            projected=projected,
            segments=segments,
        )

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
        counts: Tensor | None = None,
        projected: Projected | None = None,
        segments: FrameSegments | None = None,
    ) -> PretrainingOutput:
        """Compute the objective (arXiv 2006.11477, equations 2 to 4) with all random choices given by the caller.

        Args:
            frames: (T, C) front-end frames.
            mask: (N,) bool, one entry for each frame that enters the transformer, True for the M masked ones.
            negatives: (M, K) int64 indices into the masked frames; -1 for no negative.
            gumbel_temperature: Temperature of the quantiser's softmax.
            gumbel_noise: (M, G * V) Gumbel noise for the quantiser.
            gumbel_seeds: (M,) int64 seeds to draw the noise from instead. If neither is given, no noise is added.
            layer_drop: As in `forward`.
            rows: (M,) int64, `mask.nonzero()`, if the caller has it; None computes it, and the host waits.
            counts: (B,) fp32, `draws.masked_by_utterance`, if the caller has it; None computes it.
            projected: `wav2vec2.project(frames)`, if the caller has it; None computes it.
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
        masked = masked_by_utterance(mask, layout) if counts is None else counts
        penalty = features_penalty(frames, masked)
        loss = add_weighted(contrastive, (config.features_penalty_weight, penalty))
        # Even with a weight of 0, because other processes may have masked frames, and backward adds over processes.
        loss = loss + config.diversity_loss_weight * len(rows) * diversity
        loss, compression = self.with_compression_loss(loss, compressed, masked, segments)
        counts = torch.stack([quantized.counts, quantized.plain_counts])
        code_perplexity, argmax_perplexity = perplexity(counts / max(1, len(rows)))
        return PretrainingOutput(
            loss=loss,
            contrastive_loss=contrastive.detach(),
            diversity_loss=diversity.detach(),
            features_penalty=penalty.detach(),
            correct=correct.sum(),
            chance=(1 + (negatives >= 0).sum(1)).reciprocal().sum(),
            masked_frames=len(rows),
            code_perplexity=code_perplexity,
            argmax_perplexity=argmax_perplexity,
            prob_perplexity=prob_perplexity.detach(),
            features=features,
            compression=compression,
        )


def _draw_for_masked(
    config: Wav2Vec2Config, draws: Draws, layout: Layout, keys: Tensor, device: torch.device, *, training: bool
) -> Draws:
    """Add negatives to a mask and, in training, seeds of the quantiser's noise; return all on a device.

    The mask is on the device of the keys. The hashes of M x K negatives are computed on `device`: they take the host
    longer than a GPU, which would have nothing to do meanwhile.
    """
    layout, rows, count = layout.beside(keys), draws.rows, config.num_negatives
    choices = negative_choices(draws.mask, layout, keys, rows, count=count)
    if training:
        counters = layout.positions[rows] * (config.num_codevector_groups * config.num_codevectors_per_group)
        seeds = noise_seeds(keys[layout.sequence_ids[rows]], counters, stream=_STREAM_GUMBEL)
        draws = draws._replace(noise_seeds=seeds)
    negatives = choose_negatives(*send(choices, device), count=count)
    return draws.sent(device)._replace(negatives=negatives)


class _SumOverProcesses(torch.autograd.Function):
    """All-reduce in forward and backward, because the loss of each process depends on the summands of all processes."""

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
    """Average over all processes' masked frames, with gradient; `total` is the sum over this process's `frames`."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return total / max(1, frames)
    total, count = _SumOverProcesses.apply(total), total.new_full((), frames)
    torch.distributed.all_reduce(count)
    return total / count.clamp(min=1)

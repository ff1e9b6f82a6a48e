"""Performance targets for the rows of `benchmarks.all`: ratios between measurements of the same run."""

from typing import NamedTuple


class Target(NamedTuple):
    """Target of one row.

    Args:
        row: Key of the row in a benchmark's `ROWS`.
        work: Description of the work in the printed table.
        speed: Lower limit of the rival's time divided by ours.
        against: Start of the rival's name. The rival is the fastest contender whose name starts so; "" matches every
            rival.
        memory: Upper limit of our peak memory divided by the rival's.
        limit: Upper limit of our time divided by the time of the row's first limit.
        share: (other row, ratio): upper limit of our time divided by our time in the other row.
    """

    row: str
    work: str
    speed: float | None = None
    against: str = ""
    memory: float | None = None
    limit: float | None = None
    share: tuple[str, float] | None = None


TARGETS: dict[str, list[Target]] = {
    "cpu": [
        Target("pretrain-base", "wav2vec 2.0 base pre-training step, `read-speech` batch of 4", 3, "", 1 / 3, 1.5),
        Target("encoder-train", "encoder training step, dropout 0.1, `read-speech` batch of 4", 1.5, "", 1 / 2, 1.35),
        Target("encoder-read-speech", "encoder forward, `read-speech` batch of 8", 1.4, limit=1.2),
        Target("encoder-even", "encoder forward, 8 utterances of 1.5 to 17 s drawn evenly", 1.9, limit=1.2),
        Target("encoder-one", "encoder forward, one 10 s utterance", 1.15, limit=1.15),
        Target("pretrain-tiny", "`wav2vec2-tiny` update, 12 crops of 4 s", 2),
        Target("front-end", "front end (7 layers), forward and backward, 15.6 s", 1.3, "", 1 / 2, 1.3),
        Target("contrastive-loss", "contrastive loss forward and backward, 900 x 100 x 256", 40, "", 1 / 20),
        Target("gumbel-quantize", "Gumbel quantiser forward and backward, 900 frames, 2 x 320 x 128", 10, "", 1 / 20),
        Target("integrate-and-fire", "integrate_and_fire forward and backward, 8 x 750 x 512", 4, limit=2),
        Target("attention-read-speech", "varlen_attention forward and backward, `read-speech`", 1.5, "SDPA, padded"),
        Target("attention-dropout", "the same with dropout 0.1", 1.5, "SDPA, padded"),
        Target("attention-equal", "varlen_attention forward and backward, `equal`", 0.95, "SDPA, padded"),
        Target("encoder-bf16", "encoder forward in bf16 against our fp32", 1.8, "ours in fp32", limit=1.45),
    ],
    "cuda": [
        Target(
            "pretrain-base", "pre-training step, base, `read-speech`, 800 s, bf16", 3, "Transformers, eager", 1 / 3, 2.5
        ),
        Target("pretrain-base", "the same against torch.compile", 2, "Transformers, torch.compile"),
        Target("front-end", "front end (7 layers), forward and backward, 800 s", 3, "Transformers, eager", limit=2),
        Target("attention-forward", "varlen_attention forward, `read-speech`", 1, "varlen_attn"),
        Target("attention-read-speech", "varlen_attention forward and backward, `read-speech`", 0.8, "varlen_attn"),
        Target("attention-forward-compressed", "varlen_attention forward, `after-compression`", 1, "varlen_attn"),
        Target(
            "attention-compressed", "varlen_attention forward and backward, `after-compression`", 0.8, "varlen_attn"
        ),
        Target("attention-bias", "varlen_attention with gated distance bias, `read-speech`", 5, "SDPA, dense bias"),
        Target(
            "contrastive-loss", "contrastive loss forward and backward of that step", 30, share=("pretrain-base", 0.02)
        ),
        Target("integrate-and-fire", "integrate_and_fire forward and backward", limit=1.25),
    ],
}

"""Fine-tune Wav2Vec2ForCTC as it is and accelerated, from the same weights on the same batches: loss, errors, time.

    python -m benchmarks.studies.finetune_ctc TRAIN DEVELOPMENT --label digits --model RUN/encoder --output result.json

TRAIN and DEVELOPMENT are folders of recordings with an `utterances.tsv`, whose column `--label` is spelled character by
character. Both models run the same script, `Learner.step`; one of them went through `fastssl.accelerate` before. Steps
alternate, in turns, so that both see the same machine; SpecAugment draws the same masks for both. Decoding audio and
padding batches are not timed.
"""

import argparse
import copy
import csv
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

import fastssl
from benchmarks.machine import describe
from fastssl.data.audio import resample

SAMPLE_RATE_HZ, BLANK, IGNORED = 16_000, 0, -100


class Utterance(NamedTuple):
    """A recording and what is said in it."""

    samples: NDArray[np.float32]  # at 16 kHz
    label: str


def read_utterances(folder: Path, label: str) -> list[Utterance]:
    """Decode the recordings of a folder.

    Raises:
        ValueError: There is no table, or it has no such column.
    """
    table = folder / "utterances.tsv"
    if not table.exists():
        raise ValueError(f"{table}: not there; it lists the recordings, with columns path and {label}")
    with table.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t"))
    if rows and label not in rows[0]:
        raise ValueError(f"{table}: no column {label!r}; there are {', '.join(rows[0])}")
    utterances = []
    for row in rows:
        samples, rate_hz = soundfile.read(folder / row["path"], dtype="float32")
        utterances.append(Utterance(resample(samples, rate_hz, SAMPLE_RATE_HZ), row[label]))
    return utterances


class Batch(NamedTuple):
    """What a data collator gives."""

    input_values: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T)
    labels: Tensor  # (B, L)


class Collator:
    """Padded batches, by Transformers' feature extractor.

    Args:
        utterances: Of which the alphabet is taken.
    """

    def __init__(self, utterances: Sequence[Utterance]) -> None:
        self.alphabet = sorted({character for utterance in utterances for character in utterance.label})
        self.extractor: Any = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)  # type: ignore[no-untyped-call]

    def __call__(self, utterances: Sequence[Utterance]) -> Batch:
        inputs = self.extractor(
            [utterance.samples for utterance in utterances],
            sampling_rate=SAMPLE_RATE_HZ,
            padding=True,
            return_tensors="pt",
        )
        codes = [[1 + self.alphabet.index(character) for character in u.label] for u in utterances]
        labels = torch.full((len(codes), max(map(len, codes))), IGNORED)
        for row, code in zip(labels, codes, strict=True):
            row[: len(code)] = torch.tensor(code)
        return Batch(inputs.input_values, inputs.attention_mask, labels)


def batches(utterances: Sequence[Utterance], size: int, *, seed: int) -> Iterator[list[Utterance]]:
    """Endless batches in a shuffled order, not sorted by length; a rest of each pass is dropped."""
    draw = np.random.default_rng(seed)
    while True:
        order = draw.permutation(len(utterances))
        for first in range(0, len(order) - size + 1, size):
            yield [utterances[i] for i in order[first : first + size]]


class Learner:
    """A model with its optimiser; the same code for the model as it is and for the accelerated one.

    Args:
        model: `Wav2Vec2ForCTC`.
        rate: Learning rate after the warm-up of a tenth of the steps, from where it falls to 0.
        steps: In all.
    """

    def __init__(self, model: Any, *, rate: float, steps: int) -> None:
        self.model = model.train()
        model.freeze_feature_encoder()
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
        warm_up = max(1, steps // 10)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up)),
        )

    def step(self, batch: Batch) -> tuple[float, float]:
        """The loss and the seconds of a step."""
        began = time.perf_counter()
        output = self.model(batch.input_values, attention_mask=batch.attention_mask, labels=batch.labels)
        self.optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        return output.loss.item(), time.perf_counter() - began

    @torch.no_grad()
    def error_rate(self, utterances: Sequence[Utterance], collate: Collator) -> float:
        """Edits over characters, of the likeliest path of each utterance on its own."""
        self.model.eval()
        edits = 0
        for utterance in utterances:
            batch = collate([utterance])
            path = self.model(batch.input_values, attention_mask=batch.attention_mask).logits[0].argmax(1)
            codes = [int(code) for code in path.unique_consecutive() if code != BLANK]
            edits += edit_distance("".join(collate.alphabet[code - 1] for code in codes), utterance.label)
        self.model.train()
        return edits / sum(len(utterance.label) for utterance in utterances)


def edit_distance(found: str, expected: str) -> int:
    """Insertions, deletions and substitutions from one to the other."""
    row = list(range(len(expected) + 1))
    for i, one in enumerate(found, 1):
        previous, row = row, [i]
        for j, other in enumerate(expected, 1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (one != other)))
    return row[-1]


def make_model(folder: Path | None, characters: int, seed: int) -> Any:
    """`Wav2Vec2ForCTC` on a pre-trained encoder, or of the tiny size with random weights."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {"vocab_size": characters + 1, "pad_token_id": BLANK, "ctc_loss_reduction": "mean"}
    options |= {"ctc_zero_infinity": True, "mask_time_length": 5}
    size: dict[str, Any] = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4}
    size |= {"intermediate_size": 768, "conv_dim": [128] * 7}
    model = (
        transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**size, **options))
        if folder is None
        else transformers.Wav2Vec2ForCTC.from_pretrained(folder, **options)
    )
    # Most frames are blank: a head that has to learn that first does so by gradients that ruin the encoder.
    with torch.no_grad():
        model.lm_head.bias[BLANK] = 3.0
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train", type=Path, help="folder of recordings with utterances.tsv")
    parser.add_argument("development", type=Path, help="another one, of which error rates are reported")
    parser.add_argument("--label", default="text", help="column with what is said")
    parser.add_argument("--model", type=Path, help="folder in Transformers' layout (default: random weights)")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=4, help="utterances of a step")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--every", type=int, default=50, help="steps between error rates")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    train, development = (read_utterances(folder, args.label) for folder in (args.train, args.development))
    collate = Collator(train)
    original = make_model(args.model, len(collate.alphabet), args.seed)
    accelerated = fastssl.accelerate(copy.deepcopy(original))
    learners = {
        name: Learner(model, rate=args.learning_rate, steps=args.steps)
        for name, model in (("accelerated", accelerated), ("original", original))
    }
    curve: list[dict[str, Any]] = []
    losses: dict[str, list[float]] = {name: [] for name in learners}
    seconds: dict[str, list[float]] = {name: [] for name in learners}
    audio_s, padded_s = 0.0, 0.0
    drawn = batches(train, args.batch, seed=args.seed)
    for step in range(args.steps):
        batch = collate(next(drawn))
        audio_s += float(batch.attention_mask.sum()) / SAMPLE_RATE_HZ
        padded_s += batch.attention_mask.numel() / SAMPLE_RATE_HZ
        for name in sorted(learners, reverse=step % 2 == 1):
            np.random.seed(step)  # noqa: NPY002 (what Transformers draws SpecAugment's masks from)
            torch.manual_seed(step)
            loss, step_s = learners[name].step(batch)
            losses[name].append(loss)
            seconds[name].append(step_s)
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            point: dict[str, Any] = {"step": step + 1}
            for name, learner in learners.items():
                point[name] = {
                    "loss": statistics.fmean(losses[name][-args.every :]),
                    "error_rate": learner.error_rate(development, collate),
                    "median_seconds": statistics.median(seconds[name][-args.every :]),
                }
            curve.append(point)
            print(_line(point), flush=True)
    pairs = list(zip(seconds["original"], seconds["accelerated"], strict=True))
    result = describe(torch.device("cpu")) | {
        "study": "finetune_ctc",
        "settings": {n: v for n, v in vars(args).items() if n not in ("train", "development", "model", "output")},
        "pretrained": args.model is not None,
        "parameters": sum(p.numel() for p in original.parameters()),
        "padded_over_audio": padded_s / audio_s,
        "audio_s_per_step": audio_s / args.steps,
        "curve": curve,
        "median_seconds_per_step": {name: statistics.median(values) for name, values in seconds.items()},
        "median_of_ratios": statistics.median(theirs / ours for theirs, ours in pairs),
        "steps_per_second_ratio": sum(seconds["original"]) / sum(seconds["accelerated"]),
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"steps per second: {result['steps_per_second_ratio']:.2f} times the original's")


def _line(point: dict[str, Any]) -> str:
    words = [f"step {point['step']:4d}"]
    for name in ("accelerated", "original"):
        values = point[name]
        words.append(
            f"{name}: loss {values['loss']:.3f}, errors {values['error_rate']:.3f}, {values['median_seconds']:.3f} s"
        )
    return "   ".join(words)


if __name__ == "__main__":
    main()

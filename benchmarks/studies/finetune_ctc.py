"""Fine-tune Transformers' Wav2Vec2ForCTC, original and accelerated, and compare loss, errors and time.

    python -m benchmarks.studies.finetune_ctc TRAIN DEVELOPMENT --label digits --model RUN/encoder --output result.json

TRAIN and DEVELOPMENT are folders of recordings with an `utterances.tsv`; the characters in its column `--label` are the
CTC targets. Both models start from the same weights, see the same batches and run the same code, `Learner.step`; one of
them has been passed to `fastssl.accelerate`. Their steps alternate, so that both see the machine in the same state.
SpecAugment draws the same masks for both. Decoding audio and padding batches are not timed.
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
    """A recording with its transcript."""

    samples: NDArray[np.float32]  # (T,) at 16 kHz
    label: str


def read_utterances(folder: Path, label: str) -> list[Utterance]:
    """Decode the recordings of a folder and resample them to 16 kHz.

    Args:
        folder: Folder with recordings and their table `utterances.tsv`.
        label: Column with the transcripts.

    Raises:
        ValueError: The table does not exist, or it lacks the column.
    """
    table = folder / "utterances.tsv"
    if not table.exists():
        raise ValueError(f"{table}: does not exist; expected a table of the recordings with columns path and {label}")
    with table.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t"))
    if rows and label not in rows[0]:
        raise ValueError(f"{table}: no column {label!r}; choose one of {', '.join(rows[0])}")
    utterances = []
    for row in rows:
        samples, rate_hz = soundfile.read(folder / row["path"], dtype="float32")
        utterances.append(Utterance(resample(samples, rate_hz, SAMPLE_RATE_HZ), row[label]))
    return utterances


class Batch(NamedTuple):
    """A padded batch, as Transformers' models take it."""

    input_values: Tensor  # (B, T) fp32
    attention_mask: Tensor  # (B, T), 1 for audio and 0 for padding
    labels: Tensor  # (B, L) int64, padded with -100


class Collator:
    """Makes padded batches with Transformers' feature extractor.

    Args:
        utterances: Training utterances, whose characters make up the alphabet.
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
    """Yield batches of `size` utterances without end, shuffled in each pass and not sorted by length.

    At the end of a pass, utterances that do not fill a whole batch are dropped.
    """
    draw = np.random.default_rng(seed)
    while True:
        order = draw.permutation(len(utterances))
        for first in range(0, len(order) - size + 1, size):
            yield [utterances[i] for i in order[first : first + size]]


class Learner:
    """A model with its optimiser and schedule; the same code trains the original and the accelerated model.

    Args:
        model: A `Wav2Vec2ForCTC`; its convolutions are frozen.
        rate: Highest learning rate, reached after a tenth of the steps; it then falls linearly to 0.
        steps: Total number of steps.
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
        """Take one optimiser step, and return its loss and its time in seconds."""
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
        """Return the character error rate (edits per character) of the likeliest path; utterances are not batched."""
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
    """Return the Levenshtein distance: the least number of insertions, deletions and substitutions."""
    row = list(range(len(expected) + 1))
    for i, one in enumerate(found, 1):
        previous, row = row, [i]
        for j, other in enumerate(expected, 1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (one != other)))
    return row[-1]


def make_model(folder: Path | None, characters: int, seed: int) -> Any:
    """Build a `Wav2Vec2ForCTC`.

    Args:
        folder: Pre-trained encoder in Transformers' layout; None for a tiny model with random weights.
        characters: Size of the alphabet.
        seed: Seed of the new weights.
    """
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
    # Most frames are blank. A head that must first learn this sends back gradients that ruin the encoder.
    with torch.no_grad():
        model.lm_head.bias[BLANK] = 3.0
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train", type=Path, help="folder of recordings with utterances.tsv")
    parser.add_argument("development", type=Path, help="folder of the same kind, for measuring error rates")
    parser.add_argument("--label", default="text", help="column with the transcripts")
    parser.add_argument("--model", type=Path, help="encoder in Transformers' layout (default: random weights)")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=4, help="number of utterances per step")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--every", type=int, default=50, help="number of steps between measurements of error rates")
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
            np.random.seed(step)  # noqa: NPY002 (Transformers draws SpecAugment's masks from the global generator)
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
    print(f"accelerated: {result['steps_per_second_ratio']:.2f} times as many steps per second as the original")


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

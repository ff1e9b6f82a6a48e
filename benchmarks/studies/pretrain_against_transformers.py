"""Pre-train wav2vec2-tiny with fastssl and with Transformers, and compare loss, accuracy and time per update.

    python -m benchmarks.studies.pretrain_against_transformers AUDIO --updates 800 --output result.json

Both models have the same size, initial weights, optimiser, schedule and batches; each library draws its own masks and
negatives. Updates alternate, so that both see the machine in the same state. The time covers masks, negatives, forward,
backward and optimiser step, but not the decoding of audio. Transformers does not report its accuracy, so it is computed
outside the timed part. At the end, the same code scores the weights of both on held-out recordings, with the same masks
and negatives and without Gumbel noise.
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils.data import DataLoader
from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices, _sample_negative_indices

from benchmarks.recipes import recipe_model
from fastssl.data.batches import AudioBatch, UpdateSampler, WaveformDataset, fixed_batches
from fastssl.data.corpus import Corpus, open_corpus, split_corpus
from fastssl.models.wav2vec2 import Wav2Vec2ForPreTraining
from fastssl.nn.random import utterance_keys

LEARNING_RATE, WARMUP, CLIP_NORM = 1e-3, 100, 10.0


class Learner:
    """A model with its optimiser and schedule.

    Args:
        model: Model to train.
        updates: Total number of updates; the learning rate rises for 100 of them, then falls linearly to 0.
    """

    def __init__(self, model: torch.nn.Module, updates: int) -> None:
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda u: (u + 1) / WARMUP if u < WARMUP else (updates - u) / max(1, updates - WARMUP)
        )

    def step(self, loss: torch.Tensor) -> None:
        """Take one optimiser step on a scalar loss."""
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.optimizer.step()
        self.schedule.step()


def temperature_at(update: int) -> float:
    """Return the Gumbel temperature of an update: 2 times 0.999 ** update, but at least 0.5."""
    return max(0.5, 2.0 * 0.999**update)


def step_here(learner: Learner, batch: AudioBatch, update: int, seed: int) -> dict[str, float]:
    """Do one update with fastssl; return loss and accuracy per masked frame, code perplexity and seconds."""
    began = time.perf_counter()
    output = learner.model(
        batch.waveforms, keys=utterance_keys(seed, update, batch.ids), gumbel_temperature=temperature_at(update)
    )
    learner.step(output.loss / output.masked_frames)
    seconds = time.perf_counter() - began
    frames = output.masked_frames
    return {
        "loss": output.contrastive_loss.item() / frames,
        "accuracy": output.correct.item() / frames,
        "perplexity": output.prob_perplexity.sum().item(),
        "seconds": seconds,
    }


def step_there(learner: Learner, padded: torch.Tensor, lengths: list[int], update: int) -> dict[str, float]:
    """Do one update with Transformers; return loss and accuracy per masked frame, code perplexity and seconds.

    Args:
        learner: Learner of a `transformers.Wav2Vec2ForPreTraining`.
        padded: (B, T) padded waveforms.
        lengths: Number of samples of each waveform.
        update: Number of the update, from 0.
    """
    model: Any = learner.model
    began = time.perf_counter()
    frames = model._get_feat_extract_output_lengths(torch.tensor(lengths))
    shape = (len(lengths), int(frames.max()))
    attention = torch.arange(shape[1]) < frames.unsqueeze(1)
    config = model.config
    masked = _compute_mask_indices(
        shape, config.mask_time_prob, config.mask_time_length, attention_mask=attention.long(), min_masks=2
    )
    negatives = torch.from_numpy(_sample_negative_indices(shape, config.num_negatives, masked))
    mask = torch.from_numpy(masked)
    model.set_gumbel_temperature(temperature_at(update))
    output = model(padded, mask_time_indices=mask, sampled_negative_indices=negatives)
    learner.step(output.loss / mask.sum())
    seconds = time.perf_counter() - began
    with torch.no_grad():
        context, targets = output.projected_states[mask], output.projected_quantized_states
        candidates = torch.cat([targets[mask].unsqueeze(1), targets.flatten(0, 1)[negatives[mask].long()]], 1)
        same = (candidates[:, 1:] == candidates[:, :1]).all(-1)
        scores = torch.cosine_similarity(context.unsqueeze(1), candidates, dim=-1)
        scores[:, 1:][same] = -torch.inf
        correct = (scores.argmax(1) == 0) & ~same.all(1)
    return {
        "loss": output.contrastive_loss.item() / int(mask.sum()),
        "accuracy": correct.float().mean().item(),
        "perplexity": output.codevector_perplexity.item(),
        "seconds": seconds,
    }


def make_learners(updates: int, seed: int) -> tuple[Learner, Learner]:
    """Return a fastssl learner and a Transformers learner with the same initial weights."""
    torch.manual_seed(seed)
    config = recipe_model("wav2vec2-tiny")  # its features penalty has weight 0; Transformers has none
    ours = Wav2Vec2ForPreTraining(config)
    values: dict[str, Any] = {
        name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()
    }
    theirs = transformers.Wav2Vec2ForPreTraining(transformers.Wav2Vec2Config(**values))
    theirs.load_state_dict(ours.state_dict())
    return Learner(ours, updates), Learner(theirs, updates)


def score(
    weights: dict[str, torch.Tensor], corpus: Corpus, *, crop_s: float, max_duration_s: float
) -> dict[str, float]:
    """Score weights on held-out recordings with fixed masks and negatives and without Gumbel noise.

    Args:
        weights: State dict of a `Wav2Vec2ForPreTraining` of size wav2vec2-tiny.
        corpus: Held-out recordings.
        crop_s: Length of the crop of each recording, in seconds.
        max_duration_s: Largest total duration of a batch, in seconds.

    Returns:
        Contrastive loss and accuracy per masked frame, and the number of masked frames.
    """
    model = Wav2Vec2ForPreTraining(recipe_model("wav2vec2-tiny")).eval()
    model.load_state_dict(weights)
    dataset = WaveformDataset(normalize=True)
    loss, correct, frames = 0.0, 0, 0
    for spec in fixed_batches(corpus.cuts, max_duration_s=max_duration_s, crop_s=crop_s, seed=0):
        batch = dataset[spec]
        with torch.no_grad():
            output = model(batch.waveforms, keys=utterance_keys(0, -1, batch.ids), gumbel_temperature=1.0)
        loss += output.contrastive_loss.item()
        correct += int(output.correct)
        frames += output.masked_frames
    return {"loss": loss / frames, "accuracy": correct / frames, "masked_frames": frames}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("audio", help="folder of recordings")
    parser.add_argument("--updates", type=int, default=800)
    parser.add_argument("--crop-s", type=float, default=4.0)
    parser.add_argument("--max-duration-s", type=float, default=48.0)
    parser.add_argument("--held-out", type=float, default=0.1, help="fraction of the recordings to hold out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    corpus = open_corpus(args.audio, min_duration_s=min(2.0, args.crop_s))
    train, held_out = split_corpus(corpus, fraction=args.held_out, seed=args.seed)
    sampler = UpdateSampler(train.cuts, max_duration_s=args.max_duration_s, crop_s=args.crop_s, seed=args.seed)
    batches = iter(DataLoader(WaveformDataset(normalize=True), sampler=sampler, batch_size=None))
    ours, theirs = make_learners(args.updates, args.seed)
    rows: list[dict[str, Any]] = []
    np.random.seed(args.seed)  # noqa: NPY002 (Transformers draws from the global generator)
    for update in range(args.updates):
        batch = next(batches)
        padded = batch.waveforms.to_padded().squeeze(-1)
        lengths = list(batch.waveforms.layout.lengths)
        row = {"update": update, "audio_s": batch.duration_s}
        row["fastssl"] = step_here(ours, batch, update, args.seed)
        row["transformers"] = step_there(theirs, padded, lengths, update)
        rows.append(row)
        if (update + 1) % 50 == 0:
            print(
                f"{update + 1:5d} " + "  ".join(_describe(rows[-50:], n) for n in ("fastssl", "transformers")),
                flush=True,
            )
    args.output.write_text(
        json.dumps(
            {
                "study": "pretrain_against_transformers",
                "machine": {"processor": _processor(), "threads": torch.get_num_threads()},
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
                "commit": commit,
                "settings": {name: value for name, value in vars(args).items() if name not in ("audio", "output")},
                "parameters": sum(parameter.numel() for parameter in ours.model.parameters()),
                "every_50_updates": [
                    {"update": first + len(rows[first : first + 50])}
                    | {name: _average(rows[first : first + 50], name) for name in ("fastssl", "transformers")}
                    for first in range(0, len(rows), 50)
                ],
                "held_out": {
                    name: score(
                        dict(learner.model.state_dict()),
                        held_out,
                        crop_s=args.crop_s,
                        max_duration_s=args.max_duration_s,
                    )
                    for name, learner in (("fastssl", ours), ("transformers", theirs))
                },
                "median_seconds_per_update": {
                    name: _average(rows, name)["median_seconds"] for name in ("fastssl", "transformers")
                },
                "median_of_ratios": statistics.median(
                    row["transformers"]["seconds"] / row["fastssl"]["seconds"] for row in rows
                ),
            },
            indent=2,
        )
        + "\n"
    )


def _processor() -> str:
    names = [line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return names[0] if names else platform.machine()


def _average(rows: list[dict[str, Any]], name: str) -> dict[str, float]:
    means = {key: statistics.fmean(row[name][key] for row in rows) for key in ("loss", "accuracy", "perplexity")}
    return means | {"median_seconds": statistics.median(row[name]["seconds"] for row in rows)}


def _describe(rows: list[dict[str, Any]], name: str) -> str:
    mean = _average(rows, name)
    return (
        f"{name}: loss {mean['loss']:.3f} accuracy {mean['accuracy']:.3f} "
        f"perplexity {mean['perplexity']:.1f} {mean['median_seconds']:.2f} s"
    )


if __name__ == "__main__":
    main()

"""Scores of the checkpoints of a run: quality of its layers, and loss and accuracy on held-out recordings."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from fastssl.data.batches import WaveformDataset, fixed_batches
from fastssl.data.corpus import open_corpus
from fastssl.eval.quality.measure import MAX_FRAMES, first_minutes, measure_quality, quality_loader
from fastssl.models.pretraining import PretrainingModel
from fastssl.models.speech_encoder import SpeechEncoder
from fastssl.models.wav2vec2 import Wav2Vec2ForPreTraining
from fastssl.nn.random import utterance_keys
from fastssl.train.config import renamed
from fastssl.train.systems import SYSTEMS, build_model


def quality_at(run: Path, update: int, audio: Path, *, minutes: float) -> dict[str, Any]:
    """Measure a checkpoint's loss on held-out recordings, and the quality of each of its layers.

    Args:
        run: Folder of a finished run; not of HuBERT, which would need labels.
        update: Update of the checkpoint, which must have been kept or be the last one.
        audio: Held-out recordings.
        minutes: Minutes of these recordings to use for the quality of layers.

    Returns:
        "held_out_loss", "accuracy", and "layers" with the fields of `LayerQuality`; None replaces NaN and infinity.
    """
    model = open_checkpoint(run, update)
    scores = held_out_scores(model, audio)
    layers = layer_quality(model.speech_encoder, audio, minutes=minutes)
    return {"held_out_loss": _finite(scores[model.score_names[0]]), "accuracy": scores["accuracy"], "layers": layers}


def layer_quality(
    encoder: SpeechEncoder, audio: Path, *, minutes: float, max_frames: int = MAX_FRAMES
) -> list[dict[str, Any]]:
    """Measure the quality of each layer without labels.

    Args:
        encoder: Encoder to measure.
        audio: Held-out recordings.
        minutes: Minutes of these recordings to use.
        max_frames: Largest number of frames for k-means.

    Returns:
        Fields of `LayerQuality` for each layer; None replaces NaN and infinity.
    """
    cuts = first_minutes(open_corpus(audio, min_duration_s=1.0).cuts, minutes)
    batches = quality_loader(cuts, normalize=encoder.config.do_normalize)
    layers = measure_quality(encoder, (batch.waveforms for batch in batches), max_frames=max_frames)
    return [{name: _finite(value) for name, value in asdict(layer).items()} for layer in layers]


def _finite(value: Any) -> Any:
    # JSON has no NaN.
    return None if isinstance(value, float) and not math.isfinite(value) else value


def open_checkpoint(run: Path, update: int | None = None) -> PretrainingModel:
    """Load the model of a run's checkpoint, in evaluation mode.

    Args:
        run: Folder of the run.
        update: Update of a checkpoint that was kept; None for the last checkpoint.

    Raises:
        ValueError: The run kept no checkpoint of this update.
    """
    settings = renamed(yaml.safe_load((run / "config.yaml").read_text()))
    model = build_model(SYSTEMS[settings["system"]].config_class.from_dict(settings["model"])).eval()
    kept = run / "checkpoints" / f"{update or 0:07d}.ckpt"
    state = torch.load(kept if kept.is_file() else run / "checkpoints" / "last.ckpt", weights_only=True)
    if update is not None and state["global_step"] != update:
        raise ValueError(f"{run}: kept no checkpoint of update {update}; its last is of update {state['global_step']}")
    model.load_state_dict({key.removeprefix("model."): tensor for key, tensor in state["state_dict"].items()})
    return model


@torch.inference_mode()
def held_out_scores(
    model: PretrainingModel, audio: Path, *, crop_s: float | None = None, draws: int = 8
) -> dict[str, float]:
    """Compute loss and accuracy of a model on held-out recordings.

    Spans are masked by the model's own settings; models with the same masking see the same spans, whatever their seed.
    With few masked frames the loss would be a mean over few values, so several masks are drawn per recording.

    Args:
        model: Model of a run.
        audio: Held-out recordings.
        crop_s: Length in seconds of the crop to score of each recording; None scores whole recordings.
        draws: Number of masks per recording.

    Returns:
        The model's scores by name, per masked frame.
    """
    cuts = open_corpus(audio, min_duration_s=1.0, window_s=60.0).cuts
    dataset = WaveformDataset(normalize=model.config.do_normalize)
    extra = {}
    if isinstance(model, Wav2Vec2ForPreTraining):
        extra["gumbel_temperature"] = model.config.gumbel_temperature.end
    sums: dict[str, float] = {}
    frames = 0
    for spec in fixed_batches(cuts, max_duration_s=60.0, crop_s=crop_s, seed=0):
        batch = dataset[spec]
        for draw in range(draws):
            output = model(batch.waveforms, keys=utterance_keys(0, -1 - draw, batch.ids), **extra)
            frames += output.masked_frames
            for name, value in output.scores().items():
                sums[name] = sums.get(name, 0.0) + float(value)
    return {name: value / frames for name, value in sums.items()}

"""Fine-tune a speech encoder for CTC with the `Trainer` of Transformers.

    python -m fastssl.data.synthetic SPEECH --minutes 30       # or your own recordings
    python docs/examples/ctc_trainer.py SPEECH --output OUT    # a small model with random weights
    python docs/examples/ctc_trainer.py SPEECH --output OUT --model facebook/wav2vec2-xls-r-300m --lora

SPEECH is a folder with recordings at 16 kHz and a table `utterances.tsv`, tab-separated, with columns `path`, `text`
and `seconds`. OUT is a folder that Transformers opens. The script needs transformers, accelerate, soundfile,
torchmetrics and, for `--lora`, peft. The same script without `import fastssl` and `fastssl.accelerate(model)` trains
the same model with Transformers' own code.
"""

import argparse
import csv
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soundfile
import torch
from torch import Tensor
from torchmetrics.functional.text import char_error_rate, word_error_rate
from transformers import (
    AutoModelForCTC,
    Trainer,
    TrainingArguments,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
    set_seed,
)

import fastssl

#: A model small enough for a laptop. Like XLS-R, it has layer norm throughout.
SMALL: dict[str, Any] = {
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 768,
    "conv_dim": [128] * 7,
    "num_conv_pos_embeddings": 32,
    "do_stable_layer_norm": True,
    "feat_extract_norm": "layer",
    "conv_bias": True,
}
#: Fine-tuning without dropout, with a little SpecAugment.
SETTINGS: dict[str, Any] = {
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
    "layerdrop": 0.0,
    "mask_time_prob": 0.05,
    "mask_time_length": 5,
    "ctc_loss_reduction": "mean",
    "ctc_zero_infinity": True,
}


class Speech(torch.utils.data.Dataset[dict[str, Any]]):
    """Recordings and their transcripts: rows of `utterances.tsv`."""

    def __init__(self, folder: Path, rows: list[dict[str, str]], processor: Any) -> None:
        self.folder, self.rows, self.processor = folder, rows, processor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        samples, rate_hz = soundfile.read(self.folder / row["path"], dtype="float32")
        text = re.sub("[^a-z' ]", "", row["text"].lower())
        inputs = self.processor(samples, sampling_rate=rate_hz)
        return {"input_values": inputs.input_values[0], "labels": self.processor(text=text).input_ids}


@dataclass
class Collator:
    """Pads waveforms with zeros and labels with -100, which the loss ignores."""

    processor: Any

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return a batch for the model."""
        inputs = [{"input_values": example["input_values"]} for example in examples]
        labels = [{"input_ids": example["labels"]} for example in examples]
        batch: dict[str, Tensor] = self.processor.pad(inputs, return_tensors="pt")
        padded = self.processor.pad(labels=labels, return_tensors="pt")
        batch["labels"] = padded["input_ids"].masked_fill(padded["attention_mask"] == 0, -100)
        return batch


def make_processor(folder: Path) -> Any:
    """Return a processor for letters, spaces and apostrophes."""
    symbols = ["<pad>", "<unk>", "|", "'", *"abcdefghijklmnopqrstuvwxyz"]
    (folder / "vocab.json").write_text(json.dumps({symbol: index for index, symbol in enumerate(symbols)}))
    tokenizer = Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), bos_token=None, eos_token=None)
    return Wav2Vec2Processor(Wav2Vec2FeatureExtractor(return_attention_mask=True), tokenizer)


def make_model(name: str | None, processor: Any) -> Any:
    """Return a model for the processor's symbols: a pre-trained one, by its name or folder, or a small one."""
    settings = SETTINGS | {"vocab_size": len(processor.tokenizer), "pad_token_id": processor.tokenizer.pad_token_id}
    if name is None:
        return AutoModelForCTC.from_config(Wav2Vec2Config(**SMALL, **settings))
    return AutoModelForCTC.from_pretrained(name, ignore_mismatched_sizes=True, **settings)


def main() -> None:
    """Train, evaluate and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("speech", type=Path, help="folder with recordings and utterances.tsv")
    parser.add_argument("--output", type=Path, required=True, help="folder for the model")
    parser.add_argument("--model", help="name on the Hub or folder of a pre-trained model")
    parser.add_argument("--lora", action="store_true", help="train low-rank adapters and the head only")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--longest", type=float, default=20.0, help="leave out recordings of more seconds")
    args = parser.parse_args()

    set_seed(0)
    args.output.mkdir(parents=True, exist_ok=True)
    with (args.speech / "utterances.tsv").open(newline="", encoding="utf-8") as table:
        rows = [row for row in csv.DictReader(table, delimiter="\t") if float(row["seconds"]) <= args.longest]
    held_out = max(2, len(rows) // 10)
    processor = make_processor(args.output)

    model = make_model(args.model, processor)
    model.freeze_feature_encoder()
    fastssl.accelerate(model)
    if args.lora:
        from peft import LoraConfig, get_peft_model

        # WavLM never calls its attention's projections, so adapters go to the feed-forward layers.
        lora = LoraConfig(r=16, target_modules=["intermediate_dense", "output_dense"], modules_to_save=["lm_head"])
        model = get_peft_model(model, lora)

    def metrics(predictions: Any) -> dict[str, float]:
        labels = predictions.label_ids.copy()
        labels[labels == -100] = processor.tokenizer.pad_token_id
        found = processor.batch_decode(predictions.predictions)
        expected = processor.tokenizer.batch_decode(labels, group_tokens=False)
        return {
            "wer": float(word_error_rate(found, expected)),
            "cer": float(char_error_rate(found, expected)),
        }

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.output),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            warmup_steps=args.steps // 10,
            eval_strategy="steps",
            eval_steps=max(1, args.steps // 4),
            logging_steps=max(1, args.steps // 50),
            save_strategy="no",
            report_to="none",
        ),
        data_collator=Collator(processor),
        train_dataset=Speech(args.speech, rows[held_out:], processor),
        eval_dataset=Speech(args.speech, rows[:held_out], processor),
        compute_metrics=metrics,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    trainer.train()
    trainer.save_state()
    trainer.save_metrics("eval", trainer.evaluate())

    (model.merge_and_unload() if args.lora else model).save_pretrained(args.output)
    processor.save_pretrained(args.output)


if __name__ == "__main__":
    main()

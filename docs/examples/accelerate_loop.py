"""Fine-tune a speech encoder for CTC in a training loop of your own, with Hugging Face Accelerate.

    python -m fastssl.data.synthetic SPEECH --minutes 30          # or your own recordings
    python docs/examples/accelerate_loop.py SPEECH --output OUT   # a small model with random weights
    accelerate launch --num_processes 2 docs/examples/accelerate_loop.py SPEECH --output OUT --model MODEL

SPEECH is a folder with recordings at 16 kHz and a table `utterances.tsv`, tab-separated, with columns `path`, `text`
and `seconds`. MODEL is a folder or a name on the Hub. OUT is a folder that Transformers opens. The script needs
transformers, accelerate, soundfile and torchmetrics. The same script without `import fastssl` and
`fastssl.accelerate(model)` trains the same model with Transformers' own code.
"""

import argparse
import csv
import json
import re
from pathlib import Path
from typing import Any

import soundfile
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.functional.text import char_error_rate
from transformers import (
    AutoModelForCTC,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
    get_linear_schedule_with_warmup,
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


class Collator:
    """Decodes recordings, and pads waveforms with zeros and labels with -100, which the loss ignores."""

    def __init__(self, folder: Path, processor: Any) -> None:
        self.folder, self.processor = folder, processor

    def __call__(self, rows: list[dict[str, str]]) -> dict[str, Tensor]:
        """Return a batch for the model."""
        read = [soundfile.read(self.folder / row["path"], dtype="float32") for row in rows]
        samples, rates_hz = zip(*read, strict=True)
        texts = [re.sub("[^a-z' ]", "", row["text"].lower()) for row in rows]
        options: dict[str, Any] = {"padding": True, "return_tensors": "pt"}
        batch: dict[str, Tensor] = self.processor(list(samples), sampling_rate=rates_hz[0], **options)
        padded = self.processor(text=texts, **options)
        batch["labels"] = padded.input_ids.masked_fill(padded.attention_mask == 0, -100)
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


@torch.no_grad()
def error_rate(accelerator: Accelerator, model: Any, loader: Any, processor: Any) -> float:
    """Return the character error rate over all processes."""
    found: list[str] = []
    expected: list[str] = []
    model.eval()
    for batch in loader:
        labels = batch.pop("labels")
        symbols = model(**batch).logits.argmax(-1)
        symbols = accelerator.pad_across_processes(symbols, dim=1, pad_index=processor.tokenizer.pad_token_id)
        labels = accelerator.pad_across_processes(labels, dim=1, pad_index=-100)
        symbols, labels = accelerator.gather_for_metrics((symbols, labels))
        found += processor.batch_decode(symbols)
        labels = labels.masked_fill(labels == -100, processor.tokenizer.pad_token_id)
        expected += processor.tokenizer.batch_decode(labels, group_tokens=False)
    model.train()
    return float(char_error_rate(found, expected))


def main() -> None:
    """Train, evaluate and save after each epoch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("speech", type=Path, help="folder with recordings and utterances.tsv")
    parser.add_argument("--output", type=Path, required=True, help="folder for the model")
    parser.add_argument("--model", help="name on the Hub or folder of a pre-trained model")
    parser.add_argument("--resume", type=Path, help="state to continue from: OUT/epoch-N")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--accumulate", type=int, default=2, help="number of batches per update")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--longest", type=float, default=20.0, help="leave out recordings of more seconds")
    args = parser.parse_args()

    accelerator = Accelerator(gradient_accumulation_steps=args.accumulate)
    set_seed(0)
    args.output.mkdir(parents=True, exist_ok=True)
    with (args.speech / "utterances.tsv").open(newline="", encoding="utf-8") as table:
        rows: Any = [row for row in csv.DictReader(table, delimiter="\t") if float(row["seconds"]) <= args.longest]
    held_out = max(2, len(rows) // 10)
    processor = make_processor(args.output)
    collate = Collator(args.speech, processor)
    loader = DataLoader(rows[held_out:], args.batch_size, shuffle=True, collate_fn=collate)
    held_out_loader = DataLoader(rows[:held_out], args.batch_size, collate_fn=collate)

    model = make_model(args.model, processor)
    model.freeze_feature_encoder()
    fastssl.accelerate(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.learning_rate)
    updates = args.epochs * -(-len(loader) // args.accumulate)
    scheduler = get_linear_schedule_with_warmup(optimizer, updates // 10, updates)
    model, optimizer, scheduler, loader, held_out_loader = accelerator.prepare(
        model, optimizer, scheduler, loader, held_out_loader
    )

    first = 0
    if args.resume:
        accelerator.load_state(args.resume)
        first = int(args.resume.name.removeprefix("epoch-"))
    for epoch in range(first, args.epochs):
        model.train()
        losses = []
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(accelerator.gather(loss.detach()).mean())
        cer = error_rate(accelerator, model, held_out_loader, processor)
        accelerator.print(f"epoch {epoch + 1}: loss {torch.stack(losses).mean():.6f}, character errors {cer:.3f}")
        accelerator.save_state(args.output / f"epoch-{epoch + 1}")

    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.output)
        processor.save_pretrained(args.output)
    accelerator.end_training()


if __name__ == "__main__":
    main()

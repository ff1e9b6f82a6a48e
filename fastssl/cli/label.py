"""`fastssl label`: classes of frames, for HuBERT to learn from, or segments, for a compressor."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from fastssl.cli.console import log_to_console
from fastssl.cli.options import AUDIO_HELP, DEVICE_HELP, command_parser


def run(arguments: Sequence[str]) -> None:
    """Parse the options and label."""
    from fastssl.eval.label import LabelSettings, label

    parser = command_parser(
        "label",
        "Cluster frames by k-means and write the class of each, a table beside the audio that Lhotse reads too. "
        "Without --model the frames are MFCC, as for HuBERT's first iteration. `fastssl pretrain AUDIO --recipe "
        "hubert-base --data.labels LABELS` learns from them; with --segment_ms there are segments too, which "
        "--data.segments shows a compressor. Started again with the same arguments, it goes on where "
        "it was, and adds new recordings.",
    )
    parser.add_argument("audio", metavar="AUDIO", help=AUDIO_HELP)
    parser.add_argument("--output", required=True, metavar="LABELS", help="Folder for the labels.")
    parser.add_class_arguments(LabelSettings)
    parser.add_argument(
        "--kmeans",
        type=str | None,
        metavar="LABELS",
        help="Take features and k-means model of these labels, so that held-out audio has the same classes.",
    )
    parser.add_argument("--num_workers", type=int | None, help="Processes that decode; null chooses by the cores.")
    parser.add_argument("--device", default="auto", help=DEVICE_HELP)
    given = parser.parse_args(list(arguments))
    if given.model is not None and Path(given.model).exists():
        given.model = str(Path(given.model).absolute())
    settings = LabelSettings(**{field.name: given[field.name] for field in dataclasses.fields(LabelSettings)})
    log_to_console()
    label(
        given.audio,
        given.output,
        settings,
        kmeans=given.kmeans,
        num_workers=given.num_workers,
        device=given.device,
    )

"""`fastssl extract`: the features of every recording."""

from collections.abc import Sequence

from fastssl.cli.console import log_to_console
from fastssl.cli.options import (
    AUDIO_HELP,
    CHANNEL_HELP,
    DEVICE_HELP,
    MODEL_HELP,
    PERIOD_HELP,
    RATE_HELP,
    command_parser,
)


def run(arguments: Sequence[str]) -> None:
    """Parse the options and write the features."""
    parser = command_parser(
        "extract",
        "Write the features of every recording: safetensors shards, and index.jsonl with file, shard, key, layer, "
        "frames and frame period. Started again with the same arguments, it goes on where it was.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help=MODEL_HELP,
    )
    parser.add_argument("audio", metavar="AUDIO", help=AUDIO_HELP)
    parser.add_argument("--output", required=True, metavar="FEATURES", help="Folder for shards and index.")
    parser.add_argument(
        "--layer", type=int | None, help="0 is the input of the first layer; null is the output of the last."
    )
    parser.add_argument("--chunk_s", type=float, default=60.0, help="Longer recordings are encoded in chunks, seconds.")
    parser.add_argument("--overlap_s", type=float, default=6.0, help="What neighbouring chunks share, seconds.")
    parser.add_argument("--channel", type=int | None, help=CHANNEL_HELP)
    parser.add_argument("--shard_mb", type=float, default=512.0, help="Size of a shard, megabytes.")
    parser.add_argument("--rate", type=float | None, help=RATE_HELP)
    parser.add_argument("--frame_period_ms", type=float | None, help=PERIOD_HELP)
    parser.add_argument("--device", default="auto", help=DEVICE_HELP)
    settings = parser.parse_args(list(arguments))
    from fastssl.eval.extract import extract

    log_to_console()
    extract(
        settings.model,
        settings.audio,
        settings.output,
        layer=settings.layer,
        chunk_s=settings.chunk_s,
        overlap_s=settings.overlap_s,
        channel=settings.channel,
        rate=settings.rate,
        frame_period_ms=settings.frame_period_ms,
        shard_mb=settings.shard_mb,
        device=settings.device,
    )

"""`fastssl quality`: how good each layer of an encoder is, without labels."""

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
    """Parse the options and measure."""
    parser = command_parser(
        "quality",
        "Measure each layer of an encoder on audio without labels: effective rank of all frames, RankMe, inertia of "
        "k-means, Davies-Bouldin. Prints a table, writes it as JSON, and draws a plot beside it. Compare only what was "
        "measured on the same audio with the same settings, layer by layer.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help=MODEL_HELP,
    )
    parser.add_argument("audio", metavar="AUDIO", help=AUDIO_HELP)
    parser.add_argument("--output", default="quality.json", metavar="FILE", help="Ends with .json; replaced if there.")
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="Of AUDIO, always the same ones, whatever their order."
    )
    parser.add_argument("--layers", type=list[int] | None, help="Such as [0,6,12]; null measures all.")
    parser.add_argument("--max_frames", type=int, default=102_400, help="Frames for k-means, drawn from all.")
    parser.add_argument("--seed", type=int, default=0, help="Of the frames drawn, and of k-means.")
    parser.add_argument("--channel", type=int | None, help=CHANNEL_HELP)
    parser.add_argument("--rate", type=float | None, help=RATE_HELP)
    parser.add_argument("--frame_period_ms", type=float | None, help=PERIOD_HELP)
    parser.add_argument("--device", default="auto", help=DEVICE_HELP)
    settings = parser.parse_args(list(arguments))
    from fastssl.eval.quality.command import quality

    log_to_console()
    quality(
        settings.model,
        settings.audio,
        settings.output,
        minutes=settings.minutes,
        layers=settings.layers,
        max_frames=settings.max_frames,
        seed=settings.seed,
        channel=settings.channel,
        rate=settings.rate,
        frame_period_ms=settings.frame_period_ms,
        device=settings.device,
    )

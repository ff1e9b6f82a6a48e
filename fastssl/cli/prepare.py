"""`fastssl prepare`: look through a folder once and write a manifest."""

import sys
from collections.abc import Sequence
from pathlib import Path

from fastssl.cli.options import AUDIO_HELP, command_parser


def run(arguments: Sequence[str]) -> None:
    """Parse the options and write the manifest."""
    from fastssl.data.corpus import open_corpus, write_manifest

    parser = command_parser(
        "prepare",
        "Read the headers of all recordings once and write a Lhotse manifest, which pretrain and extract take in "
        "place of the folder. Worth it for large folders on slow disks.",
    )
    parser.add_argument("audio", metavar="AUDIO", help=AUDIO_HELP)
    parser.add_argument("--output", required=True, metavar="MANIFEST", help="File to write, NAME.jsonl.gz.")
    parser.add_argument("--min_duration_s", type=float, default=2.0, help="Shorter recordings are left out.")
    parser.add_argument("--window_s", type=float, default=60.0, help="Longer recordings become windows of this length.")
    parser.add_argument(
        "--max_bad_fraction", type=float, default=0.05, help="It is an error when more than this fraction is unusable."
    )
    settings = parser.parse_args(list(arguments))
    corpus = open_corpus(
        settings.audio,
        min_duration_s=settings.min_duration_s,
        window_s=settings.window_s,
        max_bad_fraction=settings.max_bad_fraction,
    )
    write_manifest(corpus, Path(settings.output))
    for problem in corpus.problems:
        print(f"left out: {problem}", file=sys.stderr)
    print(
        f"{settings.output}: {corpus.num_recordings} recordings, {corpus.duration_s / 3600:.2f} hours, "
        f"{len(corpus.problems)} left out"
    )

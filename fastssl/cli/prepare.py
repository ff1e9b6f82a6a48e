"""`fastssl prepare`: scan a folder once and write a manifest."""

import sys
from pathlib import Path

from fastssl.data.rules import RULES


def prepare(
    audio: str,
    *,
    output: str,
    min_duration_s: float = 2.0,
    window_s: float = 60.0,
    max_bad_fraction: float = 0.05,
    rules: int = RULES,
) -> None:
    """Read the headers of all recordings once and write a Lhotse manifest.

    The other commands accept the manifest in place of the folder. This saves time for large folders on slow disks.

    Args:
        audio: Folder of recordings (WAV, FLAC, Ogg, MP3, ...; 4 kHz or more, any number of channels; subfolders too),
            Lhotse manifest (.jsonl.gz), or Lhotse shar directory.
        output: Manifest to write, NAME.jsonl.gz.
        min_duration_s: Leave out recordings shorter than this many seconds.
        window_s: Divide recordings longer than this many seconds into windows of equal length, at most this long.
        max_bad_fraction: Largest fraction of recordings that may be unusable; a larger one is an error.
        rules: Version of the rules by which recordings are found and measured; 1 writes what earlier versions of
            fastssl wrote.

    Raises:
        ValueError: `audio` cannot be used, too many of its recordings are unusable, or `output` does not end with
            .jsonl.gz.
    """
    from fastssl.data.corpus import open_corpus, write_manifest
    from fastssl.names import shown

    corpus = open_corpus(
        audio, min_duration_s=min_duration_s, window_s=window_s, max_bad_fraction=max_bad_fraction, rules=rules
    )
    write_manifest(corpus, Path(output))
    for problem in corpus.problems:
        print(f"left out: {problem}", file=sys.stderr)
    hours = corpus.duration_s / 3600
    print(f"{shown(output)}: {corpus.num_recordings} recordings, {hours:.2f} hours, {len(corpus.problems)} left out")

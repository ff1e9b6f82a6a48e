"""Open a corpus: a folder of audio, a Lhotse manifest or a shar directory, with a list of its unusable recordings."""

import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import soundfile
from lhotse import AudioSource, CutSet, Recording
from lhotse.cut import Cut, MonoCut, MultiCut
from lhotse.utils import compute_num_samples, fastcopy

from fastssl.data.manifest import ForbiddenSourceError, deserialize, read_lines
from fastssl.data.shar import is_shar, read_shar
from fastssl.files import make_folder, replacing

EXTENSIONS = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3")
MANIFEST_EXTENSIONS = (".jsonl.gz", ".jsonl")


@dataclass(frozen=True)
class Problem:
    """A recording that cannot be used.

    Args:
        name: Path of the recording; "@12.0s" is appended for the part that begins 12 s into it.
        reason: What is wrong, as a predicate that follows the name: "is empty", "does not decode: ...".
    """

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} {self.reason}"


def list_some(problems: Sequence[Problem]) -> str:
    """Format the first five problems, one per line, and the number of the others."""
    shown = "\n".join(f"  {problem}" for problem in problems[:5])
    return shown + (f"\n  and {len(problems) - 5} more" if len(problems) > 5 else "")


@dataclass
class Corpus:
    """The cuts of a corpus, and the recordings that were left out.

    Args:
        cuts: One cut per recording, or several windows if the recording is long; ids are unique.
        problems: Recordings that cannot be used, each with the reason.
    """

    cuts: CutSet
    problems: list[Problem] = field(default_factory=list)

    @property
    def duration_s(self) -> float:
        """Total duration of all cuts in seconds."""
        return math.fsum(cut.duration for cut in self.cuts)

    @property
    def num_recordings(self) -> int:
        """Number of different recordings that the cuts come from."""
        return len({cut.recording.id for cut in self.cuts})


def open_corpus(
    source: str | Path,
    *,
    min_duration_s: float = 2.0,
    window_s: float | None = 60.0,
    max_bad_fraction: float = 0.05,
    jobs: int = 8,
) -> Corpus:
    """Find the usable recordings of a corpus. Reads headers, and audio only where a header gives no length.

    Args:
        source: A folder (searched recursively, without hidden files), one audio file, a Lhotse manifest of cuts or
            recordings (`.jsonl.gz` or `.jsonl`), or a Lhotse shar directory.
        min_duration_s: Shortest usable recording in seconds; shorter recordings are listed as problems.
        window_s: Longest cut in seconds; a longer recording is split into windows of equal length. None keeps
            recordings whole and joins the windows of a prepared manifest.
        max_bad_fraction: Largest share of the recordings that may be unusable; a larger share is an error.
        jobs: Number of threads that read headers.

    Returns:
        The usable cuts, and the recordings that were left out.

    Raises:
        ValueError: The source does not exist, is not of a kind named above, contains no audio, has too many unusable
            recordings, or contains two cuts with the same id.
    """
    path = Path(source)
    if not path.exists():
        raise ValueError(f"source: {path} does not exist; give a folder, a Lhotse manifest or an audio file")
    if path.is_dir():
        found = _from_cuts(read_shar(path), jobs) if is_shar(path) else _from_files(path, _audio_files(path), jobs)
    elif path.name.lower().endswith(EXTENSIONS):
        found = _from_files(path.parent, [path], jobs)
    elif path.name.endswith(MANIFEST_EXTENSIONS):
        found = _from_cuts(_read_manifest(path), jobs)
    else:
        raise ValueError(
            f"source: {path} is neither a folder, nor a Lhotse manifest ({', '.join(MANIFEST_EXTENSIONS)}), "
            f"nor an audio file ({', '.join(EXTENSIONS)})"
        )

    cuts, problems = [], []
    for item in found:
        if isinstance(item, Problem):
            problems.append(item)
        elif item.duration < min_duration_s - 1e-6:
            reason = f"is {item.duration:.2f} s long, below min_duration_s={min_duration_s:g}"
            problems.append(Problem(cut_name(item), reason))
        else:
            cuts.append(item)
    _judge(path, len(cuts), problems, max_bad_fraction)
    cuts = list(_joined(cuts)) if window_s is None else [window for cut in cuts for window in _windows(cut, window_s)]
    name, times = Counter(cut.id for cut in cuts).most_common(1)[0]
    if times > 1:
        raise ValueError(f"source: {path} has {times} cuts with id {name!r}; make the ids unique")
    return Corpus(CutSet.from_cuts(cuts), problems)


def cut_name(cut: Cut) -> str:
    """Return the path of a cut's recording for messages, plus "@12.0s" if the cut begins 12 s into the recording.

    A recording without a path, such as one in memory, is named by its id.
    """
    source = cut.recording.sources[0]
    path = source.source if isinstance(source.source, str) and source.source else cut.recording.id
    return f"{path}@{cut.start:.1f}s" if cut.start > 0 else str(path)


def window_parent(cut: Cut) -> dict[str, Any] | None:
    """Return the `id`, `start` and `duration` of the cut that this cut is a window of, or None if it is not a window.

    Start and duration are in seconds. A window that was exported to shar counts as a whole recording.
    """
    parent: dict[str, Any] | None = (cut.custom or {}).get("window_of")
    if parent is None or parent["start"] + parent["duration"] > cut.recording.duration + 1e-3:
        return None
    return parent


def write_manifest(corpus: Corpus, output: Path) -> None:
    """Write the cuts of a corpus as a Lhotse manifest; if writing fails, an existing file is left unchanged.

    Args:
        corpus: Corpus whose cuts to write; its problems are not written.
        output: File to write, whose name ends with `.jsonl.gz`; missing folders are created.

    Raises:
        ValueError: The name of `output` does not end with `.jsonl.gz`.
        WriteError: The system refused to write.
    """
    output = output.absolute()  # Lhotse would run a path that begins with "pipe:" as a command
    if not output.name.endswith(".jsonl.gz"):
        raise ValueError(f"output: {output} must end with .jsonl.gz; choose another name")
    make_folder(output.parent)
    with replacing(output) as partial:
        corpus.cuts.to_jsonl(partial)


def split_corpus(corpus: Corpus, *, fraction: float, seed: int) -> tuple[Corpus, Corpus]:
    """Split a corpus into training and validation by recording: all windows of a recording stay on one side.

    The recordings with the lowest hashes of (seed, id) form the validation side. The split therefore does not depend on
    the order of the corpus and hardly changes when recordings are added.

    Args:
        corpus: Corpus to split; its problems are kept with the training side.
        fraction: Share of the recordings that go to validation, above 0 and below 1. Given two recordings or more,
            each side gets at least one; a single recording goes to training.
        seed: Seed of the hash; a different seed gives a different split.

    Returns:
        (training, validation).

    Raises:
        ValueError: `fraction` is not above 0 and below 1.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction: must be above 0 and below 1, got {fraction}")
    recordings = sorted({cut.recording.id for cut in corpus.cuts}, key=lambda name: (_digest(seed, name), name))
    number = min(max(1, round(fraction * len(recordings))), len(recordings) - 1)
    held_out = set(recordings[: max(0, number)])
    valid = [cut for cut in corpus.cuts if cut.recording.id in held_out]
    train = [cut for cut in corpus.cuts if cut.recording.id not in held_out]
    return Corpus(CutSet.from_cuts(train), corpus.problems), Corpus(CutSet.from_cuts(valid))


def _digest(seed: int, name: str) -> bytes:
    return hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()


def _judge(path: Path, num_usable: int, problems: list[Problem], max_bad_fraction: float) -> None:
    """Raise ValueError if no recording is usable, or more than `max_bad_fraction` of all are not."""
    total = num_usable + len(problems)
    if total == 0:
        raise ValueError(f"source: no audio in {path} (looked for {', '.join(EXTENSIONS)}, also in its subfolders)")
    if num_usable == 0 or len(problems) > max_bad_fraction * total:
        raise ValueError(
            f"source: {len(problems)} of {total} recordings in {path} cannot be used, but max_bad_fraction allows "
            f"{max_bad_fraction:.0%} and at least one must be usable; repair or remove them:\n{list_some(problems)}"
        )


def _audio_files(folder: Path) -> list[Path]:
    """Return the audio files below a folder, sorted; follow links to folders, but enter no folder twice."""
    files, entered = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(place, name) for name in names if name.lower().endswith(EXTENSIONS) and not name.startswith(".")]
    return sorted(files)


def _from_files(root: Path, files: list[Path], jobs: int) -> Iterator[Cut | Problem]:
    def scan(path: Path) -> Cut | Problem:
        return scan_file(path, recording_id=path.relative_to(root).as_posix())

    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(scan, files)


def scan_file(path: Path, *, recording_id: str) -> Cut | Problem:
    """Read the header of an audio file.

    Args:
        path: Path of the audio file.
        recording_id: Id for the recording and its cut.

    Returns:
        A cut of the whole file, or a `Problem` if the file is empty or does not open as audio.
    """
    name = str(path.absolute())
    try:
        if path.stat().st_size == 0:
            return Problem(name, "is empty")
        with soundfile.SoundFile(name) as audio:
            rate, channels, frames = audio.samplerate, audio.channels, audio.frames
            # The header of a stream that was never finished does not give its length: count the frames.
            if not 0 <= frames < 2**48:
                frames = sum(len(block) for block in audio.blocks(blocksize=1 << 20, dtype="float32"))
    except (OSError, RuntimeError) as error:
        return Problem(name, f"does not open as audio: {str(error).strip()}")
    if frames == 0:
        return Problem(name, "is empty")
    sources = [AudioSource(type="file", channels=list(range(channels)), source=name)]
    return Recording(
        id=recording_id, sources=sources, sampling_rate=rate, num_samples=frames, duration=frames / rate
    ).to_cut()


def _read_manifest(path: Path) -> Iterator[Cut | Problem]:
    try:
        for number, line in enumerate(read_lines(path), 1):
            try:
                item = deserialize(line)
            except ForbiddenSourceError as error:
                yield Problem(f"{path}, line {number}", str(error))
                continue
            yield item.to_cut() if isinstance(item, Recording) else item
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"source: {path} is not a Lhotse manifest of cuts or recordings: {error}") from error


def _from_cuts(cuts: Iterable[Cut | Problem], jobs: int) -> Iterator[Cut | Problem]:
    """Check that each cut has one recording whose files exist; trust everything else in a manifest."""

    def check(cut: Cut | Problem) -> Cut | Problem:
        if isinstance(cut, Problem):
            return cut
        if not isinstance(cut, MonoCut | MultiCut) or not cut.has_recording:
            return Problem(str(getattr(cut, "id", cut)), "is not a cut of exactly one recording")
        for source in cut.recording.sources:
            if source.type == "shar":
                return Problem(cut.id, "has no audio in its shard")
            in_tar = "tar_member" in (cut.custom or {})
            if source.type == "file" and not in_tar and not Path(source.source).exists():
                return Problem(source.source, "does not exist")
        return cut

    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(check, cuts)


def _windows(cut: Cut, window_s: float) -> Iterator[Cut]:
    """Yield the cut, or windows of equal length if it is longer than `window_s`.

    Each window records the cut it is part of (`window_parent`). Windows of a window belong to the original cut.
    """
    number = math.ceil(cut.duration / window_s - 1e-6)
    if number <= 1:
        yield cut
        return
    rate = cut.recording.sampling_rate
    first, total = compute_num_samples(cut.start, rate), compute_num_samples(cut.duration, rate)
    edges = [first + total * index // number for index in range(number + 1)]
    parent = window_parent(cut) or {"id": cut.id, "start": cut.start, "duration": cut.duration}
    for start, stop in pairwise(edges):
        yield fastcopy(
            cut,
            id=f"{cut.id}@{start / rate:.3f}s",
            start=start / rate,
            duration=(stop - start) / rate,
            supervisions=[],
            custom={**(cut.custom or {}), "window_of": parent},
        )


def _joined(cuts: Iterable[Cut]) -> Iterator[Cut]:
    """Replace the windows of each cut by the whole cut: the reverse of `_windows`."""
    entered = set()
    for cut in cuts:
        parent = window_parent(cut)
        if parent is None:
            yield cut
        elif parent["id"] not in entered:
            entered.add(parent["id"])
            custom = {name: value for name, value in cut.custom.items() if name != "window_of"}
            whole = {name: parent[name] for name in ("id", "start", "duration")}
            yield fastcopy(cut, **whole, custom=custom or None)

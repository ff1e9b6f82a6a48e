"""Open a corpus: a folder of audio, a Lhotse manifest or a shar directory, with a list of its unusable recordings."""

import gzip
import hashlib
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.utils import compute_num_samples, fastcopy

from fastssl.data.audio import AudioError
from fastssl.data.checks import check_fields, check_source
from fastssl.data.manifest import BadLineError, ForbiddenSourceError, deserialize, read_lines
from fastssl.data.rules import RULES, check_rules, rules_of
from fastssl.data.scan import Problem as Problem
from fastssl.data.scan import apply_rules, extensions, find_files, scan_file
from fastssl.data.shar import is_shar, read_shar
from fastssl.files import make_folder, replacing
from fastssl.names import encoded, json_line
from fastssl.regular import UnusableFileError, check_audio, is_folder

logger = logging.getLogger(__name__)

MANIFEST_EXTENSIONS = (".jsonl.gz", ".jsonl")
#: This many bad lines are kept and reported, and as many more as there are good ones.
_MOST_BAD_LINES = 10_000


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
        notes: What else a user should know: files that are not read, recordings of which only one channel is read.
    """

    cuts: CutSet
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

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
    rules: int = RULES,
) -> Corpus:
    """Find the usable recordings of a corpus.

    Reads headers, all frames where a header gives no length or a wrong one, and a few short blocks of a recording with
    several channels.

    Args:
        source: A folder (searched recursively, without hidden files), one audio file, a Lhotse manifest of cuts or
            recordings (`.jsonl.gz` or `.jsonl`), or a Lhotse shar directory.
        min_duration_s: Shortest usable recording in seconds; shorter recordings are listed as problems.
        window_s: Longest cut in seconds; a longer recording is split into windows of equal length. None keeps
            recordings whole and joins the windows of a prepared manifest.
        max_bad_fraction: Largest share of the recordings that may be unusable; a larger share is an error.
        jobs: Number of threads that read headers.
        rules: Version of the rules by which recordings are found and decoded (`rules.py`); the cuts carry it.

    Returns:
        The usable cuts, and the recordings that were left out.

    Raises:
        ValueError: The source does not exist, is not of a kind named above, contains no audio, has too many unusable
            recordings, or contains two cuts with the same id.
    """
    path, endings = Path(source), extensions(check_rules(rules))
    note, problems = "", list[Problem]()
    try:
        folder = is_folder(path)
    except UnusableFileError as error:
        raise ValueError(f"source: {path} {error}; give a folder, a Lhotse manifest or an audio file") from None
    if folder:
        if is_shar(path):
            found = _from_cuts(read_shar(path), jobs, rules)
        else:
            files, note, problems = find_files(path, rules=rules)
            found = _from_files(path, files, jobs, rules)
    elif path.name.lower().endswith(endings):
        found = _from_files(path.parent, [path], jobs, rules)
    elif path.name.endswith(MANIFEST_EXTENSIONS):
        found = _from_cuts(_read_manifest(path), jobs, rules)
    else:
        raise ValueError(
            f"source: {path} is neither a folder, nor a Lhotse manifest ({', '.join(MANIFEST_EXTENSIONS)}), "
            f"nor an audio file ({', '.join(endings)})"
        )

    cuts = []
    for item in found:
        if isinstance(item, Problem):
            problems.append(item)
        elif item.duration < min_duration_s - 1e-6:
            reason = f"is {item.duration:.2f} s long, below min_duration_s={min_duration_s:g}"
            problems.append(Problem(cut_name(item), reason))
        else:
            cuts.append(item)
    _judge(path, len(cuts), problems, max_bad_fraction, looked_for=endings, note=note)
    cuts = list(_joined(cuts)) if window_s is None else [window for cut in cuts for window in _windows(cut, window_s)]
    name, times = Counter(cut.id for cut in cuts).most_common(1)[0]
    if times > 1:
        raise ValueError(f"source: {path} has {times} cuts with id {name!r}; make the ids unique")
    return Corpus(CutSet.from_cuts(cuts), problems, _notes(path, cuts, note))


def _notes(path: Path, cuts: Sequence[Cut], unread: str) -> list[str]:
    """Return, and log, what a user should know of a corpus besides its unusable recordings."""
    notes = [f"{path}: {unread}"] if unread else []
    chosen: dict[str, Cut] = {}
    for cut in cuts:
        if rules_of(cut) >= 2 and "only_channel" in cut.custom:
            chosen.setdefault(cut.recording.id, cut)
    if chosen:
        first = next(iter(chosen.values()))
        notes.append(
            f"{path}: the channels of {len(chosen)} recordings cancel when they are averaged, so one of them is read, "
            f"unless a channel is requested; the first is {cut_name(first)}, read from channel "
            f"{first.custom['only_channel']}"
        )
    for note in notes:
        logger.warning("%s", note)
    return notes


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
    if not output.name.endswith(".jsonl.gz"):
        raise ValueError(f"output: {output} must end with .jsonl.gz; choose another name")
    make_folder(output.parent)
    with replacing(output) as partial, gzip.open(partial, "wt", encoding="utf-8") as lines:
        # Lhotse writes no name that is not valid UTF-8.
        lines.writelines(json_line(cut.to_dict()) for cut in corpus.cuts)


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
    return hashlib.blake2b(encoded(f"{seed}/{name}"), digest_size=8).digest()


def _judge(
    path: Path,
    num_usable: int,
    problems: list[Problem],
    max_bad_fraction: float,
    *,
    looked_for: Sequence[str],
    note: str,
) -> None:
    """Raise ValueError if no recording is usable, or more than `max_bad_fraction` of all are not."""
    total = num_usable + len(problems)
    if total == 0 and (is_shar(path) or not path.is_dir()):
        raise ValueError(f"source: {path} is empty; expected a manifest with a cut or a recording on each line")
    if total == 0:
        unread = f"; {note}" if note else ""
        raise ValueError(
            f"source: no audio in {path} (looked for {', '.join(looked_for)}, also in its subfolders){unread}"
        )
    if num_usable == 0 or len(problems) > max_bad_fraction * total:
        raise ValueError(
            f"source: {len(problems)} of {total} recordings in {path} cannot be used, but max_bad_fraction allows "
            f"{max_bad_fraction:.0%} and at least one must be usable; repair or remove them:\n{list_some(problems)}"
        )


def _from_files(root: Path, files: list[Path], jobs: int, rules: int) -> Iterator[Cut | Problem]:
    def enter(path: Path) -> Cut | Problem:
        return enter_file(path, recording_id=path.relative_to(root).as_posix(), rules=rules)

    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(enter, files)


def enter_file(path: Path, *, recording_id: str, rules: int = RULES) -> Cut | Problem:
    """Measure an audio file, and check what its header says.

    Args:
        path: Path of the audio file.
        recording_id: Id for the recording and its cut.
        rules: Version of the rules, which the cut carries to whoever reads it.

    Returns:
        A cut of the whole file, or a `Problem` if the file cannot be used.
    """
    name = str(path.absolute())
    try:
        check_audio(path)  # before the file is opened
    except UnusableFileError as error:
        return Problem(name, str(error))
    found = scan_file(path, recording_id=recording_id, rules=rules)
    return _checked_sources(_checked_fields(name, found) if isinstance(found, Cut) else found, rules)


def _read_manifest(path: Path) -> Iterator[tuple[str, Cut | BadLineError]]:
    """Yield each line's place in the manifest, and its cut; a recording becomes a cut of all of it."""
    first: BadLineError | None = None
    ours = 0
    for number, line in read_lines(path):
        try:
            item: Cut | BadLineError = deserialize(line) if isinstance(line, dict) else line
        except BadLineError as error:
            item = error
        if isinstance(item, Cut | ForbiddenSourceError):
            ours += 1
        else:
            first = first or item
        yield f"{path}, line {number}", item
    if first is not None and ours == 0:
        raise ValueError(f"source: {path} is not a Lhotse manifest of cuts or recordings: its first line {first}")


def _from_cuts(cuts: Iterable[tuple[str, Cut | BadLineError]], jobs: int, rules: int) -> Iterator[Cut | Problem]:
    def check(item: Cut | Problem) -> Cut | Problem:
        return _checked_sources(item, rules)

    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(check, _checked_lines(cuts))


def _checked_lines(cuts: Iterable[tuple[str, Cut | BadLineError]]) -> Iterator[Cut | Problem]:
    """Yield each cut whose fields can be used, and a problem for each other line.

    Raises:
        ValueError: Most lines are bad. Short bad lines take much more memory than space in a compressed file.
    """
    good = bad = 0
    for place, line in cuts:
        item = Problem(place, str(line)) if isinstance(line, BadLineError) else _checked_fields(place, line)
        if isinstance(item, Cut):
            good += 1
        else:
            bad += 1
            if bad > good + _MOST_BAD_LINES:
                raise ValueError(
                    f"source: {bad} of the first {good + bad} lines cannot be used, the last of them being {item}; "
                    "make the manifest again"
                )
        yield item


def _checked_fields(place: str, cut: Cut) -> Cut | Problem:
    """Check the fields of a recording that is about to enter the corpus: every one comes through here.

    Args:
        place: What to call the recording if its fields cannot be used: its file, or its line in a manifest.
        cut: The recording.
    """
    try:
        check_fields(cut)
    except AudioError as error:
        return Problem(place, str(error))
    return cut


def _checked_sources(item: Cut | Problem, rules: int) -> Cut | Problem:
    """Check the files of a recording whose fields can be used: every one comes through here, too.

    Args:
        item: The recording, or what is already known to be wrong with it.
        rules: Version of the rules to apply; a manifest may have been made by another, or by other software.
    """
    if isinstance(item, Problem):
        return item
    for source in item.recording.sources:
        try:
            check_source(item, source)
        except AudioError as error:
            return Problem(source.source if source.type == "file" else item.id, str(error))
    return apply_rules(item, rules)


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
        elif (key := (parent["id"], cut.recording.id)) not in entered:
            entered.add(key)
            custom = {name: value for name, value in cut.custom.items() if name != "window_of"}
            whole = {name: parent[name] for name in ("id", "start", "duration")}
            yield fastcopy(cut, **whole, custom=custom or None)

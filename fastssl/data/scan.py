"""Find the audio files of a folder, and measure each from its header, or from its frames if the header is wrong."""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from lhotse import AudioSource, Recording
from lhotse.cut import Cut
from numpy.typing import NDArray

from fastssl.data.audio import AudioError, open_sound, read_block
from fastssl.data.joined import JOINABLE, is_joined
from fastssl.data.mp3 import Mp3Error, count_samples
from fastssl.data.ogg import count_chained
from fastssl.data.rules import RULES, rules_of
from fastssl.names import plain_path, shown

EXTENSIONS_1 = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3")
EXTENSIONS = (*EXTENSIONS_1, ".aif", ".aifc", ".aiff", ".au", ".caf", ".rf64", ".snd", ".sph", ".w64", ".wave")
#: Endings of audio, and of video with audio, that libsndfile does not read.
# fmt: off
UNREAD_EXTENSIONS = (
    ".aac", ".ac3", ".amr", ".ape", ".awb", ".dff", ".dsf", ".dss", ".eac3", ".gsm", ".m4a", ".m4b", ".m4v", ".mka",
    ".mkv", ".mov", ".mp2", ".mp4", ".mpc", ".opu", ".ra", ".shn", ".spx", ".tta", ".webm", ".wma", ".wv",
)
# fmt: on

#: Where to look for channels that cancel: blocks of this many samples, at these fractions of the recording.
_PROBE_SAMPLES, _PROBES = 4096, (0.5, 0.3, 0.7, 0.1, 0.9)
#: Energy of a sample above which a block is not silence: -60 dB.
_AUDIBLE = 1e-6
#: Channels cancel if their mean has less than this fraction of the energy that unrelated channels would leave. For two
#: channels, this is a correlation below -0.9.
_CANCELLED = 0.1


_LONGEST_PATH = 4096  # characters; Linux allows as many bytes


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
        """Return name and reason on one line, as `shown` shows names; a name that no file can have is cut."""
        name = self.name if len(self.name) <= _LONGEST_PATH else f"{self.name[:97]}..."
        return shown(f"{name} {self.reason}")


def extensions(rules: int) -> tuple[str, ...]:
    """Return the extensions of the files that a version of the rules reads."""
    return EXTENSIONS_1 if rules < 2 else EXTENSIONS


def find_files(folder: Path, *, rules: int = RULES) -> tuple[list[Path], str, list[Problem]]:
    """Find the audio files below a folder; follow links to folders, but enter no folder twice, and no hidden one.

    Args:
        folder: Where to search.
        rules: Version of the rules, which decides what extensions are read.

    Returns:
        The files, sorted; a note on audio files that are not read, by extension, empty if there are none; and the
        folders that cannot be listed.
    """
    files, unread = [], Counter[str]()
    wanted = extensions(rules)
    closed: list[Problem] = []
    entered: dict[tuple[int, int], set[str]] = {}
    # Not by `os.walk`, which recurses, and to resolve every name would take seconds in deep folders.
    waiting = [str(folder)]
    while waiting:
        place = waiting.pop()
        try:
            if not _is_new(place, entered):
                continue
            with os.scandir(place) as listed:
                entries = [(entry.name, _is_folder(entry)) for entry in listed if not entry.name.startswith(".")]
        except OSError as error:
            closed.append(Problem(str(Path(place).absolute()), f"cannot be listed: {error.strerror}"))
            continue
        waiting += [os.path.join(place, name) for name, is_folder in reversed(entries) if is_folder]  # noqa: PTH118
        for name, is_folder in entries:
            lower = name.lower()
            if is_folder:
                continue
            if lower.endswith(wanted):
                files.append(Path(place, name))
            elif lower.endswith(UNREAD_EXTENSIONS) or lower.endswith(EXTENSIONS):
                unread[lower[lower.rindex(".") :]] += 1
    return sorted(files), _unread_note(unread), closed


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle, for example; one named like audio is reported as a file
        return False


def _is_new(place: str, entered: dict[tuple[int, int], set[str]]) -> bool:
    """Return whether a folder has not been entered, and remember it.

    Args:
        place: Path of the folder.
        entered: The paths of the folders that were entered, by device and number. Some systems number folders twice, so
            the real names decide then.

    Raises:
        OSError: Its status cannot be read.
    """
    status = os.stat(place)  # noqa: PTH116  (a string costs less)
    same = entered.setdefault((status.st_dev, status.st_ino), set())
    if same and os.path.realpath(place) in map(os.path.realpath, same):
        return False
    same.add(place)
    return True


def _unread_note(unread: Counter[str]) -> str:
    if not unread:
        return ""
    counts = ", ".join(f"{number} ending in {ending}" for ending, number in unread.most_common())
    first = unread.most_common(1)[0][0]
    return f"audio files that are not read: {counts}; convert them, for example: ffmpeg -i in{first} out.flac"


def scan_file(path: Path, *, recording_id: str, rules: int = RULES) -> Cut | Problem:
    """Measure an audio file: from its header, or from its frames if the header does not give the length.

    Args:
        path: Path of the audio file.
        recording_id: Id for the recording and its cut.
        rules: Version of the rules, which the cut carries to whoever reads it.

    Returns:
        A cut of the whole file, or a `Problem` if the file is empty, does not open as audio or cannot be read whole.
    """
    name = plain = str(path.absolute())
    try:
        if path.stat().st_size == 0:
            return Problem(name, "is empty")
        with plain_path(name) as plain, open_sound(plain, rules=rules) as audio:
            rate, channels, frames, kind = audio.samplerate, audio.channels, audio.frames, audio.format
            if rules >= 2 and kind == "MP3":
                frames = count_samples(path, frames)
            # The header of a stream that was never finished does not give its length: count the frames.
            if not 0 <= frames < 2**48:
                frames = sum(len(block) for block in audio.blocks(blocksize=1 << 20, dtype="float32"))
        if rules >= 2 and kind == "OGG" and (chained := count_chained(path)) > 1:
            return Problem(
                name,
                f"consists of {chained} Ogg streams in a row, of which only the first ({frames / rate:.2f} s) would be "
                "read; divide it, or join them by decoding, for example: ffmpeg -i in.ogg out.flac",
            )
        if rules >= 2 and kind in JOINABLE and is_joined(path, kind):
            return Problem(
                name,
                f"is followed by another {kind} file, but only the first ({frames / rate:.2f} s) would be read; divide "
                "it at the second header, or join the parts by decoding them",
            )
    except (AudioError, Mp3Error) as error:
        return Problem(name, str(error))
    except (OSError, RuntimeError) as error:
        return Problem(name, f"does not open as audio: {str(error).strip().replace(plain, name)}")
    if frames == 0:
        return Problem(name, "is empty")
    sources = [AudioSource(type="file", channels=list(range(channels)), source=name)]
    cut = Recording(
        id=recording_id, sources=sources, sampling_rate=rate, num_samples=frames, duration=frames / rate
    ).to_cut()
    return apply_rules(cut, rules)


def apply_rules(cut: Cut, rules: int) -> Cut:
    """Let a cut carry the version of the rules, and the channel to read if its channels cancel.

    Args:
        cut: Cut of one recording; it is changed. A decision that an earlier scan has stored in it is kept.
        rules: Version of the rules.

    Returns:
        The same cut, with the custom fields `rules` (none for version 1) and perhaps `only_channel`.
    """
    before = rules_of(cut)
    custom = {name: value for name, value in (cut.custom or {}).items() if name != "rules"}
    if rules >= 2:
        custom["rules"] = rules
        channels = [cut.channel] if isinstance(cut.channel, int) else list(cut.channel)
        if before < 2 and len(channels) > 1 and (channel := _only_channel(cut, channels)) is not None:
            custom["only_channel"] = channel
    cut.custom = custom or None
    return cut


def _only_channel(cut: Cut, channels: list[int]) -> int | None:
    """Return the loudest channel if the mean of all would be nearly silent, as for a stereo pair in opposite phase.

    Reads short blocks at fixed places, so that every part of a recording gets the same channel. The first of them is
    enough if it is audible and its channels do not cancel, because to seek costs up to 20 ms (Opus).
    """
    mixed, energies = 0.0, np.zeros(len(channels))
    try:
        for place in _PROBES:
            first = int(place * max(0, cut.recording.num_samples - _PROBE_SAMPLES))
            block = read_block(cut, first, _PROBE_SAMPLES, channels).astype(np.float64)
            if len(block) == 0 or not np.isfinite(block).all():
                continue
            block -= block.mean(axis=0)
            mixed += float(np.square(block.mean(axis=1)).sum())
            energies += np.square(block).sum(axis=0)
            if _is_mixed(mixed, energies) and energies.mean() > _AUDIBLE * _PROBE_SAMPLES:
                return None
    except AudioError:
        return None  # whoever reads the recording reports it
    return None if _is_mixed(mixed, energies) else channels[int(energies.argmax())]


def _is_mixed(mixed: float, energies: NDArray[np.float64]) -> bool:
    """Return whether enough energy is left in the mean of channels; that of N unrelated ones has 1 / N of theirs."""
    return mixed >= _CANCELLED * float(energies.mean()) / len(energies)

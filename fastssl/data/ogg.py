"""Recognise chained Ogg: several streams one after another in a file, of which libsndfile reads only the first."""

from pathlib import Path

_HEADER_BYTES = 27
_BEGINS = 2  # flag of a stream's first page


def count_chained(path: Path) -> int:
    """Count the streams of an Ogg file that follow one another; streams that begin together count as one.

    Reads the header of each page, which is about one in 4 KB.

    Args:
        path: Path of the file; one that is not Ogg has no streams.

    Raises:
        OSError: The file cannot be read.
    """
    chained, begun = 0, False
    with path.open("rb") as file:
        while (header := file.read(_HEADER_BYTES)).startswith(b"OggS") and len(header) == _HEADER_BYTES:
            begins = bool(header[5] & _BEGINS)
            chained += begins and not begun
            begun = begins
            file.seek(sum(file.read(header[26])), 1)
    return chained

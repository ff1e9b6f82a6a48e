"""Progress bars and figures."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rich import get_console, progress

from fastssl.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Item = TypeVar("Item")

_LARGEST_DRAWN = 1e100


def track(items: Iterable[Item] | Sequence[Item], what: str, *, total: int | None = None) -> Iterable[Item]:
    """Iterate over items, with a progress bar if the output is a terminal.

    Args:
        items: Items to iterate over.
        what: Label to the left of the bar.
        total: Number of items; needed only if `items` has no length.

    Returns:
        The same items, in the same order.
    """
    console = get_console()
    return progress.track(items, what, total=total, console=console, disable=not console.is_terminal)


def new_figure(height_in: float) -> "Figure":
    """Create an empty figure, 11 inches wide, in matplotlib's default style.

    Args:
        height_in: Height in inches.
    """
    # Create the canvas without pyplot, which would look for a display.
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Ignore a matplotlibrc in the current folder: it could turn on TeX and run anything in the TeX preamble.
    matplotlib.rcdefaults()
    figure = Figure(figsize=(11, height_in), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def drawable(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that matplotlib can draw: it fails on an axis whose length is infinite.

    Args:
        points: Pairs of x and y, perhaps NaN, infinite or of any size.
    """
    return [point for point in points if all(abs(value) < _LARGEST_DRAWN for value in point)]


def write_figure(figure: "Figure", path: Path) -> None:
    """Write a figure as a PNG file with 120 dots per inch, atomically: readers never see an incomplete file.

    Args:
        figure: Figure from `new_figure`.
        path: Path of the PNG file; an existing file is replaced.

    Raises:
        WriteError: The system refused to write.
    """
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120, format="png")

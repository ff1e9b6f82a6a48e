"""How far a long command is, and figures of what it found."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rich import get_console, progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Item = TypeVar("Item")


def track(items: Iterable[Item] | Sequence[Item], what: str, *, total: int | None = None) -> Iterable[Item]:
    """The items, with a progress bar on a terminal.

    Args:
        items: To go through.
        what: They are, on the left of the bar.
        total: How many they are, where they have no length.
    """
    console = get_console()
    return progress.track(items, what, total=total, console=console, disable=not console.is_terminal)


def new_figure(height_in: float) -> "Figure":
    """An empty figure, 11 inches wide."""
    # The canvas is chosen without pyplot, which would look for a display.
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A matplotlibrc in the current folder could ask for TeX, and for anything in its preamble.
    matplotlib.rcdefaults()
    figure = Figure(figsize=(11, height_in), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def write_figure(figure: "Figure", path: Path) -> None:
    """Write a PNG file that is there, whole, or is not."""
    temporary = path.with_name(f"{path.name}.tmp")
    figure.savefig(temporary, dpi=120, format="png")
    temporary.replace(path)

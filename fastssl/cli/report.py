"""`fastssl report`: draw the figure and print the table of a run."""

from pathlib import Path

from rich import get_console

from fastssl.files import naming
from fastssl.names import shown
from fastssl.reading import brief


def report(run: str) -> None:
    """Draw RUN/report.png and print a table of the first and the last scores, also while the run trains.

    A run draws its report itself now and then, and at its end.

    Args:
        run: Folder of a run of `fastssl pretrain` or `fastssl distill`.

    Raises:
        ValueError: The folder contains no run, a run that has not reported an update yet, or a damaged metrics.csv.
        WriteError: The system refused to write the figure; the table has been printed.
    """
    # Imported only now: Lightning takes seconds to import, and `--help` should answer at once.
    from fastssl.train.metrics_file import read_metrics
    from fastssl.train.report import draw_report, summarise, training_rows
    from fastssl.train.systems import DEFAULT_SYSTEM, SYSTEMS
    from fastssl.train.yaml_file import read_yaml

    folder = Path(run)
    for needed in ("config.yaml", "metrics.csv"):
        if not (folder / needed).is_file():
            raise ValueError(f"RUN: {run} contains no run that trains or has trained (looked for {folder / needed})")
    name = read_yaml(folder / "config.yaml").get("system", DEFAULT_SYSTEM)
    if name not in list(SYSTEMS):
        raise ValueError(
            f"{folder / 'config.yaml'}: unknown system {brief(name)}, expected one of {', '.join(SYSTEMS)}"
        )
    if not training_rows(read_metrics(folder / "metrics.csv"), SYSTEMS[name]):
        raise ValueError(
            f"{folder / 'metrics.csv'}: has no row of the training yet; the first comes after trainer.log_every updates"
        )
    get_console().print(summarise(folder, SYSTEMS[name], None))
    with naming(folder / "report.png", option="RUN"):
        draw_report(folder, SYSTEMS[name])
    get_console().print(f"figure: {shown(folder / 'report.png')}", soft_wrap=True, markup=False)

"""All scenarios by name."""

from collections.abc import Iterator

from tests.emulation.fake_cuda import accelerated, dry_runs, faults, fitting, graphs, loops, training
from tests.emulation.fake_cuda.scenario import Scenario


def scenarios() -> Iterator[tuple[str, Scenario]]:
    """Yield the name of each scenario, and the scenario."""
    for module in (training, accelerated, loops, fitting, graphs, dry_runs, faults):
        yield from module.scenarios()

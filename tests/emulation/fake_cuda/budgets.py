"""The recorded launches and waits of each scenario, in tests/emulation/budgets.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent.parent / "budgets.json"


def read() -> dict[str, Any]:
    """Return what is recorded, by the name of the scenario: `launches` by phase and `waits` by place."""
    recorded: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}
    return recorded


def record(found: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace the records of the scenarios that were run; the others stay."""
    recorded = read() | {name: {"launches": of["launches"], "waits": of["waits"]} for name, of in found.items()}
    FILE.write_text(json.dumps(dict(sorted(recorded.items())), indent=1) + "\n")


def broken(name: str, found: Mapping[str, Any], recorded: Mapping[str, Any]) -> list[str]:
    """Compare what a scenario found with its record.

    Args:
        name: Name of the scenario.
        found: What it found, as JSON of `scenario.Found`.
        recorded: All records, by name.

    Returns:
        One sentence for each phase with more launches than recorded, and for each wait that is new, gone, or has
        another number.
    """
    if name not in recorded:
        return ["nothing is recorded for this scenario"]
    budget, waits = recorded[name]["launches"], recorded[name]["waits"]
    said = [
        f"phase {phase!r} has {count} launches, more than the {budget.get(phase, 0)} recorded"
        for phase, count in found["launches"].items()
        if count > budget.get(phase, 0)
    ]
    return said + [
        f"the host waits {found['waits'].get(place, 0)} times, not {waits.get(place, 0)}, at {place}"
        for place in sorted(found["waits"].keys() | waits.keys())
        if found["waits"].get(place) != waits.get(place)
    ]

"""Count how much of the package a reader must know to follow one update: `python -m benchmarks.module_walk [TREE ...]`.

A TREE is a commit or the folder of a checkout; the default is this checkout. For each tree, the program runs
`fastssl pretrain` for one update, without workers and held-out recordings. It counts the modules and functions that are
called, in total and between `training_step` and gradient clipping (backward pass included). It also reports walks,
which it reads from the call stack. A hop is a function of the package, counted once per walk. The walks are:

- waveform to checkpoint: the functions on the stack when a recording is read, at the first matrix product, at clipping,
  and when the checkpoint is written;
- `contrastive_logits_temperature`: the functions on the stack when the kernel of the contrastive loss is called;
- `accelerate`: the functions that `accelerate` itself calls, and as a separate walk, the functions on the stack at the
  first matrix product of an accelerated model.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.bits.trees import ROOT, Tree, check_out

_ON_THE_WAY = ("waveform read", "first product", "clipping", "checkpoint written")
_LOSS = "contrastive_loss_fwd"


def walk(name: str, folder: Path) -> dict[str, Any]:
    """Run `benchmarks.bits.walk` in a tree and return its findings.

    Args:
        name: A commit, or the folder of a checkout.
        folder: Folder for the checkout and the findings.
    """
    checkout = Path(name)
    if not (checkout / "fastssl").is_dir():
        checkout = folder / "checkout"
        check_out(name, checkout, modules=None)
    tree = Tree(name, checkout, folder / "tree")
    tree.run("benchmarks.bits.walk", folder / "walk.json", log=folder / "walk.log")
    found: dict[str, Any] = json.loads((folder / "walk.json").read_text())
    return found


def report(found: dict[str, Any]) -> str:
    """Format the findings as text: counts and names of modules, then the walks."""
    lines = []
    for key, what in (("called", "one-update pretrain"), ("in_step", "training_step to clipping")):
        modules = _modules(found[key])
        lines += [f"{what}: {len(modules)} modules, {len(found[key])} functions", f"  {' '.join(modules)}", ""]
    lines += ["| walk | hops | modules |", "|---|---|---|"]
    walks = walks_of(found)
    lines += [f"| {name} | {len(hops)} | {len(_modules(hops))} |" for name, hops in walks.items()]
    for name, hops in walks.items():
        lines += ["", f"{name}:", *(f"  {module} {function}" for module, function in hops)]
    return "\n".join(lines)


def walks_of(found: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """Return the functions on each walk as (module, function), in the order of the calls."""
    stacks = found["stacks"]
    way = dict.fromkeys(tuple(hop) for moment in _ON_THE_WAY for hop in stacks[moment])
    loss = next(stack for moment, stack in stacks.items() if moment.endswith(_LOSS))
    return {
        "waveform to checkpoint": list(way),
        "contrastive_logits_temperature to the kernel": [tuple(hop) for hop in loss],
        "accelerate itself": [tuple(hop) for hop in found["accelerate"]],
        "accelerated model to the first product": [tuple(hop) for hop in found["first_product"]],
    }


def _modules(functions: list[Any]) -> list[str]:
    return list(dict.fromkeys(module for module, _ in functions))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs="*", default=[str(ROOT)], help="commits, or folders of checkouts")
    for name in parser.parse_args().trees:
        with tempfile.TemporaryDirectory(prefix="module-walk-") as folder:
            print(f"{name}\n\n{report(walk(name, Path(folder)))}\n", flush=True)


if __name__ == "__main__":
    main()

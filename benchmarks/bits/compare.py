"""Results of two trees, compared to the bit, and the table of what differs."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.bits.record import Results

#: Biases that the softmax, or a group norm, does not see: their gradients are 0, and what is computed is rounding.
_ZERO_GRADIENTS = ("k_proj.bias", "conv_layers.0.conv.bias")
#: Such a gradient is measured by the others where it is this much smaller.
_NEGLIGIBLE = 1e-4


@dataclass
class Group:
    """What was found in the results of one group.

    Args:
        equal: Results that are equal in every bit.
        refused: Of these, calls that both trees refuse.
        close: Name -> difference in eps, of results within the tolerance.
        different: Name -> what differs, of all others.
        worst: The largest difference in eps.
    """

    equal: int = 0
    refused: int = 0
    close: dict[str, float] = field(default_factory=dict)
    different: dict[str, str] = field(default_factory=dict)
    worst: float = 0.0


def compare(before: Results, after: Results, *, tolerance_eps: float = 0.0) -> dict[str, Group]:
    """Compare by name; a group is what stands before the first slash of a name.

    Args:
        before: Results of the tree that counts as right.
        after: Results of the other tree.
        tolerance_eps: Floating results may differ by this many eps of their dtype, relative to their largest element.
    """
    groups: dict[str, Group] = {}
    for name in before | after:
        group = groups.setdefault(name.partition("/")[0], Group())
        if name not in before or name not in after:
            group.different[name] = "only after" if name in after else "only before"
            continue
        old, new = before[name], after[name]
        what, eps = _difference(old, new, _scale(name, before))
        group.worst = max(group.worst, eps)
        if not what:
            group.equal += 1
            group.refused += isinstance(old, str) and old.startswith("raises ")
        elif 0 < eps <= tolerance_eps:
            group.close[name] = eps
        else:
            group.different[name] = what
    return groups


def table(title: str, groups: dict[str, Group], *, examples: int = 20) -> str:
    """A row for every group, then names of what differs."""
    lines = [
        f"| {title} | results | equal | of these refused | within tolerance | differ | worst, eps |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, group in groups.items():
        close, different = len(group.close), len(group.different)
        total = group.equal + close + different
        lines.append(
            f"| {name} | {total} | {group.equal} | {group.refused} | {close} | {different} | {group.worst:.3g} |"
        )
    different_names = {name: what for group in groups.values() for name, what in group.different.items()}
    lines += ["", *(f"differs: {name}: {what}" for name, what in list(different_names.items())[:examples])]
    if len(different_names) > examples:
        lines.append(f"... and {len(different_names) - examples} more")
    close_names = {name: eps for group in groups.values() for name, eps in group.close.items()}
    lines += [f"within tolerance: {name}: {eps:.3g} eps" for name, eps in list(close_names.items())[:examples]]
    if len(close_names) > examples:
        lines.append(f"... and {len(close_names) - examples} more")
    return "\n".join(lines)


def _difference(old: Tensor | str, new: Tensor | str, scale: float) -> tuple[str, float]:
    """What differs in words, empty where nothing does, and by how many eps."""
    if isinstance(old, str) or isinstance(new, str):
        words = [x if isinstance(x, str) else f"a tensor {tuple(x.shape)}" for x in (old, new)]
        return ("" if words[0] == words[1] else f"{words[0][:200]} before, {words[1][:200]} after"), 0.0
    if old.dtype != new.dtype or old.shape != new.shape:
        return f"{old.dtype} {tuple(old.shape)} before, {new.dtype} {tuple(new.shape)} after", 0.0
    if torch.equal(_bits(old), _bits(new)):
        return "", 0.0
    if not old.is_floating_point():
        return f"{int((old != new).sum())} of {old.numel()} elements", 0.0
    error = (old.double() - new.double()).abs()
    error[old.isnan() & new.isnan()] = 0
    largest = float(error.max())
    eps = largest / (torch.finfo(old.dtype).eps * scale) if scale else float("inf")
    count = int((_elements(old) != _elements(new)).sum())
    return f"up to {largest:.3g}, {eps:.3g} eps, in {count} of {old.numel()} elements", eps


def _scale(name: str, results: Results) -> float:
    """The largest element of a result, or of all gradients of its case where its own are rounding alone."""
    own = _largest(results[name])
    case, _, leaf = name.rpartition(".grad.")
    if not case or not leaf.endswith(_ZERO_GRADIENTS):
        return own
    largest = max(_largest(results[other]) for other in results if other.startswith(f"{case}.grad."))
    return largest if own < _NEGLIGIBLE * largest else own


def _largest(x: Tensor | str) -> float:
    return 0.0 if isinstance(x, str) or not x.numel() else float(x.double().abs().nan_to_num(0.0, 0.0).max())


def _bits(x: Tensor) -> Tensor:
    """Every byte, so that a NaN equals itself and the zeros of two signs differ."""
    return x.contiguous().reshape(-1).view(torch.uint8)


def _elements(x: Tensor) -> Tensor:
    """Floating numbers as whole numbers of the same bits."""
    sizes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.contiguous().view(sizes[x.element_size()])

"""Compare the results of two trees bit by bit, and print a table of the differences."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.bits.record import Results

#: Biases to which the following softmax or group norm is invariant. Their exact gradient is 0, and the computed one is
#: only rounding error.
_ZERO_GRADIENTS = ("k_proj.bias", "conv_layers.0.conv.bias")
#: If such a gradient is smaller than this share of the largest gradient of its case, its error is measured relative to
#: the largest.
_NEGLIGIBLE = 1e-4


@dataclass
class Group:
    """Comparison of the results of one group.

    Args:
        equal: Number of results that are equal in every bit, and of calls that both trees refuse with the same error
            type.
        refused: Number of calls that both trees refuse; `equal` includes them.
        close: Results that differ within the tolerance, by name, with the difference in eps.
        different: All other results, by name, with a description of the difference.
        worst: Largest difference in eps.
    """

    equal: int = 0
    refused: int = 0
    close: dict[str, float] = field(default_factory=dict)
    different: dict[str, str] = field(default_factory=dict)
    worst: float = 0.0


def compare(before: Results, after: Results, *, tolerance_eps: float = 0.0) -> dict[str, Group]:
    """Compare results by name, and group them by the part of the name before its first slash.

    Args:
        before: Results of the tree that serves as the reference.
        after: Results of the other tree.
        tolerance_eps: Difference allowed in floating-point results, in eps of the dtype times the largest element.

    Returns:
        The groups by name.
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
    """Format groups as a Markdown table, and name up to `examples` differing and as many close results."""
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
    """Return the difference between two results, in words (empty if they are equal) and in eps."""
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
    """Return the largest element of a result, or of all gradients of its case if its own are only rounding error."""
    own = _largest(results[name])
    case, _, leaf = name.rpartition(".grad.")
    if not case or not leaf.endswith(_ZERO_GRADIENTS):
        return own
    largest = max(_largest(results[other]) for other in results if other.startswith(f"{case}.grad."))
    return largest if own < _NEGLIGIBLE * largest else own


def _largest(x: Tensor | str) -> float:
    return 0.0 if isinstance(x, str) or not x.numel() else float(x.double().abs().nan_to_num(0.0, 0.0).max())


def _bits(x: Tensor) -> Tensor:
    """View a tensor as bytes, so that NaN equals itself, and 0 and -0 differ."""
    return x.contiguous().reshape(-1).view(torch.uint8)


def _elements(x: Tensor) -> Tensor:
    """View a floating-point tensor as integers with the same bits."""
    sizes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.contiguous().view(sizes[x.element_size()])

"""Effective rank, of singular values that are streamed."""

import torch
from torch import Tensor


def effective_rank(singular_values: Tensor) -> float:
    """exp(-sum p ln p) of p = σ / sum σ (Roy and Vetterli, 2007; RankMe, arXiv:2210.02885, without its epsilon).

    The singular values are not squared, and those of 0 add nothing. Of n equal ones it is n.

    Args:
        singular_values: (D,) none negative.

    Raises:
        ValueError: They are not finite, one is negative, or all are 0.
    """
    values = singular_values.double()
    if values.dim() != 1 or not values.isfinite().all() or (values < 0).any():
        raise ValueError("singular_values: must be one dimension of finite numbers, none negative")
    total = values.sum()
    if total == 0:
        raise ValueError("singular_values: all are 0, which has no rank to speak of")
    shares = values / total
    return float(torch.special.entr(shares).sum().exp())


class GramMatrix:
    """The singular values of a matrix whose rows come in portions; memory is that of (width, width) fp64.

    Nothing is centred. Singular values are roots of the eigenvalues of the Gram matrix, so those below about
    sqrt(width x 2e-16) of the largest drown in its rounding; they count as 0.

    Args:
        width: D, the columns.
        device: Where to add up; default the CPU.
    """

    def __init__(self, width: int, *, device: torch.device | str | None = None) -> None:
        #: Rows so far.
        self.rows = 0
        self._gram = torch.zeros(width, width, dtype=torch.float64, device=device)

    def update(self, rows: Tensor) -> None:
        """Add rows.

        Args:
            rows: (n, D) of any floating point.

        Raises:
            ValueError: The width is another one.
        """
        width = len(self._gram)
        if rows.dim() != 2 or rows.shape[1] != width:
            raise ValueError(f"rows: expected (n, {width}), got {tuple(rows.shape)}")
        exact = rows.to(self._gram)
        self._gram.addmm_(exact.T, exact)
        self.rows += len(rows)

    def singular_values(self) -> Tensor:
        """(D,) fp64 on the CPU, ascending.

        Raises:
            ValueError: There is no row, or a row was NaN or infinite.
        """
        if self.rows == 0:
            raise ValueError("rows: there are none")
        if not self._gram.isfinite().all():
            raise ValueError("rows: some are NaN or infinite")
        squares = torch.linalg.eigvalsh(self._gram.cpu())
        noise = len(squares) * torch.finfo(torch.float64).eps * squares.abs().max()
        return torch.where(squares > noise, squares, 0.0).sqrt()

"""Effective rank of a matrix whose rows arrive in portions."""

import torch
from torch import Tensor


def effective_rank(singular_values: Tensor) -> float:
    """Compute exp(-Σ p ln p) with p = σ / Σ σ (Roy and Vetterli, 2007; RankMe, arXiv 2210.02885, without its epsilon).

    The singular values σ are not squared, and zeros contribute nothing. For n equal values the result is n.

    Args:
        singular_values: (D,) values in any order, all finite and at least 0.

    Returns:
        The effective rank, from 1 to D.

    Raises:
        ValueError: The tensor is not one-dimensional, a value is negative, NaN or infinite, or all are 0.
    """
    values = singular_values.double()
    if values.dim() != 1 or not values.isfinite().all() or (values < 0).any():
        raise ValueError("singular_values: must be a one-dimensional tensor of finite numbers that are at least 0")
    total = values.sum()
    if total == 0:
        raise ValueError("singular_values: all are 0, so the rank is undefined; check that the frames are not all 0")
    shares = values / total
    return float(torch.special.entr(shares).sum().exp())


class GramMatrix:
    """Computes the singular values of a matrix whose rows arrive in portions; keeps one (D, D) fp64 matrix in memory.

    The rows are not centred. The singular values are the square roots of the Gram matrix's eigenvalues, so those below
    about sqrt(D * 2.2e-16) times the largest are lost in rounding and are returned as 0.

    Args:
        width: Number of columns D.
        device: Device that accumulates the Gram matrix; None uses PyTorch's default, normally the CPU.
    """

    def __init__(self, width: int, *, device: torch.device | str | None = None) -> None:
        #: Number of rows added so far.
        self.rows = 0
        self._gram = torch.zeros(width, width, dtype=torch.float64, device=device)

    def update(self, rows: Tensor) -> None:
        """Add rows of the matrix to the Gram matrix.

        Args:
            rows: (n, D) floating-point rows, on any device.

        Raises:
            ValueError: `rows` does not have the shape (n, D).
        """
        width = len(self._gram)
        if rows.dim() != 2 or rows.shape[1] != width:
            raise ValueError(f"rows: expected (n, {width}), got {tuple(rows.shape)}")
        exact = rows.to(self._gram)
        self._gram.addmm_(exact.T, exact)
        self.rows += len(rows)

    def singular_values(self) -> Tensor:
        """Compute the singular values of all rows added so far.

        Returns:
            (D,) fp64 on the CPU, in ascending order.

        Raises:
            ValueError: No row was added, or a row contained NaN or infinity.
        """
        if self.rows == 0:
            raise ValueError("rows: expected at least one row, got none; call `update` first")
        if not self._gram.isfinite().all():
            raise ValueError("rows: some are NaN or infinite, expected finite values; check the encoder's output")
        squares = torch.linalg.eigvalsh(self._gram.cpu())
        noise = len(squares) * torch.finfo(torch.float64).eps * squares.abs().max()
        return torch.where(squares > noise, squares, 0.0).sqrt()

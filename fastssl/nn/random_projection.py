"""BEST-RQ's quantiser: a random projection and a random codebook, neither of which is trained."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.nn.linear import packed_linear

#: Numbers of a block of products of frames and codes (16 MB in fp32).
_BLOCK = 1 << 22


class RandomProjectionQuantizer(nn.Module):
    """The code nearest to each frame's projection, both of unit length (BEST-RQ, arXiv 2202.01855, equation 1).

    Between vectors of unit length the nearest is the one with the greatest product, so a matrix product and argmax
    decide, in blocks of frames; differences are never formed. Computed in fp32, under autocast too. Projection (Xavier)
    and codebook (normal) are buffers: frozen, and saved with the model, because other ones would be other targets.

    Example:
        >>> import torch
        >>> from fastssl.nn import RandomProjectionQuantizer
        >>> quantizer = RandomProjectionQuantizer(320, codes=512, code_width=16)
        >>> quantizer(torch.randn(200, 320)).shape
        torch.Size([200])

    Args:
        width: C, of the frames.
        codes: V, of the codebook.
        code_width: Of the projection and the codes.
    """

    projection: Tensor  # (code_width, C)
    codebook: Tensor  # (V, code_width)

    def __init__(self, width: int, *, codes: int, code_width: int) -> None:
        super().__init__()
        self.register_buffer("projection", nn.init.xavier_uniform_(torch.empty(code_width, width)))
        self.register_buffer("codebook", F.normalize(torch.randn(codes, code_width)))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """(N, C) frames to (N,) int64 codes."""
        codebook = self.codebook.float()
        with torch.autocast(x.device.type, enabled=False):
            projected = F.normalize(packed_linear(x.float(), self.projection.float(), None))
            blocks = projected.split(max(1, _BLOCK // len(codebook)))
            return torch.cat([packed_linear(block, codebook, None).argmax(1) for block in blocks])

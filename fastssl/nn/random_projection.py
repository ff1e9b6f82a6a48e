"""The quantiser of BEST-RQ: a random projection and a random codebook, neither of which is trained."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.nn.linear import packed_linear

#: Number of dot products between frames and codes in a block (16 MB in fp32).
_BLOCK = 1 << 22


class RandomProjectionQuantizer(nn.Module):
    """Finds the code nearest to each frame's projection (BEST-RQ, arXiv 2202.01855, equation 1).

    Projections and codes are scaled to unit length, so the nearest code is the one with the largest dot product. A
    matrix product and an argmax find it, in blocks of frames, in fp32 even under autocast. The projection (Xavier
    initialisation) and the codebook (normal) are frozen buffers. They are saved with the model, because new ones would
    change the targets.

    Example:
        >>> import torch
        >>> from fastssl.nn import RandomProjectionQuantizer
        >>> quantizer = RandomProjectionQuantizer(320, codes=512, code_width=16)
        >>> quantizer(torch.randn(200, 320)).shape
        torch.Size([200])

    Args:
        width: C, the number of channels of a frame.
        codes: V, the number of codes.
        code_width: Number of channels of a projected frame and of a code.
    """

    projection: Tensor  # (code_width, C)
    codebook: Tensor  # (V, code_width)

    def __init__(self, width: int, *, codes: int, code_width: int) -> None:
        super().__init__()
        self.register_buffer("projection", nn.init.xavier_uniform_(torch.empty(code_width, width)))
        self.register_buffer("codebook", F.normalize(torch.randn(codes, code_width)))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Find the nearest code of each frame, without gradient.

        Args:
            x: (N, C) frames.

        Returns:
            (N,) int64 codes, from 0 to V - 1.
        """
        codebook = self.codebook.float()
        with torch.autocast(x.device.type, enabled=False):
            projected = F.normalize(packed_linear(x.float(), self.projection.float(), None))
            blocks = projected.split(max(1, _BLOCK // len(codebook)))
            return torch.cat([packed_linear(block, codebook, None).argmax(1) for block in blocks])

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

def pack_waveforms(
    waveforms: Sequence[npt.NDArray[np.float32]], normalize: bool, eps: float
) -> npt.NDArray[np.float32]: ...
def smooth_classes(costs: npt.NDArray[np.float32], price: float) -> npt.NDArray[np.int64]: ...

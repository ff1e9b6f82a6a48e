"""On which side of a row Transformers' encoders return the frames of an utterance that is padded on the left.

They are at the row's end, where its samples are, and the encoder's own mask of frames says so. Transformers' heads,
however, count the frames themselves and use the first ones of a row, so for them the frames are at its beginning.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.interop.calls import as_original, recorded_by
from fastssl.interop.classes import NORM

#: Method by which a head counts frames.
_COUNTS = "_get_feat_extract_output_lengths"
#: Method that turns a mask of samples into a mask of frames.
FRAME_MASK = "_get_feature_vector_attention_mask"
#: Heads that count no frames, but label every frame of a row where it is.
_LABELS_FRAMES = "ForAudioFrameClassification"


@torch.compiler.disable(reason="compiled code has no calls in progress")  # type: ignore[untyped-decorator]
def called_by_counting_head(encoder: nn.Module) -> bool:
    """Return whether a head of Transformers that uses the first frames of each row is calling an encoder.

    Only the calls in progress tell, because a module does not know what contains it, and an encoder can be accelerated,
    and called, without its head. PEFT's wrapper is no head, although it has the attributes of the encoder in it.
    """
    frame = sys._getframe().f_back
    while frame is not None:
        # Only in these: Python keeps a copy of the variables that it was asked for as long as the call lasts.
        if "forward" in frame.f_code.co_name and "self" in frame.f_code.co_varnames:
            owner = frame.f_locals.get("self")
            contains = owner is not encoder and isinstance(owner, nn.Module) and encoder in owner.modules()
            if contains and hasattr(type(owner), _COUNTS):
                return not any(cls.__name__.endswith(_LABELS_FRAMES) for cls in type(owner).__mro__)
        frame = frame.f_back
    return False


def frame_mask(original: type[nn.Module]) -> Any:
    """Return the method of an accelerated encoder that makes a mask of frames (B, F) of a mask of samples (B, T).

    It marks the last frames of a row that is padded on the left, where the encoder returns them, and is the original's
    otherwise.
    """
    count = getattr(original, FRAME_MASK)

    def method(self: Any, **given: Any) -> Tensor:
        first: Tensor = count(self, **given)
        samples: Tensor = given["attention_mask"]
        at_begin = getattr(self, NORM) == "padded" or (not recorded_by(()) and called_by_counting_head(self))
        if at_begin:
            return first
        left = (samples[:, :1] == 0) & (samples[:, -1:] == 1)
        return torch.where(left, first.flip(1), first)

    return as_original(count, method)

"""Layers for inference on the CPU, whose weights are laid out beforehand in fp32, bf16 or int8."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastssl import ops
from fastssl.kernels.prepacked_conv.weights import PrepackedWeight, prepack, unpack
from fastssl.packing import Packed

_NOT_FOR_TRAINING = (
    "the encoder's weights were prepacked for inference, which has no gradients; call it in evaluation mode and on "
    "inputs without gradients, or load it without `inference`"
)


class Prepacked(nn.Module):
    """Base class of layers that keep a prepacked weight in place of parameters.

    The state dict has the weight and bias under the usual names, in the values that the layer computes with. Loading a
    state dict packs its values. Copies and pickles contain the prepacked weight.

    Args:
        packed: Weight and bias.
    """

    packed: PrepackedWeight

    def __init__(self, packed: PrepackedWeight) -> None:
        super().__init__()
        self.packed = packed
        self.training = False

    def check(self, x: Tensor) -> None:
        """Check that a call needs no gradients.

        Raises:
            ValueError: The module is in training mode, or gradients of `x` would be needed.
        """
        if self.training or (torch.is_grad_enabled() and x.requires_grad):
            raise ValueError(_NOT_FOR_TRAINING)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Prepacked":
        """Refuse another device or dtype, which the other modules of an encoder would otherwise get."""
        example = fn(torch.zeros(1, device="cpu"))
        if example.device.type != "cpu" or example.dtype != torch.float32:
            raise ValueError(
                f"the encoder's weights were prepacked for inference on the CPU and cannot become {example.dtype} on "
                f"{example.device}; load it without `inference`, or with another one"
            )
        return self

    def _tensors(self) -> dict[str, Tensor]:
        """Return the weight and the bias, as the state dict of the replaced layer would have them."""
        weight, bias = unpack(self.packed)
        return {"weight": weight} | ({} if bias is None else {"bias": bias})

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, tensor in self._tensors().items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = self._tensors()
        missing = [name for name in own if prefix + name not in state_dict]
        missing_keys += [prefix + name for name in missing] if strict else []
        unexpected = [key for key in state_dict if key.startswith(prefix) and key.removeprefix(prefix) not in own]
        unexpected_keys += unexpected if strict else []
        given = {name: state_dict[prefix + name] for name in own if name not in missing}
        for name, tensor in given.items():
            if tensor.shape != own[name].shape:
                error_msgs.append(
                    f"size mismatch for {prefix}{name}: copying a param with shape {tuple(tensor.shape)}, the shape in "
                    f"the current model is {tuple(own[name].shape)}."
                )
                return
        if given:
            new = own | given
            self.packed = prepack(
                weight_of(new), new.get("bias"), format=self.packed.format, groups=self.packed.groups
            )

    def extra_repr(self) -> str:
        """Describe the layer for `print`."""
        c_out, c_in, kernel = self.packed.shape
        return f"{c_in * self.packed.groups}, {c_out}, kernel={kernel}, format={self.packed.format!r}"


class PrepackedLinear(Prepacked):
    """A linear layer with a prepacked weight.

    Args:
        packed: Weight and bias.
        dtype: dtype of the output, fp32 or bf16.
    """

    def __init__(self, packed: PrepackedWeight, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(packed)
        self.dtype = dtype
        self.out_features, self.in_features, _ = packed.shape

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (N, in_features) to (N, out_features)."""
        return prepacked_linears(x, [self])[0]

    def with_gelu(self, x: Tensor) -> Tensor:
        """Apply the layer, then GELU: (N, in_features) to (N, out_features)."""
        self.check(x)
        return ops.prepacked_linear(x, [self.packed], gelu=True, dtype=self.dtype)[0]

    def _tensors(self) -> dict[str, Tensor]:
        tensors = super()._tensors()
        return tensors | {"weight": tensors["weight"].squeeze(2)}


def prepacked_linears(x: Tensor, layers: "list[PrepackedLinear]") -> list[Tensor]:
    """Apply several layers to the same frames (N, C_in); their outputs (N, C_out) have the dtype of the first one's."""
    for layer in layers:
        layer.check(x)
    return ops.prepacked_linear(x, [layer.packed for layer in layers], dtype=layers[0].dtype)


class PrepackedConv(Prepacked):
    """A convolution of the front end with a prepacked weight; `kernel_size` and `stride` as in `torch.nn.Conv1d`.

    Args:
        packed: Weight and bias.
        stride: Stride in input frames.
        dtype: dtype of the output, fp32 or bf16.
    """

    def __init__(self, packed: PrepackedWeight, *, stride: int, dtype: torch.dtype) -> None:
        super().__init__(packed)
        self.kernel_size, self.stride, self.dtype = (packed.shape[2],), (stride,), dtype


class PrepackedPositionalConv(Prepacked):
    """A grouped convolution that keeps the length of utterances, with a prepacked weight.

    Args:
        packed: Weight and bias.
        weight_norm: Whether the replaced convolution had weight norm, and the state dict its parameters.
    """

    def __init__(self, packed: PrepackedWeight, *, weight_norm: bool) -> None:
        super().__init__(packed)
        self.kernel_size, self.weight_norm = (packed.shape[2],), weight_norm

    def with_gelu(self, x: Packed) -> Tensor:  # (N, D) -> (N, D)
        """Convolve each utterance, then apply GELU."""
        self.check(x.values)
        return ops.prepacked_conv(x.values, self.packed, x.layout, keep_length=True, gelu=True)[0]

    def forward(self, x: Packed) -> Tensor:  # (N, D) -> (N, D)
        """Convolve each utterance."""
        self.check(x.values)
        return ops.prepacked_conv(x.values, self.packed, x.layout, keep_length=True)[0]

    def _tensors(self) -> dict[str, Tensor]:
        tensors = super()._tensors()
        if not self.weight_norm:
            return tensors
        weight = tensors.pop("weight")
        norm = torch.linalg.vector_norm(weight, dim=(0, 1), keepdim=True)
        return tensors | {"parametrizations.weight.original0": norm, "parametrizations.weight.original1": weight}


def weight_of(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the weight of a layer from its tensors by name, which may be those of a weight norm over time."""
    if "weight" in tensors:
        return tensors["weight"]
    size, direction = (tensors[f"parametrizations.weight.original{number}"].float() for number in (0, 1))
    norm = torch.linalg.vector_norm(direction, dim=(0, 1), keepdim=True)
    return direction * torch.where(norm > 0, size / norm, 0.0)

"""Layers for inference on the CPU, whose weights are laid out beforehand in fp32, bf16 or int8."""

from collections.abc import Callable, Mapping, Sequence
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
_NOT_FOR_ORIGINAL = (
    "inference: the model's original code, which `output_attentions`, norm='padded' and `fastssl.validate` need, "
    "cannot compute with prepacked weights; call `fastssl.restore(model)`, or load the model without `inference`"
)


class Prepacked(nn.Module):
    """Base class of layers that keep a prepacked weight in place of parameters.

    The state dict has the weight and bias under the usual names, in the values that the layer computes with. Loading a
    state dict packs its values. Copies and pickles contain the prepacked weight.

    Args:
        packed: Weight and bias.
    """

    packed: PrepackedWeight
    #: The layer that was replaced, without its numbers: on the meta device, and in a tuple so that it is no submodule.
    _replaced: tuple[nn.Module, ...] = ()

    def __init__(self, packed: PrepackedWeight) -> None:
        super().__init__()
        self.packed = packed
        self.training = False

    def instead_of(self, layer: nn.Module) -> "Prepacked":
        """Take the mode of a layer, and keep the layer without its numbers, for `restored`."""
        self._replaced = (layer.to("meta"),)
        return self.train(layer.training)

    def restored(self) -> nn.Module:
        """Return the replaced layer with the numbers that this one computes with."""
        (layer,) = self._replaced
        layer = layer.to_empty(device="cpu")
        layer.load_state_dict(self._tensors())
        return layer.train(self.training)

    def check(self, x: Tensor) -> None:
        """Check that a call needs no gradients.

        Raises:
            ValueError: The module is in training mode, or gradients of `x` would be needed.
        """
        if self.training or (torch.is_grad_enabled() and x.requires_grad):
            raise ValueError(_NOT_FOR_TRAINING)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Prepacked":
        """Refuse another device or dtype, which the other modules of an encoder would otherwise get."""
        example = _checked_example(fn)
        if example.is_shared():
            for tensor in self.packed:
                if isinstance(tensor, Tensor):
                    tensor.share_memory_()
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
        given = {name: state_dict[prefix + name].detach().float() for name in own if name not in missing}
        for name, tensor in given.items():
            if tensor.shape != own[name].shape:
                error_msgs.append(
                    f"size mismatch for {prefix}{name}: copying a param with shape {tuple(tensor.shape)}, the shape in "
                    f"the current model is {tuple(own[name].shape)}."
                )
                return
        if given:
            new, before = own | given, self.packed
            try:
                self.packed = prepack(weight_of(new), new.get("bias"), format=before.format, groups=before.groups)
            except ValueError as error:  # such as NaN in "int8"
                error_msgs.append(f"{prefix}{error}.")

    def extra_repr(self) -> str:
        """Describe the layer for `print`."""
        c_out, c_in, kernel = self.packed.shape
        return f"{c_in * self.packed.groups}, {c_out}, kernel={kernel}, format={self.packed.format!r}"


def _checked_example(fn: Callable[[Tensor], Tensor]) -> Tensor:
    """Return what `Module._apply` would make of an fp32 tensor; raise ValueError unless it is in fp32 on the CPU."""
    example = fn(torch.zeros(1, device="cpu"))
    if example.device.type != "cpu" or example.dtype != torch.float32:
        raise ValueError(
            f"the encoder's weights were prepacked for inference on the CPU and cannot become {example.dtype} on "
            f"{example.device}; load it without `inference`, or with another one"
        )
    return example


def check_stays(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
    """Check a function of `Module._apply` before it changes the first parameter of a module with prepacked layers.

    Raises:
        ValueError: The module has such a layer, and the function moves or casts.
    """
    if any(isinstance(part, Prepacked) for part in module.modules()):
        _checked_example(fn)


def parameter_count(module: nn.Module) -> int:
    """Return the number of a module's parameters; prepacked layers count as the layers that they replace."""
    packed = [part._tensors() for part in module.modules() if isinstance(part, Prepacked)]
    own = sum(parameter.numel() for parameter in module.parameters())
    return own + sum(tensor.numel() for tensors in packed for tensor in tensors.values())


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
        """Apply the layer: (..., in_features) to (..., out_features)."""
        (out,) = prepacked_linears(x.flatten(0, -2), [self])
        return out.view(*x.shape[:-1], self.out_features)

    def with_gelu(self, x: Tensor) -> Tensor:
        """Apply the layer, then GELU: (N, in_features) to (N, out_features)."""
        self.check(x)
        return ops.prepacked_linear(x, [self.packed], gelu=True, dtype=self.dtype)[0]

    def _tensors(self) -> dict[str, Tensor]:
        tensors = super()._tensors()
        return tensors | {"weight": tensors["weight"].squeeze(2)}


def prepacked_linears(x: Tensor, layers: Sequence[PrepackedLinear]) -> list[Tensor]:
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
        self.out_channels, self.in_channels, _ = packed.shape

    def forward(self, x: Tensor) -> Tensor:
        """Refuse a call: one op computes the whole front end, and only the original code calls a convolution."""
        raise ValueError(_NOT_FOR_ORIGINAL)


class PrepackedPositionalConv(Prepacked):
    """A grouped convolution that keeps the length of utterances, with a prepacked weight.

    Args:
        packed: Weight and bias.
        norm_names: Names of size and direction in the state dict, if the replaced convolution had weight norm.
    """

    def __init__(self, packed: PrepackedWeight, norm_names: tuple[str, str] | None) -> None:
        super().__init__(packed)
        self.kernel_size, self.stride, self.norm_names = (packed.shape[2],), (1,), norm_names
        self.in_channels = self.out_channels = packed.shape[0]
        self.groups = packed.groups

    def instead_of(self, layer: nn.Module) -> "Prepacked":
        """Take the mode of a layer. It is not kept, because modules with a parametrisation cannot be pickled."""
        return self.train(layer.training)

    def restored(self) -> nn.Module:
        """Return a convolution like the replaced one, with the numbers that this one computes with."""
        (c_out, _, kernel), groups = self.packed.shape, self.packed.groups
        with torch.device("cpu"):
            conv = nn.Conv1d(c_out, c_out, kernel, padding=kernel // 2, groups=groups, bias=self.packed.has_bias)
        if self.norm_names == _NORM_NAMES[0]:
            nn.utils.parametrizations.weight_norm(conv, dim=2)
        elif self.norm_names is not None:
            nn.utils.weight_norm(conv, dim=2)
        conv.load_state_dict(self._tensors())
        return conv.train(self.training)

    def with_gelu(self, x: Packed) -> Tensor:  # (N, D) -> (N, D)
        """Convolve each utterance, then apply GELU."""
        self.check(x.values)
        return ops.prepacked_conv(x.values, self.packed, x.layout, keep_length=True, gelu=True)[0]

    def forward(self, x: Packed) -> Tensor:  # (N, D) -> (N, D)
        """Convolve each utterance."""
        if not isinstance(x, Packed):
            raise ValueError(_NOT_FOR_ORIGINAL)
        self.check(x.values)
        return ops.prepacked_conv(x.values, self.packed, x.layout, keep_length=True)[0]

    def _tensors(self) -> dict[str, Tensor]:
        tensors = super()._tensors()
        if self.norm_names is None:
            return tensors
        weight = tensors.pop("weight")
        norm = torch.linalg.vector_norm(weight, dim=(0, 1), keepdim=True)
        return tensors | dict(zip(self.norm_names, (norm, weight), strict=True))


#: Names of size and direction of a weight norm over time: of PyTorch's parametrisation, and of its older hook.
_NORM_NAMES = (("parametrizations.weight.original0", "parametrizations.weight.original1"), ("weight_g", "weight_v"))


def names_of_norm(conv: nn.Module) -> tuple[str, str] | None:
    """Return the names of size and direction in the state dict of a convolution with weight norm, else None."""
    state = conv.state_dict()
    return next((names for names in _NORM_NAMES if names[0] in state), None)


def weight_of(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the weight of a layer from its tensors by name, which may be those of a weight norm over time."""
    if "weight" in tensors:
        return tensors["weight"]
    size, direction = next((tensors[a].float(), tensors[b].float()) for a, b in _NORM_NAMES if a in tensors)
    norm = torch.linalg.vector_norm(direction, dim=(0, 1), keepdim=True)
    return direction * torch.where(norm > 0, size / norm, 0.0)

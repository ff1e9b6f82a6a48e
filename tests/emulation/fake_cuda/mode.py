"""The dispatch mode that makes CUDA tensors fake and records what the host does with them."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.emulation.fake_cuda import answers, pretend
from tests.emulation.fake_cuda.launches import note_launch, operators, recording
from tests.emulation.fake_cuda.record import Record, place

#: Operators that allocate without writing.
_ALLOCATE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
#: Operators in place that change a tensor's description, and not its memory.
_DESCRIBE = {"detach_", "resize_", "set_", "squeeze_", "unsqueeze_", "t_", "transpose_", "record_stream"}
#: Operators whose result has a size that only the device knows.
_SIZED_BY_DEVICE = {"unique_consecutive", "unique_dim", "bincount", "masked_select"}
#: Operators of which a GPU demands that all floating tensors have the same dtype; fake tensors do not check it.
_ONE_DTYPE = {
    *("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "convolution", "convolution_backward"),
    *("native_layer_norm", "native_layer_norm_backward", "native_group_norm", "native_group_norm_backward"),
    *("index_add", "index_add_", "index_copy", "index_copy_", "scatter", "scatter_", "scatter_add", "scatter_add_"),
    *("index_put", "index_put_", "_index_put_impl_"),
}
_Handler = Callable[["FakeCuda", Any, tuple[Any, ...], dict[str, Any]], Any]


class FakeCuda(TorchDispatchMode):
    """Within this mode, tensors on the CPU are real, and tensors on the GPU are fake.

    `record` has what happened since it was last replaced; `captures` has a record with a trace for each CUDA graph, of
    what it captured.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.record = Record()
        self.captures: list[Record] = []
        self._before_capture = self.record
        self._depth = 0
        self._outer = ExitStack()
        #: Storages of page-locked tensors; kept, so that no other storage gets the same address.
        self._pinned: dict[int, Any] = {}
        #: Tensors on the host into which an asynchronous copy runs, and what they contain once the host has waited.
        self._arriving: list[tuple[Tensor, Tensor]] = []

    def __enter__(self) -> "FakeCuda":
        self._depth += 1
        if self._depth == 1:
            self._outer.enter_context(pretend.cpu_tensors_from_literals())
            self._outer.enter_context(recording(lambda *launch: note_launch(self.record, *launch)))
            pretend.on_wait.append(self._note_wait)
            pretend.on_arrival.append(self._arrive)
            pretend.on_graph.append(self._note_graph)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            pretend.on_wait.remove(self._note_wait)
            pretend.on_arrival.remove(self._arrive)
            pretend.on_graph.remove(self._note_graph)
            self._outer.close()
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def _note_wait(self, reason: str) -> None:
        self.record.wait(reason)
        self._arrive()

    def _arrive(self) -> None:
        for target, values in self._arriving:
            target.copy_(values)
        self._arriving.clear()

    def _note_graph(self, what: str) -> None:
        if what == "begin":
            self._before_capture, self.record = self.record, Record(trace=[])
        elif what == "end":
            self.captures.append(self.record)
            self.record, captured = self._before_capture, self.record
            self.record.problems += captured.problems
            self.record.variants |= captured.variants
        else:
            self.record.launches["CUDA graph"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if name in ("is_pinned", "_pin_memory"):
            return self._page_locked(name, args[0])
        if kwargs.get("pin_memory"):
            return self._page_locked("_pin_memory", func(*args, **kwargs | {"pin_memory": False}))
        if func.namespace == "c10d":
            return self._collective(name, args)
        on_device = any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs)))
        device = kwargs.get("device")
        if not on_device and (device is None or torch.device(device).type != "cuda"):
            return func(*args, **kwargs)
        if func.namespace == "prim":  # a question about the tensor
            with self.fake:
                return func(*args, **kwargs)
        self.record.step(name, args, kwargs)
        if func.namespace == "fastssl_triton":
            self._check_devices(name, args, kwargs)
            with self:
                return operators()[name](*args, **kwargs)
        if func.namespace == "fastssl_native":
            return self._native(func, args, kwargs)
        if _is_composite(func):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if name in _ONE_DTYPE:
            self._check_dtypes(name, args)
        handler = _HANDLERS.get(name)
        result = NotImplemented if handler is None else handler(self, func, args, kwargs)
        return self.run(func, args, kwargs) if result is NotImplemented else result

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator on fake tensors, and count a launch unless it only describes or allocates memory."""
        name = func._schema.name.partition("::")[2]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, FakeTensor)]
        try:
            with self.fake:
                result = func(*tree_map(self._faked, args), **tree_map(self._faked, kwargs))
        except Exception as error:
            self.record.problem(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:300]}")
            raise
        writes = func._schema.is_mutable and name not in _DESCRIBE
        if writes or (name not in _ALLOCATE and not _shares_memory(result, inputs)):
            self.record.launches[name] += 1
        return result

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        with self.fake:
            return torch.empty(shape, dtype=dtype, device="cuda")

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._pinned

    def _page_locked(self, name: str, tensor: Tensor) -> Any:
        if isinstance(tensor, FakeTensor):
            return False if name == "is_pinned" else tensor
        if name == "is_pinned":
            return self.is_pinned(tensor)
        copy = tensor.clone()
        self._pinned[copy.untyped_storage()._cdata] = copy.untyped_storage()
        return copy

    def copy_later(self, target: Tensor, source: Tensor) -> Tensor:
        """Copy to page-locked memory of the host; before the host has waited, NaN or -1 is read there."""
        self.record.launches["copy to host"] += 1
        self._arriving.append((target, answers.values(source, target.dtype, place())))
        return target.fill_(torch.nan if target.is_floating_point() else -1)

    def _native(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = func._schema.name.partition("::")[2]
        self._check_devices(name, args, kwargs)
        if not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CUDA"):
            self.record.problem(f"{name}: has no kernel for CUDA")
        return self.run(func, args, kwargs)

    def _collective(self, name: str, args: Any) -> Any:
        """Count a collective of NCCL, for which the host does not wait; the values of other processes do not matter."""
        self._check_devices(name, args, {})
        self.record.launches[name] += 1
        return args[0], torch._C._distributed_c10d.FakeWork().boxed()

    def _check_devices(self, name: str, args: Any, kwargs: Any) -> None:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(tensor.device.type != "cuda" for tensor in tensors):
            self.record.problem(f"{name}: tensors are on {', '.join(str(tensor.device) for tensor in tensors)}")

    def _check_dtypes(self, name: str, args: Any) -> None:
        """Statistics, which are fp32 whatever the dtype of their input, do not count."""
        tensors = [leaf for leaf in args[: -2 if "norm" in name else None] if isinstance(leaf, Tensor)]
        tensors = [tensor for tensor in tensors if tensor.is_floating_point()]
        if "norm_backward" in name:
            tensors = tensors[:2]
        dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
        if len(dtypes) > 1:
            self.record.problem(f"{name}: expected one dtype, got {' and '.join(dtypes)}")

    def _faked(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor):
            return self.fake.from_tensor(leaf)
        return leaf


@cache
def _is_composite(func: Any) -> bool:
    """Whether an operator is made of others; in inference mode the dispatcher does not take it apart itself."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))


def _shares_memory(result: Any, inputs: list[FakeTensor]) -> bool:
    outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    memory = {tensor.untyped_storage()._cdata for tensor in inputs}
    return bool(outputs) and all(output.untyped_storage()._cdata in memory for output in outputs)


def _is_on_gpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


def _item(mode: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    mode.record.wait("item")
    return answers.scalar(args[0].dtype, place())


def _equal(mode: FakeCuda, func: Any, args: Any, kwargs: Any) -> bool:
    mode.record.wait("torch.equal")
    return True


def _to_copy(mode: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    source, dtype = args[0], kwargs.get("dtype") or args[0].dtype
    device = kwargs.get("device")
    target = source.device if device is None else torch.device(device)
    if target.type == source.device.type:
        return NotImplemented
    non_blocking = bool(kwargs.get("non_blocking"))
    if target.type == "cpu":
        return _to_host(mode, source, dtype, non_blocking=non_blocking)
    _note_copy_to_device(mode, source, non_blocking=non_blocking)
    return mode.empty(*source.shape, dtype=dtype)


def _to_host(mode: FakeCuda, source: Tensor, dtype: torch.dtype, *, non_blocking: bool) -> Tensor:
    if non_blocking:
        mode.record.problem("asynchronous copy to the host: its values may be read before they are there")
    mode.record.wait("copy to host")
    mode.record.launches["copy to host"] += 1
    return answers.values(source, dtype, place())


def _note_copy_to_device(mode: FakeCuda, source: Tensor, *, non_blocking: bool) -> None:
    mode.record.launches["copy to device"] += 1
    if not non_blocking:
        mode.record.wait("copy to device")
    elif not mode.is_pinned(source):
        mode.record.pageable[place()] += 1


def _copy_in_place(mode: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    target, source = args[:2]
    non_blocking = bool(args[2] if len(args) > 2 else kwargs.get("non_blocking"))
    if _is_on_gpu(target) == _is_on_gpu(source):
        return NotImplemented
    if _is_on_gpu(target):
        _note_copy_to_device(mode, source, non_blocking=non_blocking)
        return target
    if non_blocking and mode.is_pinned(target):
        return mode.copy_later(target, source)
    return target.copy_(_to_host(mode, source, source.dtype, non_blocking=non_blocking))


def _nonzero(mode: FakeCuda, func: Any, args: Any, kwargs: Any) -> Tensor:
    mode.record.wait("nonzero")
    mode.record.launches["nonzero"] += 1
    return mode.empty(answers.count_of(args[0].numel()), args[0].dim(), dtype=torch.int64)


def _sized_by_device(mode: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    name = func._schema.name.partition("::")[2]
    mode.record.wait(name)
    if name != "masked_select":
        return NotImplemented
    mode.record.launches[name] += 1
    return mode.empty(answers.count_of(args[0].numel()), dtype=args[0].dtype)


def _index(mode: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    """Note indices on the host, and replace masks by indices, as PyTorch does with `nonzero`."""
    source, indices, *others = args
    writes = func._schema.name != "aten::index"
    if writes and indices and others[0].numel() == 1 and _is_mask(indices[0]) and _is_on_gpu(indices[0]):
        return mode.run(func, args, kwargs)  # PyTorch fills by the mask, without looking at it
    replaced: list[Tensor | None] = []
    for index in indices:
        if index is not None and not _is_on_gpu(index):
            mode.record.wait("index on the host")
        if index is None or not _is_mask(index):
            replaced.append(index)
            continue
        mode.record.wait("index by a mask")
        mode.record.launches["nonzero"] += 1
        replaced += [mode.empty(answers.count_of(index.numel()), dtype=torch.int64) for _ in range(index.dim())]
    if writes and len(replaced) and any(index is not None and _is_mask(index) for index in indices):
        mode.record.launches["index_put"] += 1
        return source  # the shape of the values cannot be checked against a mask without values
    return mode.run(func, (source, replaced, *others), kwargs)


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _repeat_interleave(mode: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    if func is torch.ops.aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
        mode.record.wait("repeat_interleave without output_size")
        mode.record.launches["repeat_interleave"] += 1
        return mode.empty(2 * args[0].numel(), dtype=args[0].dtype)
    return NotImplemented


def _check_errors(mode: FakeCuda, func: Any, args: Any, kwargs: Any) -> None:
    mode.record.wait("check of a decomposition")


def _convolution(mode: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    """Give the shape of a convolution, because PyTorch would ask cuDNN for its choice of memory format."""
    x, weight, _, stride, padding, dilation, transposed = args[:7]
    mode.record.launches["convolution"] += 1
    assert not transposed
    sizes = [
        (x.shape[2 + axis] + 2 * padding[axis] - dilation[axis] * (weight.shape[2 + axis] - 1) - 1) // step + 1
        for axis, step in enumerate(stride)
    ]
    return mode.empty(x.shape[0], weight.shape[0], *sizes, dtype=x.dtype)


def _convolution_backward(mode: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    x, weight, needed = args[1], args[2], args[-1]
    mode.record.launches["convolution_backward"] += sum(needed)
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return tuple(
        mode.empty(*shape, dtype=x.dtype) if need else None for shape, need in zip(shapes, needed, strict=True)
    )


def _unique(mode: FakeCuda, func: Any, args: Any, kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the different values, their places and their counts; the host waits for how many there are."""
    mode.record.wait("_unique2")
    mode.record.launches["_unique2"] += 1
    values = args[0]
    count = answers.count_of(values.numel())
    places, counts = mode.empty(*values.shape, dtype=torch.int64), mode.empty(count, dtype=torch.int64)
    return mode.empty(count, dtype=values.dtype), places, counts


def _use_other_ctc_loss(mode: FakeCuda, func: Any, args: Any, kwargs: Any) -> bool:
    return False  # as for targets in int64 on the GPU


def _ctc_loss(mode: FakeCuda, func: Any, args: Any, kwargs: Any) -> tuple[Tensor, Tensor]:
    """Return the loss (B,) and what the backward pass needs (B, T, 2 S + 1), which PyTorch makes no fake tensors of."""
    scores, targets = args[:2]  # (T, B, C)
    mode.record.launches["_ctc_loss"] += 1
    time, batch, _ = scores.shape
    return mode.empty(batch, dtype=scores.dtype), mode.empty(batch, time, 2 * len(targets) + 1, dtype=scores.dtype)


def _ctc_loss_backward(mode: FakeCuda, func: Any, args: Any, kwargs: Any) -> Tensor:
    mode.record.launches["_ctc_loss_backward"] += 1
    return mode.empty(*args[1].shape, dtype=args[1].dtype)


_HANDLERS: dict[str, _Handler] = {
    "_use_cudnn_ctc_loss": _use_other_ctc_loss,
    "_use_miopen_ctc_loss": _use_other_ctc_loss,
    "_unique2": _unique,
    "_ctc_loss": _ctc_loss,
    "_ctc_loss_backward": _ctc_loss_backward,
    "_local_scalar_dense": _item,
    "equal": _equal,
    "_to_copy": _to_copy,
    "copy_": _copy_in_place,
    "nonzero": _nonzero,
    "index": _index,
    "index_put": _index,
    "index_put_": _index,
    "_index_put_impl_": _index,
    "repeat_interleave": _repeat_interleave,
    "_linalg_check_errors": _check_errors,
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    **dict.fromkeys(_SIZED_BY_DEVICE, _sized_by_device),
}

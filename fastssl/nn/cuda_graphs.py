"""CUDA graphs of a forward pass over packed waveforms, one for each bucket of batches. Not measured on a GPU yet.

For a few seconds of audio, the host takes longer to launch kernels than the GPU takes to run them. A CUDA graph
launches all of them at once, but always with the same shapes, arguments and grids. A batch is therefore filled up to
the size of its bucket (`nn/buckets.py`). Within a bucket, only the contents of tensors differ: the samples, and the
tensors of the layouts. Both are copied to where the graph reads them.
"""

from collections import OrderedDict
from collections.abc import Callable
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastssl.kernels.precision import of_convolutions, of_matrix_products
from fastssl.nn.buckets import Bucket, FilledLayout
from fastssl.nn.linear import casts_are_shared
from fastssl.packing import Layout, Packed, one_buffer, views_of

#: Device on which graphs exist.
_DEVICE = "cuda"


class _Graph:
    """The graph of a bucket, and the tensors that it reads and writes.

    Args:
        forward: Function from waveforms to hidden states, which all have the same layout.
        samples: (N, 1) samples of the first batch.
        filled: Its filled layout on the host, which keeps everything that `forward` asks for.
        pool: What graphs share.
    """

    def __init__(self, forward: "_Forward", samples: Tensor, filled: FilledLayout, pool: "_Pool") -> None:
        tensors = list(filled.tensors())
        self._samples = samples.new_zeros(filled.total, 1)
        self._layouts = torch.empty_like(one_buffer(tensors, pinned=False), device=samples.device)
        views = views_of(self._layouts, tensors)

        def run() -> list[Packed]:
            # Each run has a layout of its own. What it computes and keeps, the graph computes again.
            return forward(Packed(self._samples, filled.holding(iter(views))))

        self._fill(samples, filled)
        try:
            self._replay, self._states = _capture(run, pool)
        except TypeError as error:  # of `UnreadableLengths`, from the run before the capture
            raise ValueError(
                "use_cuda_graphs: a part of this encoder reads lengths on the host, as the backend 'reference' does "
                "(also for float64, or on a GPU without Triton); run it without CUDA graphs"
            ) from error

    def __call__(self, samples: Tensor, filled: FilledLayout, frames: tuple[int, ...]) -> list[Packed]:
        """Run the graph; its results are copied, because the next run overwrites them.

        Args:
            samples: (N, 1) samples of a batch of the bucket.
            filled: As for the constructor, for this batch.
            frames: Number of frames of each utterance.

        Returns:
            The hidden states of the utterances.
        """
        self._fill(samples, filled)
        self._replay()
        total = sum(frames)
        with torch.inference_mode(mode=False):  # a later forward may save it for gradients
            begins = self._states[0].layout.cu_seqlens[: len(frames) + 1].clone()
        layout = Layout(frames, begins, max(frames), total)
        return [Packed(state.values[:total].clone(), layout) for state in self._states]

    def _fill(self, samples: Tensor, filled: FilledLayout) -> None:
        """Copy a batch to where the graph reads it; the host does not wait."""
        self._samples[: len(samples)].copy_(samples)
        self._samples[len(samples) :].zero_()
        buffer = one_buffer(list(filled.tensors()), pinned=samples.device.type == "cuda")
        self._layouts.copy_(buffer, non_blocking=True)


class _Pool(NamedTuple):
    """What the graphs of an encoder share: memory, and the stream on which they are captured.

    PyTorch reuses memory on the same stream only, and its own stream for captures is on the device of the first one.
    """

    memory: Any
    stream: Any  # `torch.cuda.Stream`

    @classmethod
    def new(cls) -> "_Pool":
        """Make a pool on the current device."""
        return cls(torch.cuda.graph_pool_handle(), torch.cuda.Stream())


def _capture(run: Callable[[], list[Packed]], pool: _Pool) -> tuple[Callable[[], None], list[Packed]]:
    """Capture a CUDA graph.

    Args:
        run: Function to capture. It is called twice: once before, to compile kernels and to create handles.
        pool: What graphs share.

    Returns:
        A function that runs the graph, and the results of `run`, which each run of the graph overwrites.
    """
    current = torch.cuda.current_stream()
    pool.stream.wait_stream(current)
    graph = torch.cuda.CUDAGraph()
    # The graph's own context leaves its stream as the current one if the capture fails; this one does not.
    with torch.cuda.stream(pool.stream):
        run()
        # Other threads, such as one that copies batches to page-locked memory, may allocate meanwhile.
        mode = "thread_local"
        with torch.cuda.graph(graph, pool=pool.memory, stream=pool.stream, capture_error_mode=mode):
            states = run()
    current.wait_stream(pool.stream)
    return graph.replay, states


class _Parts:
    """What a graph was captured from: the modules, parameters and buffers of a module."""

    def __init__(self, module: nn.Module) -> None:
        modules = list(module.modules())
        dicts = ((part._modules, part._parameters, part._buffers) for part in modules)
        self._dicts: list[dict[str, Any]] = list(chain.from_iterable(dicts))
        self._attributes = list(map(vars, modules))
        self._hooks = [hooks for part in modules for hooks in (part._forward_hooks, part._forward_pre_hooks)]
        self._values = self._current()
        self._tensors = [value for value in self._values if isinstance(value, Tensor)]
        self._addresses = list(map(Tensor.data_ptr, self._tensors))

    def _current(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self._dicts)))

    def are_kept(self) -> bool:
        """Return whether the module has the same parts at the same addresses, in microseconds."""
        current = self._current()
        same = len(current) == len(self._values) and all(map(is_, current, self._values))
        return same and list(map(Tensor.data_ptr, self._tensors)) == self._addresses

    def can_be_captured(self) -> bool:
        """Return whether no part is in training mode, has a hook or another `forward`, which a graph would not call."""
        is_changed = any(place["training"] or "forward" in place for place in self._attributes)
        return not is_changed and not any(self._hooks) and not _has_any_global_hook()


_Forward = Callable[[Packed], list[Packed]]


class CudaGraphs:
    """Run the forward pass of an encoder by CUDA graphs, one for each bucket of batches.

    A graph is captured for the first batch of its bucket. Changes of weights in place have effect. If a parameter, a
    buffer or a module was replaced, all graphs are captured again. Copies and pickles have no graphs.

    Not measured on a GPU yet.

    Args:
        receptive_field: Number of samples that a frame is computed from.
        hop: Number of samples from one frame to the next.
        max_graphs: Number of graphs to keep; the one that was not used for the longest time is dropped.
        max_samples: Number of samples of a batch, above which it is run without a graph.
    """

    def __init__(self, *, receptive_field: int, hop: int, max_graphs: int, max_samples: int) -> None:
        self.receptive_field, self.hop = receptive_field, hop
        self.max_graphs, self.max_samples = max_graphs, max_samples
        self._graphs: OrderedDict[Any, _Graph] = OrderedDict()
        self._parts: _Parts | None = None
        self._pool: _Pool | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the settings, because graphs cannot be copied."""
        return vars(self) | {"_graphs": OrderedDict(), "_parts": None, "_pool": None}

    def run(
        self, module: nn.Module, forward: _Forward, ask: Callable[[Layout], Layout], waveforms: Packed
    ) -> list[Packed] | None:
        """Run the forward pass on a batch.

        Args:
            module: Module whose parts `forward` uses.
            forward: Function from waveforms to hidden states, which all have the same layout.
            ask: Function that asks the layout of the samples for what `forward` needs, see `Layout.plan`, and returns
                the layout of the frames.
            waveforms: (N, 1) samples.

        Returns:
            The hidden states; None if a graph cannot serve the call, which must then run without one.
        """
        if not self._serves(module, waveforms):
            return None
        samples, layout = waveforms
        bucket = Bucket.of(layout.lengths, receptive_field=self.receptive_field, hop=self.hop)
        device = samples.device.type
        autocast = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        key = bucket, samples.dtype, samples.device, autocast, of_convolutions(), of_matrix_products()
        with torch.cuda.device_of(samples):
            with torch.inference_mode(mode=False), torch.no_grad():
                filled = FilledLayout.fill(layout.lengths, bucket)
                filled.prepare(ask)
                if key not in self._graphs:
                    # Without autocast's cache: a graph may not read a copy from it that is freed after the call.
                    with torch.autocast(device, *autocast, cache_enabled=False):
                        self._graphs[key] = self._captured(forward, samples, filled)
            self._graphs.move_to_end(key)
            return self._graphs[key](samples, filled, ask(filled).lengths[: len(layout.lengths)])

    def _serves(self, module: nn.Module, waveforms: Packed) -> bool:
        """Return whether a graph can serve a call. Drop all graphs if the module has changed."""
        samples, layout = waveforms
        if (
            torch.compiler.is_compiling()
            or torch.is_grad_enabled()
            or samples.device.type != _DEVICE
            or samples.shape != (layout.total, 1)
            or not 0 < layout.total <= self.max_samples
            or casts_are_shared()
            or torch.cuda.is_current_stream_capturing()
        ):
            return False
        if self._parts is None or not self._parts.are_kept():
            self.clear()
            self._parts = _Parts(module)
        return self._parts.can_be_captured()

    def _captured(self, forward: _Forward, samples: Tensor, filled: FilledLayout) -> _Graph:
        # After a failed capture, PyTorch may refuse its memory to others: the next one begins with new memory.
        pool, self._pool = self._pool or _Pool.new(), None
        graph = _Graph(forward, samples, filled, pool)
        self._pool = pool
        while len(self._graphs) >= self.max_graphs:
            self._graphs.popitem(last=False)
        return graph

    def clear(self) -> None:
        """Drop all graphs and what they keep in memory."""
        if self._graphs:
            torch.cuda.synchronize()  # one of them may still run
        self._graphs.clear()
        self._parts = self._pool = None

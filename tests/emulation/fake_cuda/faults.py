"""Scenarios that must be found faulty: an encoder with one mistake of each kind, and one without."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.recipes import recipe_model
from fastssl.models.encoder import Encoder
from fastssl.packing import Packed
from tests.emulation.fake_cuda.scenario import Scenario, Watch
from tests.emulation.fake_cuda.training import two_processes, waveforms_of

Fault = Callable[[Tensor], Tensor]  # frames (N, C) -> frames (N, C)


def none(x: Tensor) -> Tensor:
    return x


def item(x: Tensor) -> Tensor:
    return x * x.max().item()


def truth(x: Tensor) -> Tensor:
    return x if x.isfinite().all() else x.nan_to_num()


def dropped_device(x: Tensor) -> Tensor:
    return x + torch.arange(x.shape[1])


def boolean_mask(x: Tensor) -> Tensor:
    return x + x[x[:, 0] > 0].mean(0)


def index_on_the_host(x: Tensor) -> Tensor:
    return x[torch.arange(x.shape[0])]


def blocking_copy(x: Tensor) -> Tensor:
    return x * torch.ones(x.shape[1]).to(x.device)


def literal(x: Tensor) -> Tensor:
    return x * torch.tensor([1.0], device=x.device)


def pageable_copy(x: Tensor) -> Tensor:
    return x * torch.ones(x.shape[1]).to(x.device, non_blocking=True)


def copy_to_host(x: Tensor) -> Tensor:
    return x * float(x[0, 0].cpu())


def asynchronous_copy_to_host(x: Tensor) -> Tensor:
    return x * float(x[0, 0].to("cpu", non_blocking=True))


def list_of_values(x: Tensor) -> Tensor:
    return x * float(sum(x[0, :4].tolist()))


def sizes_from_the_device(x: Tensor) -> Tensor:
    counts = torch.ones(x.shape[0], dtype=torch.int64, device=x.device)
    return x + torch.repeat_interleave(counts).sum()


def collective_on_the_host(x: Tensor) -> Tensor:
    with two_processes():
        torch.distributed.all_reduce(torch.ones(1))
    return x


def synchronize(x: Tensor) -> Tensor:
    torch.cuda.synchronize()
    return x


def mixed_dtypes(x: Tensor) -> Tensor:
    return x @ torch.ones(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)


def _gelu(x: Tensor) -> Tensor:
    y: Tensor = torch.ops.fastssl_triton.bias_gelu_dropout_fwd(x, None, 0.0, 2, None, 0)
    return y


def dtype_of_no_kernel(x: Tensor) -> Tensor:
    return _gelu(x.double()).float()


def mixture_of_no_kernel(x: Tensor) -> Tensor:
    negatives = torch.zeros(x.shape[0], 1, dtype=torch.int64, device=x.device)
    loss: Tensor = torch.ops.fastssl_triton.contrastive_loss_fwd(x, x.bfloat16(), negatives, 0.1)[0]
    return x + loss.unsqueeze(1)


def strided_argument(x: Tensor) -> Tensor:
    return x + _gelu(x.t()).t()


def argument_on_the_host(x: Tensor) -> Tensor:
    bias = torch.zeros(x.shape[1])
    y: Tensor = torch.ops.fastssl_triton.bias_gelu_dropout_fwd(x, bias, 0.0, 2, None, 0)
    return y


@triton.jit  # type: ignore[untyped-decorator]
def copy_kernel(x_ptr: Any, out_ptr: Any, rows: Any, WIDTH: tl.constexpr) -> None:  # noqa: N803
    index = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    tl.store(out_ptr + index, tl.load(x_ptr + index, mask=index < rows), mask=index < rows)


def grid_out_of_range(x: Tensor) -> Tensor:
    copy_kernel[1, 70_000](x, x, 2, WIDTH=64)
    return x


def empty_grid(x: Tensor) -> Tensor:
    copy_kernel[0,](x, x, 2, WIDTH=64)
    return x


def variant_per_length(x: Tensor) -> Tensor:
    copy_kernel[1,](x, x, 2, WIDTH=x.shape[0])
    return x


def variant_per_divisibility(x: Tensor) -> Tensor:
    copy_kernel[1,](x, x, 15 + x.shape[0] % 2, WIDTH=64)
    return x


def variant_per_alignment(x: Tensor) -> Tensor:
    copy_kernel[1,](x.flatten()[x.shape[0] % 2 :], x, 2, WIDTH=64)
    return x


#: All of them; `test_instrument.py` says what must be found.
FAULTS: tuple[Fault, ...] = (
    item,
    truth,
    dropped_device,
    boolean_mask,
    index_on_the_host,
    blocking_copy,
    literal,
    pageable_copy,
    copy_to_host,
    asynchronous_copy_to_host,
    list_of_values,
    sizes_from_the_device,
    collective_on_the_host,
    synchronize,
    mixed_dtypes,
    dtype_of_no_kernel,
    mixture_of_no_kernel,
    strided_argument,
    argument_on_the_host,
    grid_out_of_range,
    empty_grid,
    variant_per_length,
    variant_per_divisibility,
    variant_per_alignment,
)


def scenarios() -> Iterator[tuple[str, Scenario]]:
    """Yield the name of each scenario, and the scenario."""
    for fault in (none, *FAULTS):
        yield f"fault/{fault.__name__}", partial(_run, fault=fault)


def _run(watch: Watch, *, fault: Fault) -> None:
    """Run an encoder whose front end makes a mistake, on two batches."""
    encoder = Encoder(recipe_model("wav2vec2-tiny")).eval()
    with watch.unwatched():
        encoder.to("cuda")
        batches = [waveforms_of(seconds).to("cuda") for seconds in ((2.0, 3.0), (2.5, 1.5, 1.04))]
    with torch.inference_mode():
        with watch.phase("forward"):
            _forward(encoder, batches[0], fault)
        with watch.no_new_variants():
            _forward(encoder, batches[1], fault)


def _forward(encoder: Encoder, waveforms: Packed, fault: Fault) -> None:
    frames = encoder.extract_features(waveforms, normalize=False)
    encoder.encoder(encoder.project(Packed(fault(frames.values), frames.layout)).frames)

"""Build our encoder in ONNX Runtime and OpenVINO, tuned as their manuals say, for comparison: the extra `bench`.

Both get the same ONNX file, which PyTorch exports from the Transformers model with our weights.
"""

import importlib
import tempfile
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import rivals
from fastssl.models.encoder import Encoder
from fastssl.packing import Layout

Array = np.ndarray[Any, Any]
#: A function from waveforms, (samples,) each, to last hidden states, (frames, width) each.
Encode = Callable[[Sequence[Array]], list[Array]]


class _LastState(nn.Module):
    """A Transformers encoder as a function of waveforms (B, T) and, if it takes one, their mask (B, T)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, audio: Tensor, mask: Tensor | None = None) -> Tensor:
        out: Tensor = self.model(audio, attention_mask=mask).last_hidden_state
        return out


def export(encoder: Encoder, folder: Path, *, masked: bool = False) -> Path:
    """Export an encoder to ONNX with the positional convolution's weight computed.

    Args:
        encoder: Our encoder, on the CPU in fp32.
        folder: Folder to write to.
        masked: Whether the model takes an attention mask, for padded batches.

    Returns:
        The ONNX file.
    """
    model = rivals.transformers_encoder(encoder).eval()
    model.set_attn_implementation("eager")  # the fused operators of the engines are found in this form
    for module in model.modules():
        if nn.utils.parametrize.is_parametrized(module, "weight"):
            nn.utils.parametrize.remove_parametrizations(module, "weight")
    path = folder / ("masked.onnx" if masked else "encoder.onnx")
    audio = torch.randn(2, 16_000)
    inputs = (audio, torch.ones(2, 16_000, dtype=torch.long)) if masked else (audio,)
    names = ["audio", "mask"][: len(inputs)]
    axes = {name: {0: "batch", 1: "samples"} for name in names} | {"out": {0: "batch", 1: "frames"}}
    with torch.no_grad():
        torch.onnx.export(
            _LastState(model),
            inputs,
            str(path),
            input_names=names,
            output_names=["out"],
            dynamic_axes=axes,
            opset_version=17,
            dynamo=False,
        )
    return path


def onnx_runtime(encoder: Encoder, *, at_once: int, threads: int, int8: bool = False) -> Encode:
    """Run utterances one by one in ONNX Runtime, with its optimiser for transformers.

    Args:
        encoder: Encoder to export.
        at_once: Number of sessions that run at the same time, with `threads` / `at_once` threads each.
        threads: Number of threads in all.
        int8: Whether to quantise the linear layers' products dynamically.
    """
    runtime: Any = importlib.import_module("onnxruntime")
    optimizer: Any = importlib.import_module("onnxruntime.transformers.optimizer")
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "optimised.onnx")
        config = encoder.config
        fused = optimizer.optimize_model(
            str(export(encoder, Path(name))),
            model_type="bert",
            num_heads=config.num_attention_heads,
            hidden_size=config.hidden_size,
            opt_level=1,
        )
        fused.save_model_to_file(str(path), use_external_data_format=False)
        if int8:
            quantization: Any = importlib.import_module("onnxruntime.quantization")
            quantised = Path(name, "int8.onnx")
            quantization.quantize_dynamic(
                path,
                quantised,
                op_types_to_quantize=["MatMul", "Attention"],
                per_channel=True,
                extra_options={"DefaultTensorType": 1},  # fp32, for operators whose types ONNX cannot infer
            )
            path = quantised
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads // at_once
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
        sessions = [
            runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]) for _ in range(at_once)
        ]

    def run(session: Any, audio: Array) -> Array:
        out: Array = session.run(None, {"audio": audio[None]})[0][0]
        return out

    return _one_by_one([partial(run, session) for session in sessions])


def openvino(
    encoder: Encoder,
    *,
    at_once: int,
    threads: int,
    precision: Literal["f32", "bf16"],
    calibration: Sequence[Array] = (),
) -> Encode:
    """Run utterances one by one in OpenVINO.

    Args:
        encoder: Encoder to export.
        at_once: Number of streams, which share `threads`.
        threads: Number of threads in all.
        precision: The hint for the inference precision.
        calibration: Waveforms to quantise the linear layers to int8 with NNCF; none leaves them in `precision`.
    """
    compiled = _openvino_model(encoder, at_once=at_once, threads=threads, precision=precision, calibration=calibration)

    def run(request: Any, audio: Array) -> Array:
        out: Array = request.infer({"audio": audio[None]})["out"][0].copy()
        return out

    return _one_by_one([partial(run, compiled.create_infer_request()) for _ in range(at_once)])


def openvino_padded(encoder: Encoder, *, threads: int, precision: Literal["f32", "bf16"]) -> Encode:
    """Run a padded batch with its mask in OpenVINO."""
    compiled = _openvino_model(encoder, at_once=1, threads=threads, precision=precision, calibration=(), masked=True)
    request = compiled.create_infer_request()

    def encode(waveforms: Sequence[Array]) -> list[Array]:
        longest = max(map(len, waveforms))
        audio = np.zeros((len(waveforms), longest), np.float32)
        mask = np.zeros((len(waveforms), longest), np.int64)
        for row, waveform in enumerate(waveforms):
            audio[row, : len(waveform)], mask[row, : len(waveform)] = waveform, 1
        found = request.infer({"audio": audio, "mask": mask})["out"]
        layout = encoder.config.frame_layout(Layout.from_lengths([len(waveform) for waveform in waveforms]))
        frames = layout.lengths
        return [states[:count].copy() for states, count in zip(found, frames, strict=True)]

    return encode


def _openvino_model(
    encoder: Encoder,
    *,
    at_once: int,
    threads: int,
    precision: str,
    calibration: Sequence[Array],
    masked: bool = False,
) -> Any:
    ov: Any = importlib.import_module("openvino")
    core = ov.Core()
    with tempfile.TemporaryDirectory() as name:
        model = core.read_model(export(encoder, Path(name), masked=masked))
        if calibration:
            model = _quantised(model, calibration)
        return core.compile_model(
            model,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": precision,
                "PERFORMANCE_HINT": "LATENCY" if at_once == 1 else "THROUGHPUT",
                "NUM_STREAMS": str(at_once),
                "INFERENCE_NUM_THREADS": threads,
            },
        )


def _quantised(model: Any, calibration: Sequence[Array]) -> Any:
    """Quantise the linear layers only: one scale per tensor is too coarse for the convolutions."""
    nncf: Any = importlib.import_module("nncf")
    return nncf.quantize(
        model,
        nncf.Dataset([{"audio": waveform[None]} for waveform in calibration]),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(calibration),
        ignored_scope=nncf.IgnoredScope(types=["Convolution", "GroupConvolution"], validate=False),
    )


def _one_by_one(workers: Sequence[Callable[[Array], Array]]) -> Encode:
    """Return a function that gives waveforms to workers as they get free, the longest first."""
    if len(workers) == 1:
        return lambda waveforms: [workers[0](waveform) for waveform in waveforms]

    def encode(waveforms: Sequence[Array]) -> list[Array]:
        found: dict[int, Array] = {}
        waiting = sorted(range(len(waveforms)), key=lambda index: len(waveforms[index]))

        def work(worker: Callable[[Array], Array]) -> None:
            while True:
                try:
                    index = waiting.pop()
                except IndexError:
                    return
                found[index] = worker(waveforms[index])

        threads = [threading.Thread(target=work, args=(worker,)) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [found[index] for index in range(len(waveforms))]

    return encode

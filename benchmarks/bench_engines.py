"""Measure inference beside ONNX Runtime and OpenVINO: `python -m benchmarks.bench_engines [--output JSON]`.

Each engine runs utterances one at a time on all threads, or two at once on half of the threads each, or as a padded
batch. Ours runs the packed batch. Needs the extra `bench`. Weights are random.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import engines, limits, rivals, workloads
from benchmarks.engines import Array, Encode
from benchmarks.harness import Contenders, Entry, Outputs, Row, compare
from benchmarks.recipes import recipe_model
from benchmarks.report import Rows, main
from fastssl.models.encoder import Encoder
from fastssl.packing import Packed

#: Lengths (s) of the utterances whose features are compared with Transformers in fp64.
_GATE_S = [3.0, 1.3]
#: Largest error of any contender, relative to the largest feature: that of OpenVINO's int8 with random weights is 0.12.
_TOLERANCE = 0.25
_CALIBRATION_S = [4.0] * 12


def inference(title: str, lengths_s: Sequence[float], device: torch.device) -> Row:
    """Compare our encoder in each format with the engines in each of theirs.

    Args:
        title: Title of the row.
        lengths_s: Lengths of the utterances in seconds.
        device: The CPU.
    """
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    encoder = Encoder(recipe_model("wav2vec2-base")).eval()
    batch = workloads.waveforms(lengths_s, device)
    waveforms = _arrays(batch)
    gate = workloads.waveforms(_GATE_S, device)
    calibration = [waveform[:64_000] for waveform in _arrays(workloads.waveforms(_CALIBRATION_S, device))]
    contenders = Contenders()

    def ours(name: str, model: Encoder) -> None:
        check: Callable[[], Outputs] = _no_grad(lambda: _outputs(model(gate).features.unpack()))
        contenders.add(name, _no_grad(lambda: model(batch)), check)

    for format in ("fp32", "bf16", "int8"):
        try:
            ours(f"fastssl, {format}", copy.deepcopy(encoder).prepack(format))
        except ValueError as error:
            contenders.skipped[f"fastssl, {format}"] = str(error)
    ours("fastssl, parameters in fp32", encoder)

    def invite(name: str, make: Callable[[], Encode]) -> None:
        def entry() -> Entry:
            encode = make()

            def check() -> Outputs:  # each alone, because the group norm of a padded batch includes the padding
                return _outputs([torch.from_numpy(encode([waveform])[0]) for waveform in _arrays(gate)])

            return lambda: encode(waveforms), check

        contenders.invite(name, entry)

    for at_once in (1, 2) if len(lengths_s) > 1 else (1,):
        how = "one at a time" if at_once == 1 else "two at once"
        shared: dict[str, Any] = {"at_once": at_once, "threads": threads}
        invite(f"ONNX Runtime fp32, {how}", partial(engines.onnx_runtime, encoder, **shared))
        invite(f"ONNX Runtime int8, {how}", partial(engines.onnx_runtime, encoder, **shared, int8=True))
        for precision in ("f32", "bf16"):
            invite(f"OpenVINO {precision}, {how}", partial(engines.openvino, encoder, **shared, precision=precision))
        invite(
            f"OpenVINO int8 and bf16, {how}",
            partial(engines.openvino, encoder, **shared, precision="bf16", calibration=calibration),
        )
    if len(lengths_s) > 1:
        invite("OpenVINO f32, padded", partial(engines.openvino_padded, encoder, threads=threads, precision="f32"))
    gemms = limits.encoder(encoder.config, workloads.samples_of(lengths_s), backward=False)
    return compare(
        title,
        contenders,
        reference=lambda: _reference(encoder, gate),
        tolerance=_TOLERANCE,
        device=device,
        limits=lambda: limits.gemm_limits(gemms, torch.float32, device),
        audio_s=sum(lengths_s),
        budget_s=90,
        notes=[f"padded batch: {workloads.padding_factor(lengths_s):.2f} times the valid audio"],
    )


def _no_grad(call: Callable[[], Any]) -> Callable[[], Any]:
    return torch.inference_mode()(call)


def _arrays(batch: Packed) -> list[Array]:
    return [waveform[:, 0].numpy() for waveform in batch.unpack()]


def _outputs(states: Sequence[Tensor]) -> Outputs:
    return {f"utterance {index}": x for index, x in enumerate(states)}


def _reference(encoder: Encoder, gate: Packed) -> Outputs:
    """Compute the reference with Transformers in fp64, one utterance at a time."""
    model = rivals.in_double(rivals.transformers_encoder(encoder))
    with torch.no_grad():
        return _outputs([model(waveform.double().t()).last_hidden_state[0] for waveform in gate.unpack()])


ROWS: Rows = {
    "engines-one": partial(inference, "inference, wav2vec 2.0 base, one 10 s utterance", [10.0]),
    "engines-one-second": partial(inference, "inference, wav2vec 2.0 base, one utterance of 1 s", [1.0]),
    "engines-read-speech": partial(
        inference, "inference, wav2vec 2.0 base, read-speech batch of 4", workloads.read_speech(4)
    ),
    "engines-short": partial(inference, "inference, wav2vec 2.0 base, short batch of 16", workloads.short(16)),
}

if __name__ == "__main__":
    main(ROWS, __doc__)

"""Measure what it costs to open a base encoder for inference, beside the engines: `python -m benchmarks.bench_start`.

Each contender runs in a process of its own, which imports its libraries, opens the model from a file, and encodes 10 s
of audio twice. Memory is anonymous memory (RssAnon: without the pages of mapped files) above that after the imports.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import engines, workloads
from benchmarks.engines import Array
from benchmarks.machine import describe, undisturbed
from benchmarks.recipes import recipe_model
from fastssl.models.encoder import Encoder

_ROUNDS = 3
#: Contender -> name of a function of this module that opens it, and its arguments.
_CONTENDERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "fastssl, fp32": ("fastssl", ("fp32",)),
    "fastssl, bf16": ("fastssl", ("bf16",)),
    "fastssl, int8": ("fastssl", ("int8",)),
    "fastssl, parameters in fp32": ("fastssl", ()),
    "Transformers": ("transformers", ()),
    "ONNX Runtime": ("onnx_runtime", ()),
    "OpenVINO f32": ("openvino", ("f32",)),
    "OpenVINO bf16": ("openvino", ("bf16",)),
}


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon")


@contextmanager
def _watched() -> Iterator[dict[str, int]]:
    """Record the peak of anonymous memory, every millisecond."""
    found, done = {"peak": _anonymous_bytes()}, threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            found["peak"] = max(found["peak"], _anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def _opened_fastssl(folder: Path, *formats: str) -> Callable[[Array], Any]:
    import fastssl
    from fastssl.packing import Packed

    encoder = fastssl.load_encoder(folder / "encoder", inference=formats[0] if formats else None, normalize=False)  # type: ignore[arg-type]

    def encode(audio: Array) -> Any:
        with torch.inference_mode():
            return encoder(Packed.pack([torch.from_numpy(audio)])).features

    return encode


def _opened_transformers(folder: Path) -> Callable[[Array], Any]:
    from transformers import Wav2Vec2Model

    model: Any = Wav2Vec2Model.from_pretrained(folder / "encoder")
    model.eval()

    def encode(audio: Array) -> Any:
        with torch.inference_mode():
            return model(torch.from_numpy(audio)[None]).last_hidden_state

    return encode


def _opened_onnx_runtime(folder: Path) -> Callable[[Array], Any]:
    import onnxruntime  # type: ignore[import-not-found]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(folder / "encoder.onnx"), options, providers=["CPUExecutionProvider"])
    return lambda audio: session.run(None, {"audio": audio[None]})


def _opened_openvino(folder: Path, precision: str) -> Callable[[Array], Any]:
    import openvino  # type: ignore[import-not-found]

    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    model = openvino.Core().compile_model(str(folder / "encoder.onnx"), "CPU", settings)
    request = model.create_infer_request()
    return lambda audio: request.infer({"audio": audio[None]})


def _measure(contender: str, folder: Path, threads: int) -> dict[str, float]:
    """Open one contender in this process and call it."""
    torch.set_num_threads(threads)
    name, arguments = _CONTENDERS[contender]
    for library in {"fastssl": ["fastssl"], "transformers": ["transformers"]}.get(name, [name.replace("_", "")]):
        __import__(library)
    audio = workloads.waveforms([10.0], torch.device("cpu")).values[:, 0].numpy().astype(np.float32)
    before = _anonymous_bytes()
    with _watched() as memory:
        began_s = time.perf_counter()
        encode = globals()[f"_opened_{name}"](folder, *arguments)
        opened_s = time.perf_counter() - began_s
        opened = memory["peak"] - before
        began_s = time.perf_counter()
        encode(audio)
        first_s = time.perf_counter() - began_s
        seconds = []
        for _ in range(5):
            began_s = time.perf_counter()
            encode(audio)
            seconds.append(time.perf_counter() - began_s)
    return {
        "open_s": opened_s,
        "first_call_s": first_s,
        "later_call_s": float(np.median(seconds)),
        "peak_open_bytes": opened,
        "peak_bytes": memory["peak"] - before,
        "held_bytes": _anonymous_bytes() - before,
    }


def main() -> None:
    """Measure all contenders in turn, print a table, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--contender", choices=_CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        print(json.dumps(_measure(args.contender, args.folder, args.threads)))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in _CONTENDERS}
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        encoder = Encoder(recipe_model("wav2vec2-base")).eval()
        encoder.save_pretrained(Path(folder, "encoder"))
        try:
            engines.export(encoder, Path(folder))
        except (ImportError, RuntimeError) as error:  # PyTorch raises the latter without onnx
            skipped |= {name: str(error) for name in ("ONNX Runtime", "OpenVINO f32", "OpenVINO bf16")}
        for _ in range(_ROUNDS):
            for name in found.keys() - skipped.keys():
                command = [sys.executable, "-m", "benchmarks.bench_start", "--contender", name, "--folder", folder]
                command += ["--threads", str(args.threads)]
                result = undisturbed(partial(subprocess.run, command, capture_output=True, text=True, check=False))
                if result.returncode:
                    skipped[name] = result.stderr.strip().splitlines()[-1][:200]
                    continue
                found[name].append(json.loads(result.stdout.splitlines()[-1]))
    rows = {
        name: {key: float(np.median([run[key] for run in runs])) for key in runs[0]}
        for name, runs in found.items()
        if runs
    }
    print(f"{'':30} {'open s':>8} {'first s':>8} {'later s':>8} {'peak MB, open':>14} {'peak MB':>8} {'held MB':>8}")
    for name, row in rows.items():
        memory = [row[key] / 1e6 for key in ("peak_open_bytes", "peak_bytes", "held_bytes")]
        print(
            f"{name:30} {row['open_s']:8.2f} {row['first_call_s']:8.3f} {row['later_call_s']:8.3f} "
            f"{memory[0]:14.0f} {memory[1]:8.0f} {memory[2]:8.0f}"
        )
    for name, why in skipped.items():
        print(f"{name}: not measured ({why})")
    if args.output:
        content = describe(torch.device("cpu")) | {"rows": rows, "skipped": skipped}
        args.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()

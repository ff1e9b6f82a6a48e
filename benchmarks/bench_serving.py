"""Measure latency under load, beside the engines: `python -m benchmarks.bench_serving [--output JSON] [--figure PNG]`.

Requests of read-speech lengths arrive at random times (a Poisson process with a fixed seed); every length is new. Ours
collects the requests that wait, and those of a short window after the first, into packed batches. The engines take one
request at a time on all threads, or two at once on half of the threads each, or padded batches. The latency of a
request is the time from its arrival to its result.
"""

import argparse
import json
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import engines, workloads
from benchmarks.engines import Array, Encode
from benchmarks.harness import reason
from benchmarks.machine import describe, wait_until_quiet
from benchmarks.recipes import recipe_model
from fastssl.models.encoder import Encoder
from fastssl.packing import Packed

#: Most audio in a batch, in seconds: enough to keep the cores busy, little enough for those who wait.
_BATCH_S = 30.0
_RATE_HZ = workloads.SAMPLE_RATE_HZ


@dataclass
class Request:
    """A waveform, when it arrived, and when its result was ready, in seconds."""

    waveform: Array
    arrived_s: float
    done_s: float = 0.0


@dataclass
class Server:
    """How a contender serves requests.

    Attributes:
        encode: Encodes a batch of waveforms.
        workers: Number of threads that call it.
        window_s: Time to wait for more requests after the first of a batch; None takes one request at a time.
    """

    encode: Encode
    workers: int
    window_s: float | None


def serve(server: Server, requests: Sequence[Request]) -> None:
    """Let requests arrive at their times, and fill in when each was done; times are from the start."""
    waiting: queue.Queue[Request | None] = queue.Queue()
    began_s = time.perf_counter()

    def work() -> None:
        while (first := waiting.get()) is not None:
            batch = [first]
            if server.window_s is not None:
                _collect(batch, waiting, server.window_s)
            server.encode([request.waveform for request in batch])
            for request in batch:
                request.done_s = time.perf_counter() - began_s

    threads = [threading.Thread(target=work) for _ in range(server.workers)]
    for thread in threads:
        thread.start()
    for request in requests:
        time.sleep(max(0.0, request.arrived_s - (time.perf_counter() - began_s)))
        waiting.put(request)
    for _ in threads:
        waiting.put(None)
    for thread in threads:
        thread.join()


def _collect(batch: list[Request], waiting: "queue.Queue[Request | None]", window_s: float) -> None:
    """Add waiting requests to a batch, up to `_BATCH_S` of audio."""
    until_s, samples = time.perf_counter() + window_s, len(batch[0].waveform)
    while samples < _BATCH_S * _RATE_HZ:
        try:
            request = waiting.get(timeout=max(0.0, until_s - time.perf_counter()))
        except queue.Empty:
            return
        if request is None:
            waiting.put(None)
            return
        batch.append(request)
        samples += len(request.waveform)


def requests_for(audio_s_per_s: float, duration_s: float, seed: int) -> list[Request]:
    """Draw requests that bring a number of seconds of audio per second, on average."""
    random = np.random.default_rng(seed)
    lengths_s = workloads.read_speech(400)
    mean_s = sum(lengths_s) / len(lengths_s)
    arrivals, now_s = [], 0.0
    while (now_s := now_s + random.exponential(mean_s / audio_s_per_s)) < duration_s:
        samples = int(random.choice(lengths_s) * _RATE_HZ + random.integers(-2000, 2000))
        arrivals.append(Request(random.standard_normal(max(8000, samples)).astype(np.float32), now_s))
    return arrivals


def servers(threads: int) -> dict[str, Callable[[], Server]]:
    """Return what builds each contender."""
    torch.manual_seed(0)
    encoder = Encoder(recipe_model("wav2vec2-base")).eval()
    calibration = [x[:, 0].numpy() for x in workloads.waveforms([4.0] * 12, torch.device("cpu")).unpack()]

    def ours(format: Any, window_s: float) -> Server:
        packed = Encoder(encoder.config).eval()
        packed.load_state_dict(encoder.state_dict())
        packed.prepack(format)

        def encode(waveforms: Sequence[Array]) -> list[Array]:
            with torch.inference_mode():
                batch = Packed.pack([torch.from_numpy(waveform) for waveform in waveforms])
                return [x.numpy() for x in packed(batch, normalize=False).features.unpack()]

        return Server(encode, 1, window_s)

    def theirs(make: Callable[..., Encode], at_once: int, **options: Any) -> Server:
        if at_once == 1:
            return Server(make(encoder, at_once=1, threads=threads, **options), 1, None)
        return Server(make(encoder, at_once=at_once, threads=threads, **options), 1, 0.0)

    found: dict[str, Callable[[], Server]] = {}
    for format in ("fp32", "bf16", "int8"):
        for window_ms in (0, 50):
            found[f"fastssl {format}, window {window_ms} ms"] = partial(ours, format, window_ms / 1e3)
    for at_once, how in ((1, "one at a time"), (2, "two at once")):
        found[f"ONNX Runtime fp32, {how}"] = partial(theirs, engines.onnx_runtime, at_once)
        for precision in ("f32", "bf16"):
            found[f"OpenVINO {precision}, {how}"] = partial(theirs, engines.openvino, at_once, precision=precision)
        found[f"OpenVINO int8 and bf16, {how}"] = partial(
            theirs, engines.openvino, at_once, precision="bf16", calibration=calibration
        )
    found["OpenVINO f32, padded"] = lambda: Server(
        engines.openvino_padded(encoder, threads=threads, precision="f32"), 1, 0.0
    )
    return found


def measure(server: Server, loads: Sequence[float], duration_s: float) -> list[dict[str, float]]:
    """Serve each load, in seconds of audio per second, and return latencies and throughput.

    Stops after the first load that the server cannot keep up with.
    """
    rows = []
    for load in loads:
        requests = requests_for(load, duration_s, seed=1)
        wait_until_quiet()
        serve(server, requests)
        latencies = [request.done_s - request.arrived_s for request in requests]
        audio_s = sum(len(request.waveform) for request in requests) / _RATE_HZ
        last_s = max(request.done_s for request in requests)
        p50, p99 = np.quantile(latencies, [0.5, 0.99]).tolist()
        rows.append(
            {"load": load, "throughput": audio_s / last_s, "p50_s": p50, "p99_s": p99, "requests": len(requests)}
        )
        if p50 > 2.0:
            break
    return rows


def figure(rows: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Plot the 99th percentile of the latency against the load."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name, points in rows.items():
        style = "-" if name.startswith("fastssl") else "--"
        axes.plot([p["load"] for p in points], [p["p99_s"] for p in points], style, marker=".", label=name)
    axes.set(xlabel="load (s of audio per s)", ylabel="99th percentile of the latency (s)", yscale="log")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure all contenders one after the other, print a table, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--duration_s", type=float, default=30.0, help="time in which requests arrive, for each load")
    parser.add_argument("--loads", type=float, nargs="+", default=[10, 20, 30, 40, 60, 80], help="s of audio per s")
    parser.add_argument("--only", action="append", help="start of a contender's name; may be repeated")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--figure", type=Path, help="PNG file for a plot of the latencies")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: dict[str, list[dict[str, float]]] = {}
    for name, make in servers(args.threads).items():
        if args.only and not name.startswith(tuple(args.only)):
            continue
        try:
            server = make()
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            print(f"{name}: not measured ({reason(error)})")
            continue
        serve(server, requests_for(10, 3, seed=0))
        rows[name] = measure(server, args.loads, args.duration_s)
        for row in rows[name]:
            print(
                f"{name:40} load {row['load']:5.0f}  throughput {row['throughput']:6.1f}  p50 {row['p50_s']:7.3f} s  "
                f"p99 {row['p99_s']:7.3f} s  ({row['requests']} requests)",
                flush=True,
            )
        if args.output:
            content = describe(torch.device("cpu")) | {"rows": rows}
            args.output.write_text(json.dumps(content, indent=1) + "\n")
    if args.figure:
        figure(rows, args.figure)


if __name__ == "__main__":
    main()

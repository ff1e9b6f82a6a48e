"""`fastssl probe`: open encoders and tables, run the probe, print a table, write a JSON file."""

import dataclasses
import logging
import statistics
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from rich import get_console
from rich.table import Table as RichTable
from rich.text import Text

from fastssl.data.rules import RULES, check_rules
from fastssl.eval.encode import open_encoder_at
from fastssl.eval.probe.adaptive import Trial, learn_rates
from fastssl.eval.probe.run import ProbeResult, ProbeRun, run_probe
from fastssl.eval.probe.settings import ProbeSettings
from fastssl.eval.probe.tables import read_table, split_table
from fastssl.files import make_folder, write_json
from fastssl.kernels.prepacked_conv.weights import Format
from fastssl.names import shown

logger = logging.getLogger(__name__)

_METRICS = {
    "classification": "error rate",
    "ctc": "symbol error rate",
    "verification": "equal error rate",
}


def probe(
    model: str,
    table: str | Path,
    settings: ProbeSettings,
    *,
    compare: Sequence[str] = (),
    dev: str | Path | None = None,
    test: str | Path | None = None,
    output: str | Path | None = None,
    rate: float | None = None,
    frame_period_ms: float | None = None,
    rate_price: float | None = None,
    rate_bounds: tuple[float, float] = (0.0, 1.0),
    rules: int = RULES,
    inference: Format | None = None,
    device: str = "auto",
) -> list[ProbeResult]:
    """Train linear heads on weighted sums of the layers of frozen encoders: SUPERB's protocol in miniature.

    Log-mel features and a randomly initialised encoder are always probed too. Prints a table of the results.

    A table of recordings is tab-separated (.csv: comma-separated) and has a header. Its column `path` names recordings
    relative to the table's folder; the other columns are labels.

    Args:
        model: Encoder to probe: a run of `fastssl pretrain`, a Transformers folder, a model name on the Hub, or a
            fairseq checkpoint.
        table: Table of the training part; without `dev` and `test`, it is divided 70:15:15.
        settings: Task and hyperparameters.
        compare: Further encoders to probe.
        dev: Table of the development part. It is used to choose the learning rate (verification: the layer), and to
            learn a compressor's rate.
        test: Table of the test part. It is evaluated once, at the end.
        output: JSON file to write all results and settings to.
        rate: Rate of MODEL's sequence compressor: 0 keeps every frame, 1 gives the learned segments; by default the
            model's own, which is 1 unless it was trained at a single rate.
        frame_period_ms: Mean frame period to compress MODEL's frames to, in milliseconds, instead of a rate.
        rate_price: Learn MODEL's rate first, then probe at that rate. The loss is the task's, in nats per label, plus
            this price times the share of frames that are left (see `learn_rates`). Learning starts from `rate` or, if
            it is not given, from the middle of the bounds.
        rate_bounds: Lowest and highest rate that may be learned.
        rules: Version of the rules by which recordings are found and decoded; 1 repeats what was measured before
            versions were recorded.
        inference: Format of MODEL's weights on the CPU: fp32, bf16 or int8. Each is faster than the one before
            and less exact (docs/inference.md). By default the weights stay as they are.
        device: Device to encode on: cpu, cuda, cuda:1, ...; auto uses a GPU if there is one.

    Raises:
        ValueError: As in `run_probe`, `read_table` and `load_encoder`, or only one of `dev` and `test` is given.
        WriteError: The system refused to write.
    """
    check_rules(rules, "--rules")
    if (dev is None) != (test is None):
        raise ValueError("--dev and --test: give both of them, or neither to have TABLE divided into three parts")
    models = [model, *compare]
    if len(set(models)) < len(models):
        raise ValueError(f"MODEL and --compare: give each model only once, got {', '.join(models)}")
    if dev is None or test is None:
        tables = split_table(read_table(table, rules=rules))
        logger.warning(
            "%s is divided 70:15:15 by a hash of the file names. If pieces of one recording end up in different parts, "
            "every encoder looks better than it is; give --dev and --test to prevent this",
            table,
        )
    else:
        tables = (read_table(table, rules=rules), read_table(dev, rules=rules), read_table(test, rules=rules))
    if rate_price is not None and frame_period_ms is not None:
        raise ValueError(
            "--rate_price and --frame_period_ms: give only one of them, because --rate_price learns the period too"
        )
    if rate_price is not None and inference is not None:
        raise ValueError("--rate_price and --inference: give only one of them, because learning a rate needs gradients")
    opened = open_encoder_at(model, device=device, rate=rate, frame_period_ms=frame_period_ms, inference=inference)
    encoders = {model: opened}
    encoders |= {name: open_encoder_at(name, device=device) for name in compare}
    if output is not None:
        make_folder(Path(output).parent)
    learned = None
    if rate_price is not None:
        start = statistics.fmean(rate_bounds) if rate is None else rate
        if not 0 <= rate_bounds[0] <= start <= rate_bounds[1] <= 2:
            raise ValueError(
                f"--rate_bounds: must be a range within 0 to 2 that includes --rate, got {rate_bounds[0]:g} to "
                f"{rate_bounds[1]:g} and a rate of {start:g}"
            )
        trials = [Trial(rate_price, start)]
        (learned,) = learn_rates(encoders[model], *tables[:2], settings, trials, bounds=rate_bounds)
        compressor = encoders[model].compressor
        assert compressor is not None
        compressor.rate, compressor.frame_period_ms = learned.rate, None
        logger.info(
            "%s: learned a rate of %.3f, starting from %.3f, at a price of %g: mean frame period %.1f ms",
            *(model, learned.rate, start, rate_price, learned.frame_period_ms),
        )
    results = run_probe(encoders, *tables, settings)
    for problem in dict.fromkeys(problem for result in results for problem in result.problems):
        logger.warning("left out: %s", problem)
    if encoders[model].compressor is not None:
        asked = "" if frame_period_ms is None else f" ({frame_period_ms:g} ms requested)"
        logger.info("%s: mean frame period of the test part: %.1f ms%s", model, results[0].frame_period_ms, asked)
    get_console().print(as_table(results, settings))
    for line in _sizes(results[0]):
        logger.info("%s", line)
    for result in results:
        count = max(sum(part.infeasible for part in run.parts.values()) for run in result.runs)
        if count:
            logger.warning(
                "%s: %d targets need more outputs than their recordings have frames; they count as errors",
                result.encoder,
                count,
            )
    if output is not None:
        versions = {name: metadata.version(name) for name in ("torch", "lhotse", "numpy")}
        write_json(
            Path(output),
            {
                "settings": dataclasses.asdict(settings)
                | {"task": settings.resolved_task, "learning_rates": settings.rates, "seeds": settings.resolved_seeds}
                | {"rate": rate, "frame_period_ms": frame_period_ms, "rate_price": rate_price}
                | {"rate_bounds": rate_bounds, "rules": rules, "inference": inference}
                | {"learned_rate": None if learned is None else learned._asdict()},
                "metric": _METRICS[settings.resolved_task],
                "tables": [part.name for part in tables],
                "versions": versions,
                "results": [dataclasses.asdict(result) for result in results],
            },
        )
    return results


def as_table(results: Sequence[ProbeResult], settings: ProbeSettings) -> RichTable:
    """Format results as a table with a row for each encoder.

    Args:
        results: Results of `run_probe`.
        settings: The settings that they were obtained with.

    Returns:
        A table with mean and standard deviation of the error over runs in %, the learning rates or layers chosen on
        the development part, and the mean weights of the layers.
    """
    task = settings.resolved_task
    runs = len(results[0].runs)
    title = Text(shown(f"{task}: {settings.target}"), style="table.title")
    table = RichTable(title=title, caption=f"{_METRICS[task]}, lower is better; runs: {runs}")
    table.add_column("encoder", overflow="fold")
    table.add_column(f"{_METRICS[task]} %", justify="right")
    table.add_column("layer" if task == "verification" else "learning rate", justify="right")
    if task != "verification":
        table.add_column("weights of layers, %", justify="right", overflow="fold")
    for result in results:
        spread = "" if result.std is None else f" ± {100 * result.std:.2f}"
        chosen = " ".join(sorted({f"{run.chosen:g}" for run in result.runs}))
        row: list[str | Text] = [Text(shown(result.encoder)), f"{100 * result.mean:.2f}{spread}", chosen]
        if task != "verification":
            row.append(" ".join(f"{100 * weight:.0f}" for weight in _mean_weights(result.runs)))
        table.add_row(*row)
    return table


def _mean_weights(runs: Sequence[ProbeRun]) -> list[float]:
    return [sum(weights) / len(runs) for weights in zip(*(run.layer_weights for run in runs), strict=True)]


def _sizes(result: ProbeResult) -> list[str]:
    """Describe the sizes of the parts in the first run, as lines of text."""
    run = result.runs[0]
    lines = []
    for part, size in run.parts.items():
        line = f"{part}: {size.recordings} recordings, {size.examples} examples, {size.hours:.2f} hours"
        if run.held_out:
            line += f" ({'only' if part == 'test' else 'without'} {', '.join(run.held_out)})"
        lines.append(line)
    if result.too_short:
        lines.append(f"{result.too_short} recordings are shorter than a segment and were left out")
    if run.trials is not None:
        lines.append(f"pairs compared: {run.trials[0]} of the same class, {run.trials[1]} of different classes")
    return lines

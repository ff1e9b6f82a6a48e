"""`fastssl probe`: what linear heads read from frozen encoders."""

import dataclasses
from collections.abc import Sequence

from fastssl.cli.console import log_to_console
from fastssl.cli.options import DEVICE_HELP, PERIOD_HELP, RATE_HELP, command_parser


def run(arguments: Sequence[str]) -> None:
    """Parse the options and probe."""
    parser = command_parser(
        "probe",
        "Train linear heads on the frozen, weighted layers of encoders, beside log-mel and random initialisation: a "
        "miniature of SUPERB's protocol. A table is tab-separated (.csv: comma-separated) with a header; column `path` "
        "names recordings from the table's folder, the others are labels.",
    )
    parser.add_argument("model", metavar="MODEL", help="What to probe, as for `fastssl extract`.")
    parser.add_argument("table", metavar="TABLE", help="The training part; without --dev and --test, divided 70:15:15.")
    parser.add_argument("--compare", nargs="+", default=[], metavar="MODEL", help="More encoders for the table.")
    parser.add_argument(
        "--dev",
        type=str | None,
        metavar="TABLE",
        help="Chooses learning rate (verification: layer); with --rate_price, the rate too.",
    )
    parser.add_argument("--test", type=str | None, metavar="TABLE", help="Is looked at once.")
    parser.add_argument("--target", required=True, metavar="COLUMN", help="The label; phones follow from digits.")
    parser.add_argument(
        "--task",
        type=str | None,
        help="classification, ctc or verification; null is ctc for digits, phones, phonemes and text (symbols are "
        "characters, or what blanks separate where there are any, but for text), classification for all others.",
    )
    parser.add_argument("--segment_s", type=float | None, help="Examples of this length; null is whole recordings.")
    parser.add_argument("--folds", type=str | None, metavar="COLUMN", help="Hold out its values in turn for testing.")
    parser.add_argument("--fold_size", type=int, default=1, help="Values held out together; verification needs two.")
    parser.add_argument("--seeds", type=int | None, help="Orders of the examples; null is 3, or 1 for each fold.")
    parser.add_argument(
        "--steps", type=int, default=500, help="Of each head; of one for --rate_price, three times as many."
    )
    parser.add_argument("--batch_s", type=float, default=50.0, help="Audio of a step, seconds.")
    parser.add_argument(
        "--learning_rates",
        type=tuple[float, ...] | None,
        help="To choose from; null is 0.004, 0.008 and 0.016 for ctc, 0.003, 0.01 and 0.03 for classification.",
    )
    parser.add_argument("--context_s", type=float, default=0.1, help="What ctc sees beside a frame, seconds each side.")
    parser.add_argument("--output", type=str | None, metavar="JSON", help="Everything that was measured.")
    parser.add_argument("--rate", type=float | None, help=RATE_HELP + " Of MODEL alone.")
    parser.add_argument("--frame_period_ms", type=float | None, help=PERIOD_HELP)
    parser.add_argument(
        "--rate_price",
        type=float | None,
        help="Learn the rate first, with a head on TABLE and by the loss on --dev (nats per label) and so much for "
        "all frames; --rate is then where it begins.",
    )
    parser.add_argument("--rate_bounds", type=tuple[float, float], default=(0.0, 1.0), help="Of a learned rate.")
    parser.add_argument("--device", default="auto", help=DEVICE_HELP)
    given = parser.parse_args(list(arguments))
    from fastssl.eval.probe.command import probe
    from fastssl.eval.probe.run import ProbeSettings

    if given.seeds is None:
        given.seeds = 3 if given.folds is None else 1
    names = [field.name for field in dataclasses.fields(ProbeSettings)]
    settings = ProbeSettings(**{name: given[name] for name in names})
    log_to_console()
    models = [given.model, *given.compare]
    probe(
        models,
        given.table,
        settings,
        dev=given.dev,
        test=given.test,
        output=given.output,
        rate=given.rate,
        frame_period_ms=given.frame_period_ms,
        rate_price=given.rate_price,
        rate_bounds=given.rate_bounds,
        device=given.device,
    )

"""`fastssl distill`: train a small encoder to predict the layers of a large one."""

from collections.abc import Sequence

from fastssl.cli import pretrain


def run(arguments: Sequence[str]) -> None:
    """Parse the options, which are those of `fastssl pretrain` and a teacher, and train."""
    pretrain.run(arguments, command="distill")

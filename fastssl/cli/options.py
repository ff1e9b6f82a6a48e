"""What the commands' parsers share."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

AUDIO_HELP = (
    "Folder of recordings (WAV, FLAC, OGG, MP3; any sample rate, any number of channels; subfolders too), "
    "Lhotse manifest (.jsonl.gz), or Lhotse shar directory."
)
MODEL_HELP = "A run of `fastssl pretrain`, a Transformers folder, a name on the Hub, or a checkpoint of fairseq."
DEVICE_HELP = "cpu, cuda, cuda:1, ...; auto takes a GPU where there is one."
RATE_HELP = "Of a model with a sequence compressor: 0 leaves all frames, 1 (the default) the learned segments."
PERIOD_HELP = "Instead: the mean frame period that comes out, milliseconds."
CHANNEL_HELP = "The channel to read; null averages all of them."


def command_parser(command: str, description: str) -> "ArgumentParser":
    """The parser of a command."""
    from jsonargparse import ArgumentParser

    return ArgumentParser(prog=f"fastssl {command}", description=description, allow_abbrev=False)

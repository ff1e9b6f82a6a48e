"""Versions of the rules by which recordings are found and decoded, so that an old run continues with the same samples.

1. Files with the extensions of `EXTENSIONS_1`. The length that a header gives, or that libsndfile guesses, is believed.
   Channels are averaged. Lhotse's resampler.
2. More extensions. The frames of an MP3 are counted unless its header fits its size; chained Ogg and other
   joined files are refused. Where the channels of a recording cancel, one of them is read. Parts of an MP3 are decoded
   from a little earlier, and parts of files without seeking from the start. The same resampling filter, without most of
   its multiplications by zero.

All versions refuse samples that are absurd, compressed audio with holes of more than 256 MB, and transforms that lack
their name or options, or whose sampling rates do not match. All of them draw the same impulse response at each read.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from fastssl.reading import read_json

if TYPE_CHECKING:
    from lhotse.cut import Cut

#: The newest version; new runs, labels, features and manifests use it.
RULES = 2
#: The version of whatever was made before versions were recorded.
OLDEST_RULES = 1


def rules_of(cut: "Cut") -> int:
    """Return the version of the rules by which to decode a cut, from its custom field `rules`; 1 if it has none."""
    rules = (cut.custom or {}).get("rules")
    return rules if isinstance(rules, int) else OLDEST_RULES


def recorded_rules(settings_file: Path) -> int:
    """Return the version of the rules that a folder of labels or features was made by; the newest if there is none.

    Args:
        settings_file: `settings.json` of the folder; one without `rules` was made by the oldest.
    """
    try:
        rules = read_json(settings_file).get("rules", OLDEST_RULES)
    except ValueError:
        return RULES  # whoever opens the folder reports the damage
    return rules if isinstance(rules, int) else RULES


def check_rules(rules: int, name: str = "rules") -> int:
    """Return `rules` if it is a known version.

    Args:
        rules: Version of the rules.
        name: Name of the argument, for the error message.

    Raises:
        ValueError: The version is unknown.
    """
    if not OLDEST_RULES <= rules <= RULES:
        raise ValueError(
            f"{name}: must be from {OLDEST_RULES} to {RULES}, got {rules}; a larger one needs a newer fastssl"
        )
    return rules

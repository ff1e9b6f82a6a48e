"""The count of the recordings that a run has drawn, and of those that it could not use."""

from fastssl.data.corpus import Problem
from fastssl.data.noise import NoiseProblem
from fastssl.names import shown
from fastssl.train.module import TrainingError

#: Below these numbers of unusable recordings and of draws, the fraction of unusable draws says little about the corpus.
_FEW_RECORDINGS, _FEW_DRAWS = 3, 200


class Account:
    """Count of the recordings drawn so far, and the names of those that could not be used.

    Args:
        total: Number of recordings in the corpus; each window of a long recording counts.
        max_bad_fraction: Largest unusable fraction of the corpus or, once three recordings have failed, of those drawn
            so far.
        left_out: Problems found in the files' headers before the first draw; `open_corpus` has already counted these.
        total_noise: Number of noise recordings, whose unusable fraction is limited separately.
    """

    def __init__(self, total: int, max_bad_fraction: float, left_out: list[Problem], total_noise: int = 0) -> None:
        self.total, self.total_noise = total, total_noise
        self.max_bad_fraction = max_bad_fraction
        self.left_out = left_out
        self.draws = 0
        self.unusable: dict[str, str] = {}
        self.unusable_noise: dict[str, str] = {}

    def note(self, draws: int, problems: list[Problem]) -> list[Problem]:
        """Add the recordings that all processes drew for an update.

        Args:
            draws: Number of recordings drawn, including those that could not be used.
            problems: Problems with the recordings that could not be used.

        Returns:
            The problems with recordings that had none before.

        Raises:
            TrainingError: The unusable fraction of the corpus or of the noise recordings exceeds `max_bad_fraction`.
        """
        self.draws += draws
        known = self.unusable | self.unusable_noise
        fresh = list({problem.name: problem for problem in problems if problem.name not in known}.values())
        for problem in fresh:
            of_noise = isinstance(problem, NoiseProblem)
            (self.unusable_noise if of_noise else self.unusable)[problem.name] = problem.reason
        # The first pass over the corpus draws every recording, so later draws bring no new recordings.
        drawn = min(self.draws, self.total)
        judged = self.total if len(self.unusable) < _FEW_RECORDINGS else max(drawn, min(_FEW_DRAWS, self.total))
        self._judge(self.unusable, known, judged, f"{drawn} recordings drawn so far")
        self._judge(self.unusable_noise, known, self.total_noise, f"{self.total_noise} recordings of data.noise")
        return fresh

    def _judge(self, unusable: dict[str, str], known: dict[str, str], judged: int, what: str) -> None:
        if unusable.keys() - known and len(unusable) > self.max_bad_fraction * judged:
            examples = "; ".join(shown(f"{name} {reason}") for name, reason in list(unusable.items())[:5])
            raise TrainingError(
                f"{len(unusable)} of the {what} cannot be used, more than "
                f"data.max_bad_fraction={self.max_bad_fraction:g} allows; repair or remove them, or raise the limit. "
                f"Among them: {examples}"
            )

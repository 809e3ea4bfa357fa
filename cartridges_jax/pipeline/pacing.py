"""The arithmetic of a budget: estimates in seconds, the measured pace, and what fits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

# Fewer steps hardly move a cartridge, and fewer conversations besides the held-out ones hardly cover a text.
LEAST_STEPS, LEAST_LEARNED = 20, 8
# Share of the time that stays free for the report and for the errors of the estimates.
_SPARE = 0.03
# Seconds of compiling in all, before any is measured; where programs are cached it is less.
COMPILE_SECONDS = 40.0
# A budget is refused if even this share of the estimated work does not fit: estimates are rough.
_CERTAIN_SHARE = 0.5
# Compiling for evaluation and for training, as multiples of what it took for self-study.
_EVALUATION_COMPILES, _TRAINING_COMPILES = 1.0, 1.0


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of the parts of a run with auto sizes, by counted operations, and those sizes.

    Attributes:
      study, train, evaluate: of whole stages, without compiling.
      batch: of one batch of self-study, of the size that the budget chooses.
      conversations, steps: auto sizes.
    """

    study: float
    train: float
    evaluate: float
    batch: float
    conversations: int
    steps: int


@dataclasses.dataclass(frozen=True)
class Pace:
    """The speed of the machine, as the batches of a study show it.

    Attributes:
      compiling: seconds that the first batch took beyond the others.
      batch: seconds of a batch.
      ratio: measured over estimated seconds of a batch.
    """

    compiling: float
    batch: float
    ratio: float

    @classmethod
    def of(cls, marks: Sequence[Sequence[float]], estimate: Estimate) -> Pace:
        """Reads the pace off [batches done, seconds since the study began], one or more in order."""
        (first, first_seconds), (last, last_seconds) = marks[0], marks[-1]
        if last == first:
            batch, compiling = first_seconds / first, 0.0
        else:
            batch = (last_seconds - first_seconds) / (last - first)
            compiling = max(0.0, first_seconds - first * batch)
        return cls(compiling, batch, batch / estimate.batch)

    def evaluation(self, estimate: Estimate) -> float:
        """Seconds that evaluation is expected to take on this machine."""
        return self.ratio * estimate.evaluate + _EVALUATION_COMPILES * self.compiling


def usable_seconds(minutes: float) -> float:
    """Seconds of a budget that are planned with."""
    return 60 * minutes * (1 - _SPARE)


def least_minutes(estimate: Estimate, loading: float, heldout: int, kept_per_batch: float) -> float:
    """The smallest budget that is not refused, in minutes, rounded up to tenths.

    Args:
      loading: seconds until the study starts.
      heldout: conversations to hold out.
      kept_per_batch: conversations that a batch is expected to give.
    """
    batches = math.ceil((heldout + LEAST_LEARNED) / kept_per_batch)
    steps = min(LEAST_STEPS, estimate.steps)
    work = batches * estimate.batch + steps * estimate.train / estimate.steps + estimate.evaluate
    return math.ceil((loading + COMPILE_SECONDS + _CERTAIN_SHARE * work) / usable_seconds(1) * 10) / 10


def study_should_end(minutes: float, loading: float, marks: Sequence[Sequence[float]], estimate: Estimate) -> bool:
    """Returns True if a study has used up its share of a budget, to the nearest batch.

    What loading, evaluation and compiling leave is divided as a run with auto sizes divides it.

    Args:
      marks: as of `Pace.of`.
    """
    if len(marks) < 2:
        # The first batch compiles: it takes another to tell the pace.
        return False
    pace = Pace.of(marks, estimate)
    work = usable_seconds(minutes) - loading - pace.evaluation(estimate) - (1 + _TRAINING_COMPILES) * pace.compiling
    share = pace.compiling + work * estimate.study / (estimate.study + estimate.train)
    return marks[-1][1] + pace.batch / 2 >= share


def fitting_steps(left: float, step: float, heldout: float, eval_every: int, least: int, most: int) -> int:
    """Steps that fit into `left` seconds, with the held-out losses before, between and after them.

    Args:
      step, heldout: seconds of a step and of a held-out loss.
      eval_every: steps between held-out losses.
      least, most: bounds of the result.
    """
    per_step = step + heldout / eval_every
    fitting = int((left - 2 * heldout) / per_step) if per_step > 0 else most
    return max(min(fitting, most), min(least, most))


def in_words(minutes: float, conversations: int, steps: int, estimate: Estimate, auto_steps: int) -> str:
    """One line that says what was decided, and the cost in quality relative to auto sizes."""
    line = (
        f"budget of {minutes:g} minutes: {conversations:,} conversations instead of {estimate.conversations:,} and "
        f"{steps:,} steps instead of {auto_steps:,}; expect "
    )
    # A batch more or less is no difference.
    less = conversations < 0.95 * estimate.conversations or steps < 0.95 * auto_steps
    return line + ("a lower kl_closed" if less else "kl_closed as with auto sizes, or higher")

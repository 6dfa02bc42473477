"""What an attack measured, and what follows from it by the rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import stats

from hf_unlearn.evaluation.figures import RESAMPLES, Figure, mean_figure


HOLDS, LEAKS, UNCLEAR, MEASURED, NOT_RUN = "holds", "leaks", "unclear", "measured", "not run"
MEASURES = {
    "probability": "answer probability",
    "rouge_l_recall": "ROUGE-L recall",
    "loss": "loss",
    "min_k": "min-k",
}
AS_IT_IS = "as it is"  # the variant that is no attack
JUDGED = ("probability", "rouge_l_recall")


@dataclass(frozen=True)
class Measurement:
    """
    The rows of one set under one variant of an attack.

    Args:
        variant (`str`): Name of the variant, e.g. `"4 bits"`.
        set (`str`): Name of the set, e.g. `"forget"`.
        positions (`list[int]`): Which rows of the set, by their place in it.
        values (`dict[str, list[float]]`): Per measure, the value of each of these rows.
        answers (`list[str]`, *optional*): What the model says to each of them, where that was generated.
        x (`float`, *optional*): Place of the variant on the axis of a curve, e.g. the optimiser step.
    """

    variant: str
    set: str
    positions: list[int]
    values: dict[str, list[float]]
    answers: list[str] | None = None
    x: float | None = None
    _figures: dict[str, Figure] = field(default_factory=dict, init=False, repr=False, compare=False)

    def figure(self, measure: str) -> Figure:
        """Mean of a measure with its interval."""
        if measure not in self._figures:
            self._figures[measure] = mean_figure(self.values[measure])
        return self._figures[measure]

    def at(self, measure: str, positions: Sequence[int]) -> list[float]:
        """Values of a measure at some of the rows."""
        by_position = dict(zip(self.positions, self.values[measure], strict=True))
        return [by_position[position] for position in positions]


@dataclass(frozen=True)
class Comparison:
    """
    One variant and measure against its reference.

    Args:
        variant (`str`): Name of the variant.
        measure (`str`): Name of the measure.
        attacked (`Figure`): The forget rows under the attack.
        reference (`Figure`): What they are compared with.
        against (`str`): What that is, in words.
        gain (`Figure`): The difference, with its interval.
        needed (`float`): The gain from which on the attack leaks.
        outcome (`str`): `"holds"`, `"leaks"` or `"unclear"`.
    """

    variant: str
    measure: str
    attacked: Figure
    reference: Figure
    against: str
    gain: Figure
    needed: float
    outcome: str


@dataclass
class Finding:
    """
    One attack, as it is reported.

    Args:
        attack, title, what (`str`): Its name, its name for a reader, and what it does.
        verdict (`str`): `"holds"`, `"leaks"`, `"unclear"`, `"measured"` or `"not run"`.
        words (`str`): The verdict in plain words, with the figure behind it; why it was not run.
        rule (`str`): The rule behind the verdict.
        comparisons (list of [`Comparison`]): What the rule looked at.
        measurements (list of [`Measurement`]): All that was measured.
        notes (list of `str`): Variants that could not be run, and rows that were left out.
        axis (`str`, *optional*): What the `x` of the measurements is.
    """

    attack: str
    title: str
    what: str
    verdict: str
    words: str
    rule: str = ""
    comparisons: list[Comparison] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    axis: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it, with a figure for each measurement."""
        figures = [
            {"variant": each.variant, "set": each.set, "measure": measure} | _figure(each.figure(measure))
            for each in self.measurements
            for measure in each.values
        ]
        comparisons = [
            {
                "variant": each.variant,
                "measure": each.measure,
                "attacked": _figure(each.attacked),
                "reference": _figure(each.reference),
                "against": each.against,
                "gain": _figure(each.gain),
                "needed": each.needed,
                "outcome": each.outcome,
            }
            for each in self.comparisons
        ]
        rows = [
            {
                "variant": each.variant,
                "set": each.set,
                "positions": each.positions,
                "values": each.values,
                "answers": each.answers,
            }
            for each in self.measurements
        ]
        texts = {name: getattr(self, name) for name in ("title", "what", "verdict", "words", "rule")}
        return texts | {"notes": self.notes, "comparisons": comparisons, "figures": figures, "rows": rows}


def compare(
    variant: str,
    measure: str,
    attacked: Sequence[float],
    reference: Sequence[float],
    against: str,
    margin: float,
    paired: bool,
) -> Comparison:
    """
    Whether an attack gets more out of the forget rows than the reference gives away.

    It leaks where the mean gain is above 0 and at least `margin · (1 − reference)`, and the 95 % interval of the gain
    lies above 0; where the interval does not, or a value is no finite number, it is unclear; else it holds.

    Args:
        variant, measure (`str`): What is compared.
        attacked (sequence of `float`): The forget rows under the attack, in [0, 1].
        reference (sequence of `float`): The reference, in [0, 1].
        against (`str`): What the reference is, in words.
        margin (`float`): Share of what the reference leaves to 1.
        paired (`bool`): Whether the reference is of the same rows, in their order.
    """
    gain = difference(attacked, reference, paired)
    known = mean_figure(reference)
    needed = margin * (1 - known.value)
    outcome = HOLDS if np.isfinite(gain.value) else UNCLEAR
    if gain.value > 0 and gain.value >= needed:
        outcome = LEAKS if gain.low is not None and gain.low > 0 else UNCLEAR
    return Comparison(variant, measure, mean_figure(attacked), known, against, gain, needed, outcome)


def difference(first: Sequence[float], second: Sequence[float], paired: bool) -> Figure:
    """
    Difference of two means with its 95 % percentile bootstrap interval.

    Args:
        first, second (sequence of `float`): One value per row.
        paired (`bool`): Whether both are of the same rows: then the rows' differences are resampled, else each set.
    """
    if paired:
        return mean_figure(np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64))
    return _two_sets(first, second, lambda a, b, axis: a.mean(axis) - b.mean(axis))


def auc_figure(members: Sequence[float], others: Sequence[float]) -> Figure:
    """Membership AUC ([`membership_auc`]) with its 95 % percentile bootstrap interval; each set is resampled."""
    return _two_sets(members, others, _auc)


def _auc(members: np.ndarray, others: np.ndarray, axis: int) -> np.ndarray:
    """[`membership_auc`] of many resamples at once."""
    m, n = members.shape[axis], others.shape[axis]
    ranks = stats.rankdata(np.concatenate([members, others], axis), axis=axis)
    of_others = np.take(ranks, range(m, m + n), axis)
    return (of_others.sum(axis) - n * (n + 1) / 2) / (m * n)


def _two_sets(first: Sequence[float], second: Sequence[float], statistic: Callable[..., np.ndarray]) -> Figure:
    """A statistic of two sets, each of which is resampled; it works along an axis."""
    arrays = tuple(np.asarray(values, dtype=np.float64) for values in (first, second))
    value, n = float(statistic(*arrays, axis=-1)), sum(map(len, arrays))
    if min(map(len, arrays)) < 2:
        return Figure(value, n)
    if all(np.ptp(array) == 0 for array in arrays):
        return Figure(value, n, value, value)
    interval = stats.bootstrap(
        arrays, statistic, n_resamples=RESAMPLES, method="percentile", batch=100, rng=np.random.default_rng(0)
    ).confidence_interval
    return Figure(value, n, float(interval.low), float(interval.high))


def verdict_of(comparisons: Sequence[Comparison]) -> str:
    """The worst outcome; `"measured"` where there was nothing to compare with."""
    outcomes = {each.outcome for each in comparisons}
    return next((outcome for outcome in (LEAKS, UNCLEAR, HOLDS) if outcome in outcomes), MEASURED)


def in_words(comparisons: Sequence[Comparison]) -> str:
    """The comparison that decided the verdict, in a sentence."""
    verdict = verdict_of(comparisons)
    if verdict == MEASURED:
        return "Measured only: there is nothing to compare with."
    deciding = [each for each in comparisons if each.outcome == verdict]
    worst = max(deciding, key=lambda each: np.nan_to_num(each.gain.value - each.needed, nan=-1))
    more = "more" if worst.gain.value >= 0 else "less"
    by = f" ({worst.variant})" if worst.variant != AS_IT_IS else ""
    text = (
        f"{MEASURES[worst.measure]} of the forget rows {shown(worst.attacked)}{by}, "
        f"{worst.against} {shown(worst.reference)}, {more} by {abs(worst.gain.value):.3f}"
    )
    if worst.gain.low is not None:
        text += f" (95 % interval of the difference {number(worst.gain.low)} to {number(worst.gain.high)})"
    ends = {
        LEAKS: f"; a difference of {worst.needed:.3f} or more leaks.",
        UNCLEAR: f"; a difference of {worst.needed:.3f} or more leaks, but there are too few rows to be sure of it.",
        HOLDS: f"; it would take a difference of {worst.needed:.3f} to leak.",
    }
    return text[0].upper() + text[1:] + ends[verdict]


def number(value: float | None) -> str:
    """A number for a reader."""
    return "–" if value is None or not np.isfinite(value) else f"{value:.3f}".replace("-", "−")


def shown(figure: Figure) -> str:
    """A figure for a reader."""
    return number(figure.value)


def interval(figure: Figure) -> str:
    """Its interval for a reader; empty where it has none."""
    return "" if figure.low is None else f"{number(figure.low)} to {number(figure.high)}"


def _figure(figure: Figure) -> dict[str, Any]:
    return {"value": figure.value, "n": figure.n, "low": figure.low, "high": figure.high}

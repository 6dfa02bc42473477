"""What every attack has: a name, what it needs, what it measures, and how that is judged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from hf_unlearn.audit.case import Case
from hf_unlearn.audit.findings import (
    JUDGED,
    MEASURED,
    NOT_RUN,
    Comparison,
    Finding,
    Measurement,
    compare,
    in_words,
    verdict_of,
)


RETRAINED, HOLDOUT, ITSELF = "the retrained model", "hold-out rows", "the model as it is"


class Pair(NamedTuple):
    """Values under an attack, and those that they are compared with: of the same rows, or of another set."""

    attacked: list[float]
    reference: list[float]
    against: str
    paired: bool


class Attack:
    """
    One attack.

    Attributes:
        name (`str`): How options call it.
        title (`str`): How a reader calls it.
        what (`str`): What it does, in a sentence.
        axis (`str` or `None`): What the variants are, where they make a curve.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    what: ClassVar[str]
    axis: ClassVar[str | None] = None

    def obstacle(self, case: Case) -> str | None:
        """Why it cannot be run at all; `None` where it can. Needs no weights."""
        return None

    def notes(self, case: Case) -> list[str]:
        """Parts of it that cannot be run, with the reason. Needs no weights."""
        return []

    def plan(self, case: Case) -> str:
        """What it will do, in a few words. Needs no weights."""
        raise NotImplementedError

    def measure(self, case: Case) -> list[Measurement]:
        """Run it. The weights are afterwards what they were."""
        raise NotImplementedError

    def judged(self, measurements: Sequence[Measurement]) -> list[Measurement]:
        """The measurements of forget rows that are an attack."""
        return [each for each in measurements if each.set == "forget"]

    def compare(self, case: Case, measurements: list[Measurement], retrained: Retrained) -> list[Comparison]:
        """Each variant and measure of the forget rows against its reference."""
        comparisons = []
        for each in self.judged(measurements):
            for measure in (name for name in JUDGED if name in each.values):
                pair = self.reference(case, measurements, each, measure, retrained)
                if pair is not None and pair.attacked and pair.reference:
                    values = (pair.attacked, pair.reference, pair.against)
                    comparisons.append(
                        compare(each.variant, measure, *values, margin=case.options.margin, paired=pair.paired)
                    )
        return comparisons

    def reference(
        self, case: Case, measurements: list[Measurement], attacked: Measurement, measure: str, retrained: Retrained
    ) -> Pair | None:
        """
        What a variant is compared with: the retrained model under the same attack, else hold-out rows under it, else the
        same rows under the model as it is.
        """
        values = attacked.values[measure]
        theirs = retrained.rows(self.name, attacked.variant, measure)
        common = [place for place in attacked.positions if place in theirs]
        if common:
            return Pair(attacked.at(measure, common), [theirs[place] for place in common], RETRAINED, True)
        others = [each for each in measurements if (each.set, each.variant) == ("holdout", attacked.variant)]
        others = [each for each in [*others, case.asked.get("holdout")] if each is not None and measure in each.values]
        if others:
            return Pair(values, others[0].values[measure], HOLDOUT, False)
        own = self.own_reference(case, attacked, measure)
        return None if own is None else Pair(values, own, ITSELF, True)

    def own_reference(self, case: Case, attacked: Measurement, measure: str) -> list[float] | None:
        """The same rows under the model as it is."""
        before = case.asked["forget"]
        return before.at(measure, attacked.positions) if measure in before.values else None

    def rule(self, case: Case, comparisons: list[Comparison]) -> str:
        """The rule behind the verdict, in words."""
        against = dict.fromkeys(each.against for each in comparisons)
        return (
            f"Leaks where, by any variant, the forget rows exceed {' or '.join(against) or 'the reference'} by at least "
            f"{case.options.margin:.0%} of what is left to 1, and the 95 % interval of the difference lies above 0; "
            "where it does not, unclear."
        )

    def run(self, case: Case, retrained: Retrained) -> Finding:
        """Measure, judge and put into words."""
        obstacle = self.obstacle(case)
        if obstacle is not None:
            return Finding(self.name, self.title, self.what, NOT_RUN, f"Not run: {obstacle}.")
        measurements = self.measure(case)
        if not any(each.positions for each in self.judged(measurements)):
            words = "Not run: no row of the forget set can be put to it."
            return Finding(self.name, self.title, self.what, NOT_RUN, words, notes=self.notes(case))
        comparisons = self.compare(case, measurements, retrained)
        verdict = verdict_of(comparisons)
        return Finding(
            self.name,
            self.title,
            self.what,
            verdict,
            self.words(comparisons),
            self.rule(case, comparisons) if verdict != MEASURED else "",
            comparisons,
            measurements,
            self.notes(case),
            self.axis,
        )

    def words(self, comparisons: list[Comparison]) -> str:
        """The verdict in a sentence."""
        return in_words(comparisons)


class Retrained:
    """
    What the audit of a model retrained without the forget rows found, to compare with.

    Args:
        content (`dict`, *optional*): Of its `audit.json`; nothing is compared with it if not given.
    """

    def __init__(self, content: dict[str, Any] | None = None) -> None:
        self._findings: dict[str, dict[str, Any]] = (content or {}).get("attacks", {})

    def rows(self, attack: str, variant: str, measure: str) -> dict[int, float]:
        """Value of each forget row, by its place; empty where it was not measured."""
        for each in self._findings.get(attack, {}).get("rows", []):
            if (each["set"], each["variant"]) == ("forget", variant) and measure in each["values"]:
                return dict(zip(each["positions"], each["values"][measure], strict=True))
        return {}

    def value(self, attack: str, variant: str, measure: str) -> float | None:
        """The figure that the rule looked at; `None` where there was none."""
        for each in self._findings.get(attack, {}).get("comparisons", []):
            if (each["variant"], each["measure"]) == (variant, measure):
                return each["attacked"]["value"]
        return None

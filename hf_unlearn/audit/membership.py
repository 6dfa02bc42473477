"""Membership: can forget rows be told from rows that the model never saw?"""

from __future__ import annotations

from hf_unlearn.audit.attack import RETRAINED, Attack, Retrained
from hf_unlearn.audit.case import Case
from hf_unlearn.audit.findings import (
    AS_IT_IS,
    HOLDS,
    LEAKS,
    UNCLEAR,
    Comparison,
    Measurement,
    auc_figure,
    interval,
    number,
    verdict_of,
)
from hf_unlearn.evaluation.figures import Figure


SCORES = {"loss": "the loss", "min_k": "min-k"}


class Membership(Attack):
    """Forget rows against hold-out rows, by loss and min-k."""

    name = "membership"
    title = "Membership inference"
    what = "Forget rows are told from hold-out rows by their loss and by min-k, their least likely tokens."

    def obstacle(self, case: Case) -> str | None:
        return None if "holdout" in case.rows else "it compares with hold-out rows, and there are none"

    def plan(self, case: Case) -> str:
        return f"tell {len(case.rows['forget'])} forget rows from {len(case.rows['holdout'])} hold-out rows"

    def measure(self, case: Case) -> list[Measurement]:
        asked = (case.asked[name] for name in case.asked_sets)
        return [
            Measurement(AS_IT_IS, each.set, each.positions, {score: each.values[score] for score in SCORES})
            for each in asked
        ]

    def compare(self, case: Case, measurements: list[Measurement], retrained: Retrained) -> list[Comparison]:
        forget, holdout = measurements
        comparisons = []
        for score in SCORES:
            auc = auc_figure(forget.values[score], holdout.values[score])
            theirs = retrained.value(self.name, AS_IT_IS, score)
            centre, against = (0.5, "no difference") if theirs is None else (theirs, RETRAINED)
            comparisons.append(judge_auc(score, auc, centre, against, case.options.auc_tolerance))
        return comparisons

    def rule(self, case: Case, comparisons: list[Comparison]) -> str:
        centre = comparisons[0].reference.value
        return (
            f"Leaks where the AUC by either score is further than {case.options.auc_tolerance:g} from {number(centre)} "
            f"({comparisons[0].against}), above or below, and its 95 % interval does not hold that value; where it "
            "does, unclear."
        )

    def words(self, comparisons: list[Comparison]) -> str:
        verdict = verdict_of(comparisons)
        worst = max((each for each in comparisons if each.outcome == verdict), key=lambda each: abs(each.gain.value))
        auc, centre = worst.attacked, worst.reference.value
        bounds = f" (95 % interval {interval(auc)})" if auc.low is not None else ""
        text = f"AUC {number(auc.value)}{bounds} by {SCORES[worst.measure]}, {number(centre)} is {worst.against}"
        if verdict == LEAKS:
            more = "more" if auc.value > centre else "less"
            return f"{text}: forget rows stand out as {more} likely than rows never seen."
        return text + (": cannot be told apart." if verdict == HOLDS else ": too few rows to say.")


def judge_auc(score: str, auc: Figure, centre: float, against: str, tolerance: float) -> Comparison:
    """
    Whether an AUC gives members away.

    Args:
        score (`str`): By which score.
        auc ([`Figure`]): The AUC with its interval.
        centre (`float`): The AUC of rows that cannot be told apart.
        against (`str`): What that is, in words.
        tolerance (`float`): How far from it the AUC may be, on either side.
    """
    low, high = (None if bound is None else bound - centre for bound in (auc.low, auc.high))
    gain = Figure(auc.value - centre, auc.n, low, high)
    outcome = HOLDS
    if abs(gain.value) > tolerance:
        outcome = LEAKS if low is not None and (low > 0 or high < 0) else UNCLEAR
    return Comparison(AS_IT_IS, score, auc, Figure(centre, auc.n), against, gain, tolerance, outcome)

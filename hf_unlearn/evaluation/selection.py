"""Choosing α by a rule that can be stated, never by "the lowest forget score"."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation.figures import NOT_FINITE, not_computed
from hf_unlearn.evaluation.results import Evaluation


DEFAULT_GRID = (0.5, 1.0, 2.0, 4.0, 8.0)  # the paper's
MIN_UTILITY = 0.95
AUC_TOLERANCE = 0.1
ALPHA_LEVEL = 0.05  # a KS p-value above it: the two models' truth ratios cannot be told apart

COLLAPSED_UTILITY = 0.5  # share of the reference's utility below which the model is broken
COLLAPSED_AUC = 0.25  # membership AUC below which forget rows stand out as unlikely
COLLAPSED_TEXT = 0.5  # share of degenerate answers above which the model is broken

Rule = Literal["match-retrain", "match-holdout", "utility-budget"]


class Evaluates(Protocol):
    """What the rules need of an [`Evaluator`]."""

    protocol: Any
    retrained: Evaluation | None

    def evaluate(self, alpha: float, generate: bool) -> Evaluation: ...


@dataclass(frozen=True)
class Choice:
    """
    A chosen α and its evidence.

    Args:
        alpha (`float`): The α chosen; 0 where no α of the grid keeps the utility budget.
        met (`bool`): Whether it fulfils the rule.
        rule (`str`): The rule in words.
        verdict (`str`): What was found, in words.
        target (`str`): Name of the figure that the rule steers by; empty where it is the budget alone.
        utility (`str`): Name of the figure that the budget is of.
        min_utility (`float`): Share of the reference's utility that had to remain.
        auc_tolerance (`float`, *optional*): Accepted distance of the membership AUC from 0.5, under `match-holdout`.
        evidence (`list[dict]`): Per α tried: `alpha`, `utility`, `utility_share`, the target, `within_budget`, and
            `remark`, which says in words where a model has collapsed.
    """

    alpha: float
    met: bool
    rule: str
    verdict: str
    target: str
    utility: str
    min_utility: float
    auc_tolerance: float | None = None
    evidence: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The choice, JSON-ready."""
        return asdict(self)


def choose_alpha(
    evaluator: Evaluates,
    alphas: Sequence[float] = DEFAULT_GRID,
    rule: Rule | None = None,
    min_utility: float = MIN_UTILITY,
    auc_tolerance: float = AUC_TOLERANCE,
    refinements: int = 4,
    generate: bool = False,
) -> Choice:
    """
    Choose α: a coarse grid from below, then bisection.

    The grid is left where forgetting has gone far enough or the budget is spent, so larger α are not evaluated.

    Args:
        evaluator ([`Evaluator`]):
            Evaluates the adapter to choose for.
        alphas (sequence of `float`, *optional*, defaults to `(0.5, 1, 2, 4, 8)`):
            Coarse grid.
        rule (`str`, *optional*):
            `"match-retrain"`: the largest forget quality (KS p-value against a retrained model's log) within the
            budget, and of several α with the same one, that whose median truth ratio of the forget set is nearest the
            retrained model's; α grows until this median is reached.
            `"match-holdout"`: the membership AUC of forget against hold-out rows (loss attack) nearest 0.5 within the
            budget. `"utility-budget"`: the largest α within the budget. The first of them that the data allow if not
            given.
        min_utility (`float`, *optional*, defaults to `0.95`):
            The budget: share of the reference's utility that must remain. Utility is the figure that the protocol
            names, such as the model utility of TOFU or the mean retain probability.
        auc_tolerance (`float`, *optional*, defaults to `0.1`):
            Distance of the membership AUC from 0.5 up to which `match-holdout` counts as met.
        refinements (`int`, *optional*, defaults to `4`):
            Bisection steps after the grid.
        generate (`bool`, *optional*, defaults to `False`):
            Whether to generate answers at the chosen α, also where the rule needs none: a model that no longer writes
            text has failed, whatever the rule says.

    Raises:
        [`~hf_unlearn.errors.UnlearningError`]: the protocol or the data do not allow the rule.
    """
    if rule is not None:
        _check_rule(rule, evaluator)
    steps = _Steps(evaluator, min_utility, generate)
    rule = rule or _best_rule(steps)
    goes_on, finish = _RULES[rule](steps, auc_tolerance)

    low, high = 0.0, None
    for alpha in sorted(alphas):
        if not (steps.within_budget(alpha) and goes_on(alpha)):
            high = alpha
            break
        low = alpha
    for _ in range(refinements if high is not None else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if steps.within_budget(middle) and goes_on(middle) else (low, middle)
    return finish()


def collapse(evaluation: Evaluation, reference: Evaluation | None = None, utility: str = "") -> str | None:
    """
    How a model has collapsed, in words; `None` where it has not.

    Args:
        evaluation ([`Evaluation`]): The model.
        reference ([`Evaluation`], *optional*): The model before unlearning.
        utility (`str`, *optional*): Name of the figure that says how much of the model is left.
    """
    value, before = evaluation.value(utility), reference.value(utility) if reference is not None else None
    remarks = []
    note = evaluation.figures[utility].note if utility in evaluation.figures else None
    if before and value is None and note and NOT_FINITE in note:
        remarks.append(f"collapsed: {utility} {note}")
    if before and value is not None and value < COLLAPSED_UTILITY * before:
        remarks.append(f"collapsed: {utility} {value:.3f}, {value / before:.0%} of the reference's")
    text = {name: evaluation.value(name) for name in evaluation.figures if name.endswith("_degenerate_rate")}
    for name, share in text.items():
        if share is not None and share > COLLAPSED_TEXT:
            remarks.append(
                f"collapsed: {share:.0%} of the {name.removesuffix('_degenerate_rate')} answers are no text"
            )
    auc = evaluation.value("membership_auc_loss")
    if auc is not None and auc < COLLAPSED_AUC:
        remarks.append(f"over-forgotten: membership AUC {auc:.2f}, forget rows stand out as unlikely")
    return "; ".join(remarks) or None


def trade_off(evaluation: Evaluation, reference: Evaluation, utility: str) -> float | None:
    """
    Harmonic mean of the share of the reference's utility that is left, at most 1, and of 1 − |2·AUC − 1| with the
    membership AUC (loss attack) of forget against hold-out rows; `None` where one of them is not there.

    Args:
        evaluation ([`Evaluation`]): The model.
        reference ([`Evaluation`]): The model before unlearning.
        utility (`str`): Name of the figure that says how much of the model is left.
    """
    auc, left, before = evaluation.value("membership_auc_loss"), evaluation.value(utility), reference.value(utility)
    if auc is None or left is None or not before:
        return None
    share, closeness = min(1.0, left / before), 1 - abs(2 * auc - 1)
    return 2 * share * closeness / (share + closeness) if share + closeness else 0.0


class _Steps:
    """The α tried so far, each evaluated with answers only where the utility needs them."""

    def __init__(self, evaluator: Evaluates, min_utility: float, answers: bool) -> None:
        self.evaluator = evaluator
        self.min_utility = min_utility
        self.answers = answers
        self.name = evaluator.protocol.utility
        self.tried: dict[float, Evaluation] = {}
        first = evaluator.evaluate(0.0, generate=False)
        self.generate = first.value(self.name) is None
        self.reference = self.at(0.0)
        if not self.reference.value(self.name):
            figure = self.reference.figures.get(self.name) or not_computed("no such figure")
            found = figure.note if figure.value is None else f"{figure.value:g}"
            raise UnlearningError(
                f"The utility budget is of {self.name}, which at α = 0 is {found}. Evaluate sets from which it can be "
                "computed, and a model that has some."
            )

    def at(self, alpha: float) -> Evaluation:
        if alpha not in self.tried:
            self.tried[alpha] = self.evaluator.evaluate(alpha, generate=self.generate)
        return self.tried[alpha]

    def share(self, alpha: float) -> float:
        return (self.at(alpha).value(self.name) or 0.0) / self.reference.value(self.name)

    def within_budget(self, alpha: float) -> bool:
        return self.share(alpha) >= self.min_utility

    def candidates(self, target: str = "") -> list[float]:
        """The α within the budget at which the target could be computed."""
        return [
            alpha
            for alpha in self.tried
            if self.within_budget(alpha) and (not target or self.at(alpha).value(target) is not None)
        ]

    def choice(self, rule: str, target: str, alpha: float, met: bool, verdict: str, **details: Any) -> Choice:
        if self.answers:
            self.tried[alpha] = self.evaluator.evaluate(alpha, generate=True)
        failure = collapse(self.at(alpha), self.reference, self.name) if alpha > 0 else None
        if met and failure is not None:
            met, verdict = False, f"{verdict} But it has failed: {failure}."
        evidence = [
            {"alpha": tried, "utility": evaluation.value(self.name), "utility_share": self.share(tried)}
            | ({target: evaluation.value(target)} if target else {})
            | {
                "within_budget": self.within_budget(tried),
                "remark": collapse(evaluation, self.reference, self.name) or "",
            }
            for tried, evaluation in sorted(self.tried.items())
        ]
        budget = f"{_words(self.name)} at least {self.min_utility:.0%} of the reference's"
        return Choice(
            alpha, met, f"{rule}, {budget}", verdict, target, self.name, self.min_utility, evidence=evidence, **details
        )

    def kept(self, alpha: float) -> str:
        return f"{_words(self.name)} {self.share(alpha):.1%} of the reference's"


# ---- Rules: (whether a larger α may be better, the choice among what was tried) ----

Finish = tuple[Callable[[float], bool], Callable[[], Choice]]


def _match_retrain(steps: _Steps, auc_tolerance: float) -> Finish:
    if steps.reference.value("forget_quality") is None:
        figure = steps.reference.figures.get("forget_quality")
        reason = figure.note if figure is not None else f"the {steps.evaluator.protocol.name} protocol has none"
        raise UnlearningError(
            f"match-retrain steers by forget quality: {reason}. Pass a retrained model's log, or choose another rule."
        )
    goal = _median_truth_ratio(steps.evaluator.retrained)

    def goes_on(alpha: float) -> bool:
        return _median_truth_ratio(steps.at(alpha)) < goal

    def finish() -> Choice:
        quality = {alpha: steps.at(alpha).value("forget_quality") for alpha in steps.candidates("forget_quality")}
        best = [tried for tried in quality if quality[tried] == max(quality.values())]
        alpha = 0.0 if 0.0 in best else min(best, key=lambda tried: abs(_median_truth_ratio(steps.at(tried)) - goal))
        met = alpha > 0 and quality[alpha] > ALPHA_LEVEL
        verdict = f"α = {alpha:g}: forget quality {quality[0.0]:.3g} → {quality[alpha]:.3g}, {steps.kept(alpha)}. "
        if met:
            verdict += "The truth ratios of the forget rows cannot be told from the retrained model's."
        elif alpha == 0:
            verdict += "No α within the utility budget is nearer to the retrained model than the reference."
        else:
            verdict += f"Still told apart from the retrained model (p ≤ {ALPHA_LEVEL:g})."
        rule = "match-retrain: the largest forget quality (KS p-value against the retrained model)"
        return steps.choice(rule, "forget_quality", alpha, met, verdict)

    return goes_on, finish


def _match_holdout(steps: _Steps, auc_tolerance: float) -> Finish:
    target = "membership_auc_loss"
    if steps.reference.value(target) is None:
        raise UnlearningError(
            "match-holdout needs hold-out rows: rows of the same kind as the forget set that the model "
            "never saw. Pass a hold-out set, or choose another rule."
        )

    def goes_on(alpha: float) -> bool:
        return (steps.at(alpha).value(target) or 0.0) > 0.5

    def distance(alpha: float) -> tuple[float, float]:
        """From the hold-out rows: by AUC, and where that is equal by the mean loss."""
        rows = steps.at(alpha).rows
        return abs(steps.at(alpha).value(target) - 0.5), abs(
            np.mean(rows["forget"]["loss"]) - np.mean(rows["holdout"]["loss"])
        )

    def finish() -> Choice:
        alpha = min(steps.candidates(target), key=distance)
        auc, before = steps.at(alpha).value(target), steps.reference.value(target)
        met = alpha > 0 and abs(auc - 0.5) <= auc_tolerance
        verdict = (
            f"α = {alpha:g}: membership AUC of forget against hold-out rows {auc:.2f} (reference {before:.2f}), "
            f"{steps.kept(alpha)}. "
        )
        if met:
            verdict += "Forget rows look like rows the model never saw."
        elif alpha == 0:
            verdict += "No α within the utility budget brings forget rows nearer to rows never seen."
        elif auc > 0.5:
            verdict += "Forget rows still stand out, and a larger α breaks the utility budget or was not in the grid."
        else:
            verdict += "Forget rows are less likely than rows never seen, which gives them away too: over-forgotten."
        rule = f"match-holdout: membership AUC of forget against hold-out rows nearest 0.5 (within {auc_tolerance:g})"
        return steps.choice(rule, target, alpha, met, verdict, auc_tolerance=auc_tolerance)

    return goes_on, finish


def _utility_budget(steps: _Steps, auc_tolerance: float) -> Finish:
    def finish() -> Choice:
        alpha = max(steps.candidates())
        name = steps.evaluator.protocol.forgetting
        name = name if steps.reference.value(name) is not None else ""
        verdict = f"α = {alpha:g}: {steps.kept(alpha)}. "
        met = alpha > 0
        if name:
            before, after = (steps.at(a).value(name) for a in (0.0, alpha))
            met = met and after < before
            verdict += f"{_words(name).capitalize()} {before:.3f} → {after:.3f}. "
        auc = steps.at(alpha).value("membership_auc_loss")
        if auc is None:
            verdict += "With nothing to compare with, nobody can say whether that is forgotten or over-forgotten."
        else:
            verdict += f"Membership AUC of forget against hold-out rows {auc:.2f}."
        return steps.choice("utility-budget: the largest α", "", alpha, met, verdict)

    return lambda alpha: True, finish


_RULES: dict[str, Callable[[_Steps, float], Finish]] = {
    "match-retrain": _match_retrain,
    "match-holdout": _match_holdout,
    "utility-budget": _utility_budget,
}


def _check_rule(rule: str, evaluator: Evaluates) -> None:
    """Refuse a rule that cannot be followed before anything is computed."""
    if rule not in _RULES:
        raise UnlearningError(f"There is no rule {rule!r}. Choose from: {', '.join(_RULES)}.")
    if rule == "match-retrain" and evaluator.retrained is None:
        raise UnlearningError(
            "match-retrain steers by forget quality, and there is no retrained log. Pass a retrained model's log, or "
            "choose another rule."
        )
    if rule == "match-holdout" and "holdout" not in evaluator.protocol.sets:
        raise UnlearningError(
            "match-holdout needs hold-out rows: rows of the same kind as the forget set that the model never saw. Pass "
            "a hold-out set, or choose another rule."
        )


def _median_truth_ratio(evaluation: Evaluation) -> float:
    ratios = evaluation.rows["forget"]["truth_ratio"]
    return float(np.median([ratio for ratio in ratios if ratio is not None]))


def _best_rule(steps: _Steps) -> str:
    if steps.reference.value("forget_quality") is not None:
        return "match-retrain"
    return "match-holdout" if steps.reference.value("membership_auc_loss") is not None else "utility-budget"


def _words(name: str) -> str:
    return name.replace("_", " ")

"""Choosing α by a rule that can be stated, never by "the lowest forget score"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hf_unlearn.evaluation.sweep import Sweep, SweepPoint


DEFAULT_GRID = (0.5, 1.0, 2.0, 4.0, 8.0)  # the paper's


@dataclass(frozen=True)
class Choice:
    """
    A chosen α and its evidence.

    Args:
        alpha (`float`): The α chosen; 0 where no α of the grid keeps the retain budget.
        met (`bool`): Whether it fulfils the rule.
        rule (`str`): The rule in words.
        verdict (`str`): What was found, in words.
        retain_share (`float`): Retain probability as a share of the reference's.
        membership_auc (`float`, *optional*): AUC of forget against hold-out rows, where there is a hold-out set.
    """

    alpha: float
    met: bool
    rule: str
    verdict: str
    retain_share: float
    membership_auc: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The choice, JSON-ready."""
        return asdict(self)


def choose_alpha(
    sweep: Sweep,
    alphas: Sequence[float] = DEFAULT_GRID,
    min_retain: float = 0.95,
    auc_tolerance: float = 0.1,
    refinements: int = 4,
) -> Choice:
    """
    Choose α: a coarse grid from below, then bisection.

    With a hold-out set the rule is `match-holdout`: the forget rows look like rows the model never saw, i.e. their
    membership AUC against the hold-out rows is nearest 0.5, while the retain rows keep `min_retain` of their mean answer
    probability. Without one it is `utility-budget`: the largest α that keeps it.

    The grid is left where forgetting has gone far enough or the budget is spent, so larger α are not evaluated.

    Args:
        sweep ([`Sweep`]):
            The adapter to choose for.
        alphas (sequence of `float`, *optional*, defaults to `(0.5, 1, 2, 4, 8)`):
            Coarse grid.
        min_retain (`float`, *optional*, defaults to `0.95`):
            Share of the reference's mean retain probability that must remain.
        auc_tolerance (`float`, *optional*, defaults to `0.1`):
            Distance of the membership AUC from 0.5 up to which `match-holdout` counts as met.
        refinements (`int`, *optional*, defaults to `4`):
            Bisection steps after the grid.
    """

    def go_further(point: SweepPoint) -> bool:
        """Whether a larger α may be better: the budget is kept, and forget rows still stand out."""
        return _retain_share(sweep, point) >= min_retain and (
            point.membership_auc is None or point.membership_auc > 0.5
        )

    low, high = 0.0, None
    tried = [sweep.reference]
    for alpha in sorted(alphas):
        tried.append(sweep.evaluate(alpha))
        if not go_further(tried[-1]):
            high = alpha
            break
        low = alpha
    for _ in range(refinements if high is not None else 0):
        middle = (low + high) / 2
        tried.append(sweep.evaluate(middle))
        low, high = (middle, high) if go_further(tried[-1]) else (low, middle)

    within_budget = [point for point in tried if _retain_share(sweep, point) >= min_retain]
    if sweep.reference.membership_auc is None:
        return _utility_budget(sweep, within_budget, min_retain)
    return _match_holdout(sweep, within_budget, min_retain, auc_tolerance)


def _match_holdout(sweep: Sweep, points: list[SweepPoint], min_retain: float, tolerance: float) -> Choice:
    def distance(point: SweepPoint) -> tuple[float, float]:
        """From the hold-out rows: by AUC, and where that is equal by the mean log-probability."""
        forget, holdout = (point.mean(name, "log_probability") for name in ("forget", "holdout"))
        return abs(point.membership_auc - 0.5), abs(forget - holdout)

    best = min(points, key=distance)
    auc, share = best.membership_auc, _retain_share(sweep, best)
    met = best.alpha > 0 and abs(auc - 0.5) <= tolerance
    verdict = (
        f"α = {best.alpha:g}: membership AUC of forget against hold-out rows {auc:.2f} "
        f"(reference {sweep.reference.membership_auc:.2f}), retain probability {share:.1%} of the reference's. "
    )
    if met:
        verdict += "Forget rows look like rows the model never saw."
    elif best.alpha == 0:
        verdict += "No α within the retain budget brings forget rows nearer to rows never seen."
    elif auc > 0.5:
        verdict += "Forget rows still stand out, and a larger α breaks the retain budget or was not in the grid."
    else:
        verdict += "Forget rows are less likely than rows never seen, which gives them away too: over-forgotten."
    return Choice(
        alpha=best.alpha,
        met=met,
        rule=f"match-holdout: membership AUC of forget against hold-out rows nearest 0.5 (within {tolerance:g}), "
        f"retain probability at least {min_retain:.0%} of the reference's",
        verdict=verdict,
        retain_share=share,
        membership_auc=auc,
    )


def _utility_budget(sweep: Sweep, points: list[SweepPoint], min_retain: float) -> Choice:
    best = max(points, key=lambda point: point.alpha)
    share = _retain_share(sweep, best)
    before, after = (point.mean("forget", "probability") for point in (sweep.reference, best))
    return Choice(
        alpha=best.alpha,
        met=best.alpha > 0 and after < before,
        rule=f"utility-budget: the largest α with retain probability at least {min_retain:.0%} of the reference's",
        verdict=f"α = {best.alpha:g}: forget probability {before:.3f} → {after:.3f}, retain probability {share:.1%} of "
        "the reference's. Without hold-out rows nobody can say whether that is forgotten or over-forgotten.",
        retain_share=share,
    )


def _retain_share(sweep: Sweep, point: SweepPoint) -> float:
    """Mean retain probability as a share of the reference's."""
    return point.mean("retain", "probability") / sweep.reference.mean("retain", "probability")

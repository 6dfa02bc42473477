"""The study's one number: which point of a sweep stands for a method."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


MIN_UTILITY = 0.98


def quality(figures: dict[str, Any]) -> float:
    """Forget quality; 0 for a model that has none."""
    return figures["forget_quality"] or 0.0


def share(figures: dict[str, Any], target: dict[str, Any]) -> float:
    """Share of the target's utility that is left; 0 for a model whose losses are not finite."""
    return (figures["utility"] or 0.0) / target["utility"]


def auc_gap(figures: dict[str, Any], retrained: dict[str, Any]) -> float:
    """How far the membership AUC is from the retrained model's."""
    return abs(figures["membership_auc_loss"] - retrained["membership_auc_loss"])


def within(points: Iterable[dict[str, Any]], target: dict[str, Any]) -> list[dict[str, Any]]:
    """The points that keep 98 % of the target's utility, the target among them."""
    return [target, *(figures for figures in points if share(figures, target) >= MIN_UTILITY)]


def best(points: Iterable[dict[str, Any]], target: dict[str, Any], retrained: dict[str, Any]) -> dict[str, Any]:
    """
    The point of the best forget quality at 98 % of the target's utility, of equal ones that with the membership AUC
    nearest to the retrained model's, then that with the least forget probability; the target itself counts.
    """
    return max(
        within(points, target), key=lambda at: (quality(at), -auc_gap(at, retrained), -at["forget_probability"])
    )

"""Figures that several benchmarks have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from hf_unlearn.evaluation.aggregates import question_figures
from hf_unlearn.evaluation.figures import Figure
from hf_unlearn.evaluation.results import Evaluation


def text_scores(evaluation: Evaluation, name: str, score: Callable[[str, str], float]) -> list[float] | None:
    """
    Score of each generated answer of a set; `None` where it was not evaluated.

    Args:
        evaluation (`Evaluation`): Its `answers`, and the right ones in the column `ground_truth`.
        name (`str`): Name of the set.
        score (callable): From the right answer and the generated one to a score.
    """
    if name not in evaluation.answers:
        return None
    pairs = zip(evaluation.rows[name]["ground_truth"], evaluation.answers[name], strict=True)
    return [score(right, answer) for right, answer in pairs]


def membership_figures(evaluation: Evaluation, retrained: Evaluation | None) -> dict[str, Figure]:
    """`membership_auc_<attack>` and `privleak`, as far as the sets `forget` and `holdout` have the scores."""
    pair = {name: evaluation.rows[name] for name in ("forget", "holdout") if name in evaluation.rows}
    figures = question_figures(replace(evaluation, rows=pair), retrained)
    return {name: figure for name, figure in figures.items() if name.startswith(("membership_auc_", "privleak"))}

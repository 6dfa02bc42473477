"""From the columns of an evaluation on questions and answers to its figures, on TOFU and on sets of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation.figures import NOT_FINITE, Figure, mean_figure, not_computed
from hf_unlearn.evaluation.metrics import (
    closer_to_1,
    forget_quality,
    membership_auc,
    model_utility,
    perplexity,
    privleak,
    reference_score,
    true_better,
)
from hf_unlearn.evaluation.results import Evaluation


MEANS = (
    "probability",
    "normalized_probability",
    "rouge_l_recall",
    "rouge_l_f1",
    "exact_match",
    "exact_memorization",
    "extraction_strength",
    "kl",
)
RATES = ("refusal", "degenerate")
ATTACKS = {  # membership attack: column of its scores
    "loss": "loss",
    "zlib": "zlib_score",
    "min_k": "min_k_score",
    "min_k_plus_plus": "min_k_plus_plus_score",
    "reference": "reference_score",
    "gradnorm": "gradnorm_score",
}
UTILITY = {  # set: what counts as its probability in model utility
    "retain": "probability",
    "real_authors": "normalized_probability",
    "world_facts": "normalized_probability",
}


def question_figures(evaluation: Evaluation, retrained: Evaluation | None) -> dict[str, Figure]:
    """
    Every figure that the columns of an evaluation allow, those that compare whole sets first.

    Args:
        evaluation (`Evaluation`): Columns of the sets `forget`, `retain`, `holdout`, `real_authors` and `world_facts`,
            as far as there are any. Rows on which a column is `None` are left out of its figures.
        retrained (`Evaluation`, *optional*): The same of a model retrained without the forget set. Its forget and
            hold-out rows must be the same rows.

    Raises:
        [`~hf_unlearn.errors.UnlearningError`]: the retrained model's log is of other rows, or of the same model.
    """
    if retrained is not None:
        for name in ("forget", "holdout"):
            if name in evaluation.rows and name in retrained.rows:
                check_same_rows(name, evaluation.rows[name], retrained.rows[name])
        _check_other_model(evaluation, retrained)
    per_set: dict[str, Figure] = {}
    for name, columns in evaluation.rows.items():
        per_set |= {f"{name}_{metric}": figure for metric, figure in _set_figures(name, columns).items()}
    figures = {"forget_quality": _forget_quality(evaluation, retrained)}
    if any(name in evaluation.rows for name in ("real_authors", "world_facts")):
        figures["model_utility"] = _model_utility(per_set)
    return figures | _membership_figures(evaluation, retrained) | per_set


# ---- One set ----


def _set_figures(name: str, columns: dict[str, list[Any]]) -> dict[str, Figure]:
    figures = {column: _figure(mean_figure, columns[column]) for column in MEANS if column in columns}
    if {"loss", "num_tokens"} <= columns.keys():
        figures["perplexity"] = _figure(perplexity, columns["loss"], columns["num_tokens"])
    if "truth_ratio" in columns:
        figures["truth_ratio"] = _figure(closer_to_1 if name == "forget" else true_better, columns["truth_ratio"])
    return figures | {f"{column}_rate": _figure(mean_figure, columns[column]) for column in RATES if column in columns}


def _figure(compute: Callable[..., Figure], *columns: list[float | None]) -> Figure:
    """A figure over the rows on which every column was measured, if all their values are finite."""
    rows = [row for row in zip(*columns, strict=True) if None not in row]
    if not rows:
        return not_computed("no rows")
    values = np.asarray(rows, dtype=np.float64)
    broken = int((~np.isfinite(values)).any(axis=1).sum())
    if broken:
        return not_computed(f"{broken} of {len(rows)} {NOT_FINITE}")
    return compute(*values.T)


# ---- Several sets ----


def _model_utility(figures: dict[str, Figure]) -> Figure:
    names = [
        f"{name}_{metric}"
        for name, probability in UTILITY.items()
        for metric in (probability, "rouge_l_recall", "truth_ratio")
    ]
    missing = [name for name in names if name not in figures or figures[name].value is None]
    if missing:
        return not_computed(f"{', '.join(missing)} missing")
    rows = sum(figures[f"{name}_truth_ratio"].n for name in UTILITY)
    return Figure(model_utility([figures[name].value for name in names]), rows)


def _membership_figures(evaluation: Evaluation, retrained: Evaluation | None) -> dict[str, Figure]:
    scores = _attack_scores(evaluation, retrained)
    figures = {f"membership_auc_{attack}": _auc(*scores[attack]) for attack in scores}
    if "min_k" in scores:
        figures["privleak"] = _privleak(figures["membership_auc_min_k"], retrained)
    return figures


def _attack_scores(evaluation: Evaluation, retrained: Evaluation | None) -> dict[str, tuple[list[float], list[float]]]:
    """Scores of the forget and of the hold-out rows, for each attack that both have."""
    sets = [dict(evaluation.rows.get(name, {})) for name in ("forget", "holdout")]
    if retrained is not None:
        for name, columns in zip(("forget", "holdout"), sets, strict=True):
            others = retrained.rows.get(name, {})
            if "reference_score" not in columns and "loss" in columns and "loss" in others:
                columns["reference_score"] = _reference_scores(columns, others)
    forget, holdout = sets
    return {
        attack: (forget[column], holdout[column])
        for attack, column in ATTACKS.items()
        if column in forget and column in holdout
    }


def _reference_scores(columns: dict[str, list[Any]], retrained: dict[str, list[Any]]) -> list[float | None]:
    scores: list[float | None] = [None] * len(columns["row"])
    for index, other in zip(_order(columns), _order(retrained), strict=True):
        losses = columns["loss"][index], retrained["loss"][other]
        scores[index] = None if None in losses else reference_score(*losses)
    return scores


def _auc(forget: list[float | None], holdout: list[float | None]) -> Figure:
    def compute(members: np.ndarray, others: np.ndarray) -> Figure:
        return Figure(membership_auc(members, others), len(members) + len(others))

    return _two_samples(compute, forget, holdout)


def _two_samples(
    compute: Callable[[np.ndarray, np.ndarray], Figure], first: list[float | None], second: list[float | None]
) -> Figure:
    first, second = ([value for value in values if value is not None] for values in (first, second))
    if not first or not second:
        return not_computed("no rows")
    return _figure(lambda both: compute(both[: len(first)], both[len(first) :]), first + second)


def _privleak(auc: Figure, retrained: Evaluation | None) -> Figure:
    if auc.value is None:
        return auc
    if retrained is None:
        return Figure(privleak(auc.value), auc.n, note="against an AUC of 0.5: no retrained log")
    scores = _attack_scores(retrained, None)
    if "min_k" not in scores:
        return Figure(privleak(auc.value), auc.n, note="against an AUC of 0.5: no min-k scores in the retrained log")
    reference = _auc(*scores["min_k"])
    if reference.value is None:
        return not_computed("the min-k scores of the retrained log give no AUC")
    return Figure(
        privleak(auc.value, reference.value), auc.n, note=f"against the retrained model's AUC of {reference.value:.4g}"
    )


# ---- Against a retrained model ----


def _forget_quality(evaluation: Evaluation, retrained: Evaluation | None) -> Figure:
    if retrained is None:
        return not_computed("no retrained log")
    ratios, others = (one.rows.get("forget", {}).get("truth_ratio") for one in (evaluation, retrained))
    if ratios is None:
        return not_computed("no truth ratios of the forget set, which need wrong answers")
    if others is None:
        return not_computed("no truth ratios of the forget set in the retrained log")
    return _two_samples(lambda left, right: Figure(forget_quality(left, right), len(left)), ratios, others)


def check_same_rows(name: str, columns: dict[str, list[Any]], retrained: dict[str, list[Any]]) -> None:
    """
    Refuse a retrained model's log of other rows, told by their ids and, where both have it, the text of the answers.

    Args:
        name (`str`): Name of the set.
        columns, retrained (`dict[str, list]`): Columns `row` and, optionally, `ground_truth` of both.
    """
    rows, others = columns["row"], retrained["row"]
    remedy = "Give the log of the same split, evaluated on all of its rows."
    if sorted(rows) != sorted(others):
        only = "" if len(rows) != len(others) else f"; {len(set(rows) - set(others))} of the ids are not in the log"
        raise UnlearningError(
            f"{name} set: {len(rows)} rows were evaluated, and the retrained log has {len(others)}{only}. They must "
            f"be the same rows; most likely the log is of another split. {remedy}"
        )
    if "ground_truth" not in columns or "ground_truth" not in retrained:
        return
    for index, other in zip(_order(columns), _order(retrained), strict=True):
        texts = columns["ground_truth"][index], retrained["ground_truth"][other]
        if "".join(texts[0].split()) != "".join(texts[1].split()):
            raise UnlearningError(
                f"{name} set, row {rows[index]}: the answer is {texts[0]!r} here and {texts[1]!r} in the retrained "
                f"log. The log is of another set of {len(others)} rows. {remedy}"
            )


def _check_other_model(evaluation: Evaluation, retrained: Evaluation) -> None:
    losses = [one.rows.get("forget", {}).get("loss") for one in (evaluation, retrained)]
    if losses[0] and losses[0] == losses[1]:
        raise UnlearningError(
            "The losses of all forget rows are those of the retrained model's log: the same model or file on both "
            "sides, which would read as perfect forgetting. Give the log of the model retrained without the forget set."
        )


def _order(columns: dict[str, list[Any]]) -> list[int]:
    """Indices that sort the rows by id; rows with one id, such as turns of a conversation, keep their order."""
    return sorted(range(len(columns["row"])), key=columns["row"].__getitem__)

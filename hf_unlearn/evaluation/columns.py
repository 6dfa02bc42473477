"""From what a model gave on the rows of a set to columns of per-row values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_unlearn.evaluation import metrics
from hf_unlearn.evaluation.scoring import AnswerScores


Columns = dict[str, list[Any]]


def scored_columns(
    measures: Sequence[str], scores: Sequence[Sequence[AnswerScores]], answers: Sequence[str], paraphrased: bool
) -> Columns:
    """
    Columns of one teacher-forced pass.

    Args:
        measures (sequence of `str`): What was asked for, of `protocols.base.SCORED`.
        scores (sequence of sequences of [`AnswerScores`]): Per row, those of the answer, of the paraphrased answer if
            there is one, and of the wrong answers.
        answers (sequence of `str`): Text of each answer.
        paraphrased (`bool`): Whether there are paraphrased answers.
    """
    firsts = [row[0] for row in scores]
    columns: Columns = {
        "num_tokens": [len(first.log_probs) for first in firsts],
        "loss": [metrics.answer_loss(first.log_probs) for first in firsts],
        "probability": [metrics.probability(first.log_probs) for first in firsts],
    }
    if "memorization" in measures:
        is_top1 = [first.without_end(first.is_top1) for first in firsts]
        columns["exact_memorization"] = [metrics.exact_memorization(row) for row in is_top1]
        columns["extraction_strength"] = [metrics.extraction_strength(row) for row in is_top1]
    if "membership" in measures:
        columns |= _membership_columns(firsts, columns["loss"], answers)
    if any(first.kl is not None for first in firsts):
        columns["kl"] = [metrics.kl_to_reference(first.kl) for first in firsts]
    if {"truth_ratio", "normalized_probability"} & set(measures):
        columns |= _wrong_answer_columns(measures, scores, columns, paraphrased)
    return columns


def generated_columns(measures: Sequence[str], references: Sequence[str], answers: Sequence[str]) -> Columns:
    """
    Columns of one generation pass.

    Args:
        measures (sequence of `str`): What was asked for, of `protocols.base.GENERATED`.
        references (sequence of `str`): The right answers.
        answers (sequence of `str`): The generated ones.
    """
    columns: Columns = {}
    if "rouge" in measures:
        scores = [metrics.rouge(*pair) for pair in zip(references, answers, strict=True)]
        for name in metrics.RougeScores._fields:
            columns[name] = [getattr(score, name) for score in scores]
    if "exact_match" in measures:
        columns["exact_match"] = [metrics.exact_match(*pair) for pair in zip(references, answers, strict=True)]
    if "refusal" in measures:
        columns["refusal"] = [int(metrics.is_refusal(answer)) for answer in answers]
    if "degenerate" in measures:
        columns["degenerate"] = [int(metrics.is_degenerate(answer)) for answer in answers]
    return columns


def _membership_columns(firsts: Sequence[AnswerScores], losses: Sequence[float], answers: Sequence[str]) -> Columns:
    columns: Columns = {"zlib_score": [], "min_k_score": [], "min_k_plus_plus_score": []}
    for first, loss, answer in zip(firsts, losses, answers, strict=True):
        log_probs, mean, std = (first.without_end(array) for array in (first.log_probs, first.mean, first.std))
        columns["zlib_score"].append(metrics.zlib_score(loss, answer))
        columns["min_k_score"].append(metrics.min_k(log_probs))
        columns["min_k_plus_plus_score"].append(metrics.min_k_plus_plus(log_probs, mean, std))
    return columns


def _wrong_answer_columns(
    measures: Sequence[str], scores: Sequence[Sequence[AnswerScores]], columns: Columns, paraphrased: bool
) -> Columns:
    losses = [[metrics.answer_loss(answer.log_probs) for answer in row] for row in scores]
    wrong_losses = [row[2 if paraphrased else 1 :] for row in losses]
    added: Columns = {"wrong_losses": wrong_losses}
    if "normalized_probability" in measures:
        wrong = [
            [metrics.probability(answer.log_probs) for answer in row[2 if paraphrased else 1 :]] for row in scores
        ]
        pairs = zip(columns["probability"], wrong, strict=True)
        added["normalized_probability"] = [metrics.normalized_probability(*pair) for pair in pairs]
    if "truth_ratio" in measures:
        if paraphrased:
            added["paraphrased_loss"] = [row[1] for row in losses]
        correct = [row[1 if paraphrased else 0] for row in losses]
        added["truth_ratio"] = [metrics.truth_ratio(*pair) for pair in zip(correct, wrong_losses, strict=True)]
    return added

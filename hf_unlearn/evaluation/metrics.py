"""Metrics of single rows and of sets of rows, computed from [`RowScores`] and from generated answers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from hf_unlearn.evaluation.scoring import RowScores


def probability(scores: RowScores) -> float:
    """Answer probability exp(mean log-probability of the answer tokens, EOS included), in [0, 1] (TOFU)."""
    return float(np.exp(scores.log_probs.mean(dtype=np.float64)))


def exact_memorization(scores: RowScores) -> float:
    """Share of the answer tokens, EOS left out, that are the model's first choice when all before them are given."""
    is_top1 = _without_eos(scores)
    return float(is_top1.mean()) if len(is_top1) else 0.0


def extraction_strength(scores: RowScores) -> float:
    """
    1 − k/n with k the length of the smallest answer prefix after which the model's first choices give the whole rest,
    EOS left out. 1: the prompt alone yields the answer; 0: not even the last token is right.
    """
    is_top1 = _without_eos(scores)
    if not len(is_top1):
        return 0.0
    wrong = np.flatnonzero(~is_top1)
    prefix = wrong[-1] + 1 if len(wrong) else 0
    return float(1 - prefix / len(is_top1))


def rouge_l_recall(reference: str, prediction: str) -> float:
    """ROUGE-L recall, stemmed: share of the reference's words in the longest common subsequence (TOFU)."""
    return float(_rouge_scorer().score(reference, prediction)["rougeL"].recall)


def membership_auc(members: Sequence[float], non_members: Sequence[float]) -> float:
    """
    Probability that a member scores above a non-member, ties counting half. 0.5: they cannot be told apart; 1: members
    stand out; far below 0.5: they are *less* likely than text never seen, which gives them away too.

    Args:
        members (sequence of `float`): Scores of the forget rows, e.g. mean answer log-probabilities.
        non_members (sequence of `float`): Scores of hold-out rows that no model was trained on.
    """
    members, non_members = np.asarray(members, dtype=np.float64), np.asarray(non_members, dtype=np.float64)
    above = (members[:, None] > non_members[None, :]).mean()
    tied = (members[:, None] == non_members[None, :]).mean()
    return float(above + tied / 2)


def _without_eos(scores: RowScores) -> np.ndarray:
    return scores.is_top1[:-1] if scores.ends_with_eos else scores.is_top1


@cache
def _rouge_scorer():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)

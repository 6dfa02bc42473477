"""
Membership inference: can one tell from the model that a row was in its training set?

All scores are lower for rows that look like training rows. The loss of a row is itself the first of them.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import evaluate
import numpy as np
from scipy import stats

from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation.figures import Figure
from hf_unlearn.evaluation.metrics.info import FLAG, NUMBER, metric_info, to_result


def zlib_score(loss: float, answer: str) -> float:
    """Mean loss of the answer by the number of bytes of its zlib-compressed text."""
    return loss / len(zlib.compress(answer.encode()))


def min_k(log_probs: Sequence[float], k: float = 0.4) -> float:
    """
    Minus the mean of the lowest share `k` of the token log-probabilities, one token at least; 0 without tokens.

    Args:
        log_probs (sequence of `float`): Log-probability of each answer token, EOS left out.
        k (`float`, *optional*, defaults to `0.4`): Share of the tokens.
    """
    if not len(log_probs):
        return 0.0
    lowest = max(1, int(len(log_probs) * k))
    return float(-np.sort(np.asarray(log_probs, dtype=np.float64))[:lowest].mean())


def min_k_plus_plus(log_probs: Sequence[float], mean: Sequence[float], std: Sequence[float], k: float = 0.4) -> float:
    """
    [`min_k`] of the log-probabilities standardised by what the model expects at each position: (log p − μ) / σ.

    Args:
        log_probs (sequence of `float`): Log-probability of each answer token, EOS left out.
        mean, std (sequence of `float`):
            Mean and standard deviation of log p under the model's own prediction at each of these positions. A
            variance below 1e-6 is taken as 1e-6, as in the field.
        k (`float`, *optional*, defaults to `0.4`): Share of the tokens.
    """
    centred = np.asarray(log_probs, dtype=np.float64) - np.asarray(mean, dtype=np.float64)
    return min_k(centred / np.maximum(std, 1e-3), k)


def reference_score(loss: float, reference_loss: float) -> float:
    """Mean loss of the answer minus that under a model which was never trained on the row."""
    return loss - reference_loss


def membership_auc(member_scores: Sequence[float], non_member_scores: Sequence[float]) -> float:
    """
    Probability that a member scores below a non-member, ties counting half.

    0.5: they cannot be told apart; 1: members stand out; far below 0.5: they are *less* likely than text never seen,
    which gives them away too.

    Args:
        member_scores (sequence of `float`): Scores of the forget rows, lower for rows that look like training rows.
        non_member_scores (sequence of `float`): Scores of hold-out rows, which no model was trained on.
    """
    members, others = len(member_scores), len(non_member_scores)
    if not members or not others:
        raise UnlearningError(
            f"membership AUC: there are {members} forget and {others} hold-out scores. Give at least one of each."
        )
    ranks = stats.rankdata(np.concatenate([member_scores, non_member_scores]))
    return float((ranks[members:].sum() - others * (others + 1) / 2) / (members * others))


class Membership(evaluate.Metric):
    """Membership AUC of scores that are lower for rows that look like training rows; 1: members stand out."""

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(self.__doc__, scores=NUMBER, is_member=FLAG)

    def _compute(self, scores: list[float], is_member: list[bool]) -> dict[str, Any]:
        scores, is_member = np.asarray(scores), np.asarray(is_member)
        auc = membership_auc(scores[is_member], scores[~is_member])
        return to_result("membership_auc", Figure(auc, len(scores)))

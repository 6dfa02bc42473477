"""Answer probability (TOFU)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import evaluate
import numpy as np

from hf_unlearn.evaluation.figures import mean_figure
from hf_unlearn.evaluation.metrics.info import NUMBERS, metric_info, to_result


def answer_loss(log_probs: Sequence[float]) -> float:
    """Mean negative log-likelihood of the answer tokens, in nats per token; 0 without tokens."""
    log_probs = np.asarray(log_probs, dtype=np.float64)
    return float(-log_probs.mean()) if len(log_probs) else 0.0


def probability(log_probs: Sequence[float]) -> float:
    """
    Answer probability exp(mean log-probability of the answer tokens), in [0, 1].

    Args:
        log_probs (sequence of `float`): Log-probability of each answer token, EOS included.
    """
    return float(np.exp(-answer_loss(log_probs)))


def normalized_probability(probability: float, wrong_probabilities: Sequence[float]) -> float:
    """
    p / (p + Σ p_wrong + 1e-10), the measure of TOFU's real authors and world facts.

    The 1e-10 is that of the published logs; without it, rows whose answers are all improbable differ from them by up
    to 7e-5.

    Args:
        probability (`float`): [`probability`] of the right answer.
        wrong_probabilities (sequence of `float`): The same of each wrong answer.
    """
    return float(probability / (probability + np.sum(wrong_probabilities, dtype=np.float64) + 1e-10))


class Probability(evaluate.Metric):
    """Mean answer probability over rows, each given by the log-probabilities of its answer tokens."""

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(self.__doc__, log_probs=NUMBERS)

    def _compute(self, log_probs: list[list[float]]) -> dict[str, Any]:
        return to_result("probability", mean_figure([probability(row) for row in log_probs]))

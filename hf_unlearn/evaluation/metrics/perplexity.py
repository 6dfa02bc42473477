"""Perplexity of the answers of a set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import evaluate
import numpy as np
from scipy import stats

from hf_unlearn.evaluation.figures import RESAMPLES, Figure, not_computed
from hf_unlearn.evaluation.metrics.info import NUMBER, metric_info, to_result


LARGEST_LOSS = 700  # in nats per token; the exponential of more exceeds a double


def perplexity(losses: Sequence[float], num_tokens: Sequence[int]) -> Figure:
    """
    exp(Σ tokens · loss / Σ tokens), with its 95 % percentile bootstrap interval over rows.

    Args:
        losses (sequence of `float`): Mean loss of each answer, in nats per token.
        num_tokens (sequence of `int`): Number of tokens of each answer.
    """
    losses, num_tokens = np.asarray(losses, dtype=np.float64), np.asarray(num_tokens, dtype=np.float64)
    if not num_tokens.sum():
        return not_computed("no answer tokens")
    if losses.max() > LARGEST_LOSS:
        return not_computed(f"a loss is above {LARGEST_LOSS} nats per token, so its exponential exceeds a double")
    value = float(np.exp(_mean_loss(losses, num_tokens)))
    if len(losses) == 1:
        return Figure(value, 1)
    if losses.min() == losses.max():
        return Figure(value, len(losses), value, value)
    interval = stats.bootstrap(
        (losses, num_tokens),
        _mean_loss,
        n_resamples=RESAMPLES,
        method="percentile",
        batch=100,
        paired=True,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Figure(value, len(losses), float(np.exp(interval.low)), float(np.exp(interval.high)))


def _mean_loss(losses: np.ndarray, num_tokens: np.ndarray, axis: int = -1) -> np.ndarray:
    return (losses * num_tokens).sum(axis) / num_tokens.sum(axis)


class Perplexity(evaluate.Metric):
    """Perplexity of the answers, from the mean loss and the number of tokens of each."""

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(self.__doc__, losses=NUMBER, num_tokens=NUMBER)

    def _compute(self, losses: list[float], num_tokens: list[float]) -> dict[str, Any]:
        return to_result("perplexity", perplexity(losses, num_tokens))

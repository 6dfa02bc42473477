"""Exact memorisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import evaluate
import numpy as np

from hf_unlearn.evaluation.figures import mean_figure
from hf_unlearn.evaluation.metrics.info import FLAGS, metric_info, to_result


def exact_memorization(is_top1: Sequence[bool]) -> float:
    """
    Share of the answer tokens that are the model's first choice when all before them are given; 0 without tokens.

    Args:
        is_top1 (sequence of `bool`): Whether each answer token, EOS left out, is the model's first choice.
    """
    return float(np.mean(is_top1)) if len(is_top1) else 0.0


class ExactMemorization(evaluate.Metric):
    """Mean exact memorisation over rows: the share of answer tokens that are the model's first choice."""

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(self.__doc__, is_top1=FLAGS)

    def _compute(self, is_top1: list[list[bool]]) -> dict[str, Any]:
        return to_result("exact_memorization", mean_figure([exact_memorization(row) for row in is_top1]))

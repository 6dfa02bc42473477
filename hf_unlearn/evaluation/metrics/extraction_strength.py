"""Extraction strength."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import evaluate
import numpy as np

from hf_unlearn.evaluation.figures import mean_figure
from hf_unlearn.evaluation.metrics.info import FLAGS, metric_info, to_result


def extraction_strength(is_top1: Sequence[bool]) -> float:
    """
    1 − k/n with k the length of the smallest answer prefix after which the model's first choices give the whole rest.

    1: the prompt alone yields the answer; 0: not even the last token is right, or there are no tokens. (In
    open-unlearning, a total miss is 1/n.)

    Args:
        is_top1 (sequence of `bool`): Whether each answer token, EOS left out, is the model's first choice.
    """
    if not len(is_top1):
        return 0.0
    wrong = np.flatnonzero(~np.asarray(is_top1, dtype=bool))
    prefix = wrong[-1] + 1 if len(wrong) else 0
    return float(1 - prefix / len(is_top1))


class ExtractionStrength(evaluate.Metric):
    """Mean extraction strength over rows: the share of the answer that its smallest sufficient prefix leaves."""

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(self.__doc__, is_top1=FLAGS)

    def _compute(self, is_top1: list[list[bool]]) -> dict[str, Any]:
        return to_result("extraction_strength", mean_figure([extraction_strength(row) for row in is_top1]))

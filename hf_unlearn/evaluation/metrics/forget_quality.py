"""Forget quality (TOFU)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import evaluate
import numpy as np
from scipy import stats

from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation.figures import Figure
from hf_unlearn.evaluation.metrics.info import NUMBER, metric_info, to_result


def forget_quality(truth_ratios: Sequence[float], retrained_truth_ratios: Sequence[float]) -> float:
    """
    p-value of the two-sided Kolmogorov–Smirnov test that this model's truth ratios on the forget set and those of a
    model retrained without it come from one distribution.

    Args:
        truth_ratios (sequence of `float`): Raw [`truth_ratio`] of each forget row under this model.
        retrained_truth_ratios (sequence of `float`): The same under the retrained model.
    """
    if np.array_equal(truth_ratios, retrained_truth_ratios):
        raise UnlearningError(
            "forget quality: the truth ratios are identical on both sides, so it is the same model or file on both "
            "sides. Give the log of a model that was retrained without the forget set."
        )
    return float(stats.ks_2samp(truth_ratios, retrained_truth_ratios).pvalue)


class ForgetQuality(evaluate.Metric):
    """Forget quality: KS p-value of raw truth ratios against `retrained_truth_ratios`, a list of its own length."""

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(self.__doc__, truth_ratios=NUMBER)

    def _compute(self, truth_ratios: list[float], retrained_truth_ratios: list[float]) -> dict[str, Any]:
        value = forget_quality(truth_ratios, retrained_truth_ratios)
        return to_result("forget_quality", Figure(value, len(truth_ratios)))

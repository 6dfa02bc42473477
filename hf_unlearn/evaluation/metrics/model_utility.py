"""Model utility (TOFU)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import evaluate

from hf_unlearn.evaluation.figures import Figure
from hf_unlearn.evaluation.metrics.info import NUMBER, metric_info, to_result


def model_utility(values: Sequence[float]) -> float:
    """
    Harmonic mean; 0 if any value is 0.

    Args:
        values (sequence of `float`): {probability, ROUGE-L recall, truth ratio} × {retain, real authors, world facts}.
    """
    return 0.0 if min(values) == 0 else len(values) / sum(1 / value for value in values)


class ModelUtility(evaluate.Metric):
    """Model utility: the harmonic mean of probability, ROUGE and truth ratio on the sets to be kept."""

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(self.__doc__, values=NUMBER)

    def _compute(self, values: list[float]) -> dict[str, Any]:
        return to_result("model_utility", Figure(model_utility(values), len(values)))

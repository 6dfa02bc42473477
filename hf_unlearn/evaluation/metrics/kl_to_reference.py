"""Divergence from the reference model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import evaluate
import numpy as np

from hf_unlearn.evaluation.figures import mean_figure
from hf_unlearn.evaluation.metrics.info import NUMBERS, metric_info, to_result


def kl_to_reference(kl: Sequence[float]) -> float:
    """
    Mean over the answer tokens of a row of KL(p_ref ‖ p_θ), in nats; 0 without tokens.

    Args:
        kl (sequence of `float`): The divergence at each answer token.
    """
    return float(np.mean(kl, dtype=np.float64)) if len(kl) else 0.0


class KLToReference(evaluate.Metric):
    """Mean over rows of the mean KL(p_ref ‖ p_θ) per answer token, in nats."""

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(self.__doc__, kl=NUMBERS)

    def _compute(self, kl: list[list[float]]) -> dict[str, Any]:
        return to_result("kl_to_reference", mean_figure([kl_to_reference(row) for row in kl]))

"""
Truth ratio (TOFU), and its three aggregates.

Papers differ in the aggregate, so each says its name in the `note` of its figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import evaluate
import numpy as np

from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation.figures import Figure, mean_figure
from hf_unlearn.evaluation.metrics.info import NUMBER, NUMBERS, metric_info, to_result


def truth_ratio(correct_loss: float, wrong_losses: Sequence[float]) -> float:
    """
    r = p_wrong / (p_correct + 1e-10), with p = exp(−loss) and the wrong answers' losses averaged first.

    1: wrong answers are as likely as the correct one; 0: the model tells them apart. The 1e-10 is that of the
    published logs; without it, rows whose correct answer is improbable differ from them by up to 5e-4. It also makes r
    vanish where every answer is hopeless.

    Args:
        correct_loss (`float`): Mean loss of the paraphrased answer, or of the answer itself where there is none.
        wrong_losses (sequence of `float`): Mean loss of each wrong answer.
    """
    return float(np.exp(-np.mean(wrong_losses, dtype=np.float64)) / (np.exp(-np.float64(correct_loss)) + 1e-10))


def closer_to_1(truth_ratios: Sequence[float]) -> Figure:
    """Mean min(r, 1/r): TOFU's aggregate on the forget set, where r = 1 is best."""
    r = np.asarray(truth_ratios, dtype=np.float64)
    return mean_figure(np.minimum(r, 1) / np.maximum(r, 1), note="closer_to_1: mean min(r, 1/r)")


def true_better(truth_ratios: Sequence[float]) -> Figure:
    """Mean max(0, 1 − r): TOFU's aggregate on the sets to be kept, where r = 0 is best."""
    r = np.asarray(truth_ratios, dtype=np.float64)
    return mean_figure(np.maximum(0, 1 - r), note="true_better: mean max(0, 1 − r)")


def probability_mean(truth_ratios: Sequence[float]) -> Figure:
    """Mean p_correct / (p_correct + p_wrong) = 1 / (1 + r): open-unlearning's `prob_mean`, the extent of knowledge."""
    r = np.asarray(truth_ratios, dtype=np.float64)
    return mean_figure(1 / (1 + r), note="probability_mean: mean p / (p + p_wrong)")


VARIANTS = {"closer_to_1": closer_to_1, "true_better": true_better, "probability_mean": probability_mean}


class TruthRatio(evaluate.Metric):
    """Truth ratio over rows in one of its variants: `closer_to_1`, `true_better` or `probability_mean`."""

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(self.__doc__, correct_loss=NUMBER, wrong_losses=NUMBERS)

    def _compute(
        self, correct_loss: list[float], wrong_losses: list[list[float]], variant: str = "closer_to_1"
    ) -> dict[str, Any]:
        if variant not in VARIANTS:
            raise UnlearningError(f"`variant` is {variant!r}, which is no truth ratio. Use one of {list(VARIANTS)}.")
        ratios = [truth_ratio(*losses) for losses in zip(correct_loss, wrong_losses, strict=True)]
        return to_result("truth_ratio", VARIANTS[variant](ratios)) | {"variant": variant}

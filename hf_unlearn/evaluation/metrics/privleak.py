"""PrivLeak (MUSE)."""

from __future__ import annotations

from typing import Any

import evaluate
import numpy as np

from hf_unlearn.evaluation.figures import Figure
from hf_unlearn.evaluation.metrics.info import FLAG, NUMBER, metric_info, to_result
from hf_unlearn.evaluation.metrics.membership import membership_auc


def privleak(auc: float, retrained_auc: float = 0.5) -> float:
    """
    100 · ((1 − AUC) − (1 − AUC_retrain)) / (1 − AUC_retrain + 1e-10) on min-k scores, in percent.

    0: the forget rows look as they do to a retrained model; −100: they still look like training rows (nothing is
    forgotten); large: they stand out as unlikely (too much is). The 1e-10 is that of the published logs; it matters
    only where AUC_retrain is 1.

    Args:
        auc (`float`): [`membership_auc`] of this model.
        retrained_auc (`float`, *optional*, defaults to `0.5`): The same of a model retrained without the forget set.
    """
    return 100 * (retrained_auc - auc) / (1 - retrained_auc + 1e-10)


class Privleak(evaluate.Metric):
    """PrivLeak in percent, from min-k scores of forget rows (members) and hold-out rows, and `retrained_auc`."""

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(self.__doc__, scores=NUMBER, is_member=FLAG)

    def _compute(self, scores: list[float], is_member: list[bool], retrained_auc: float = 0.5) -> dict[str, Any]:
        scores, is_member = np.asarray(scores), np.asarray(is_member)
        auc = membership_auc(scores[is_member], scores[~is_member])
        return to_result("privleak", Figure(privleak(auc, retrained_auc), len(scores)))

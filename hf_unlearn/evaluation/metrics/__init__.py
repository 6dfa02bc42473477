"""
One small file a metric: plain functions on arrays and strings, and the same as an `evaluate.Metric`.

`evaluate.load(".../metrics/probability.py")` loads the metric of a file; its name is that of the file.
"""

from hf_unlearn.evaluation.metrics.degenerate_rate import is_degenerate
from hf_unlearn.evaluation.metrics.exact_match import exact_match
from hf_unlearn.evaluation.metrics.exact_memorization import exact_memorization
from hf_unlearn.evaluation.metrics.extraction_strength import extraction_strength
from hf_unlearn.evaluation.metrics.forget_quality import forget_quality
from hf_unlearn.evaluation.metrics.kl_to_reference import kl_to_reference
from hf_unlearn.evaluation.metrics.membership import (
    membership_auc,
    min_k,
    min_k_plus_plus,
    reference_score,
    zlib_score,
)
from hf_unlearn.evaluation.metrics.model_utility import model_utility
from hf_unlearn.evaluation.metrics.perplexity import perplexity
from hf_unlearn.evaluation.metrics.privleak import privleak
from hf_unlearn.evaluation.metrics.probability import answer_loss, normalized_probability, probability
from hf_unlearn.evaluation.metrics.refusal_rate import is_refusal
from hf_unlearn.evaluation.metrics.rouge import RougeScores, rouge, rouge_l_recall
from hf_unlearn.evaluation.metrics.truth_ratio import closer_to_1, probability_mean, true_better, truth_ratio


__all__ = [
    "RougeScores",
    "answer_loss",
    "closer_to_1",
    "exact_match",
    "exact_memorization",
    "extraction_strength",
    "forget_quality",
    "is_degenerate",
    "is_refusal",
    "kl_to_reference",
    "membership_auc",
    "min_k",
    "min_k_plus_plus",
    "model_utility",
    "normalized_probability",
    "perplexity",
    "privleak",
    "probability",
    "probability_mean",
    "reference_score",
    "rouge",
    "rouge_l_recall",
    "true_better",
    "truth_ratio",
    "zlib_score",
]

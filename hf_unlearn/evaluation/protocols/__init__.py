"""Benchmarks: which rows, what is measured on them, which figures."""

from hf_unlearn.evaluation.aggregates import question_figures
from hf_unlearn.evaluation.protocols.base import EvaluationSet, Protocol
from hf_unlearn.evaluation.protocols.custom import custom_protocol
from hf_unlearn.evaluation.protocols.lume import lume_figures, lume_protocol
from hf_unlearn.evaluation.protocols.muse import muse_figures, muse_protocol, muse_request
from hf_unlearn.evaluation.protocols.tofu import tofu_protocol
from hf_unlearn.evaluation.protocols.wmdp import wmdp_protocol


# Name of a protocol whose figures can be computed from the rows of a log: the function that does, and its utility.
FIGURES = {
    "custom": (question_figures, "retain_probability"),
    "tofu": (question_figures, "model_utility"),
    "muse-news": (muse_figures, "knowmem_retain"),
    "muse-books": (muse_figures, "knowmem_retain"),
    "lume": (lume_figures, "retain_score"),
}

__all__ = [
    "FIGURES",
    "EvaluationSet",
    "Protocol",
    "custom_protocol",
    "lume_protocol",
    "muse_protocol",
    "muse_request",
    "tofu_protocol",
    "wmdp_protocol",
]

"""Evaluation of any causal LM, and of an adapter at any α."""

from hf_unlearn.evaluation.cache import ResultCache
from hf_unlearn.evaluation.evaluator import Evaluator
from hf_unlearn.evaluation.figures import Figure, mean_figure
from hf_unlearn.evaluation.generation import generate_answers
from hf_unlearn.evaluation.logs import read_log, write_open_unlearning
from hf_unlearn.evaluation.protocols import EvaluationSet, Protocol, custom_protocol, tofu_protocol
from hf_unlearn.evaluation.report import RowText, write_report
from hf_unlearn.evaluation.results import Evaluation
from hf_unlearn.evaluation.scoring import AnswerScores, encode_answers, score_answers
from hf_unlearn.evaluation.selection import DEFAULT_GRID, Choice, choose_alpha, collapse
from hf_unlearn.evaluation.tables import write_tables


__all__ = [
    "DEFAULT_GRID",
    "AnswerScores",
    "Choice",
    "Evaluation",
    "EvaluationSet",
    "Evaluator",
    "Figure",
    "Protocol",
    "ResultCache",
    "RowText",
    "choose_alpha",
    "collapse",
    "custom_protocol",
    "encode_answers",
    "generate_answers",
    "mean_figure",
    "read_log",
    "score_answers",
    "tofu_protocol",
    "write_open_unlearning",
    "write_report",
    "write_tables",
]

"""Evaluation of any causal LM, and of an adapter at any α."""

from hf_unlearn.evaluation.generation import generate_answers
from hf_unlearn.evaluation.metrics import (
    exact_memorization,
    extraction_strength,
    membership_auc,
    probability,
    rouge_l_recall,
)
from hf_unlearn.evaluation.scoring import RowScores, score_rows
from hf_unlearn.evaluation.selection import DEFAULT_GRID, Choice, choose_alpha
from hf_unlearn.evaluation.sweep import Sweep, SweepPoint


__all__ = [
    "DEFAULT_GRID",
    "Choice",
    "RowScores",
    "Sweep",
    "SweepPoint",
    "choose_alpha",
    "exact_memorization",
    "extraction_strength",
    "generate_answers",
    "membership_auc",
    "probability",
    "rouge_l_recall",
    "score_rows",
]

"""Exact match of generated answers."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

import evaluate

from hf_unlearn.evaluation.figures import mean_figure
from hf_unlearn.evaluation.metrics.info import TEXT, metric_info, to_result


def exact_match(reference: str, prediction: str) -> int:
    """1 if both texts are the same but for case, punctuation, English articles and white space (SQuAD), else 0."""
    return int(_normalize(reference) == _normalize(prediction))


def _normalize(text: str) -> str:
    letters = "".join(char for char in text.casefold() if not unicodedata.category(char).startswith("P"))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", letters).split())


class ExactMatch(evaluate.Metric):
    """Share of the predictions that match their reference but for case, punctuation, articles and white space."""

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(self.__doc__, predictions=TEXT, references=TEXT)

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        pairs = zip(references, predictions, strict=True)
        return to_result("exact_match", mean_figure([exact_match(*pair) for pair in pairs]))

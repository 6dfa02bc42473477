"""What the `evaluate.Metric` of every file shares: the shape of its inputs and of its result."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from hf_unlearn.evaluation.figures import Figure


NUMBER = datasets.Value("float64")
NUMBERS = datasets.Sequence(NUMBER)  # one list of numbers per row
FLAG = datasets.Value("bool")
FLAGS = datasets.Sequence(FLAG)
TEXT = datasets.Value("string")


def metric_info(description: str, **features: Any) -> evaluate.MetricInfo:
    """
    Description of a metric.

    Args:
        description (`str`): What it measures.
        features: Type of each of its per-row inputs.
    """
    return evaluate.MetricInfo(
        description=description, citation="", inputs_description="", features=datasets.Features(features)
    )


def to_result(name: str, figure: Figure) -> dict[str, Any]:
    """A figure as `evaluate` returns it: the value under the metric's name, `n`, `low` and `high` of a mean, and `note` where there is none."""
    result = {name: figure.value, "n": figure.n}
    if figure.low is not None:
        result |= {"low": figure.low, "high": figure.high}
    return result if figure.value is not None else result | {"note": figure.note}

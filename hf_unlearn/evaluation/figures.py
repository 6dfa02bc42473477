"""What a metric says of a whole set: a value that carries its number of rows and its uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


RESAMPLES = 2000
NOT_FINITE = "rows are not finite numbers"


@dataclass(frozen=True)
class Figure:
    """
    One figure.

    Args:
        value (`float` or `None`): The figure; `None` where it could not be computed, and `note` says why.
        n (`int`): Number of rows behind it.
        low, high (`float`, *optional*): Bounds of its 95 % bootstrap interval, where it is a mean over rows.
        note (`str`, *optional*): The variant that was computed, or why none was.
    """

    value: float | None
    n: int
    low: float | None = None
    high: float | None = None
    note: str | None = None


def mean_figure(values: Sequence[float], note: str | None = None) -> Figure:
    """
    Mean of per-row values with its 95 % percentile bootstrap interval (2000 resamples of the rows, fixed seed).

    Args:
        values (sequence of `float`): One value per row. A single row has no interval.
        note (`str`, *optional*): The variant of the metric.
    """
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        return Figure(None, 0, note="not computed: no rows")
    value = float(array.mean())
    if len(array) == 1:
        return Figure(value, 1, note=note)
    if array.min() == array.max():
        return Figure(value, len(array), value, value, note)
    interval = stats.bootstrap(
        (array,), np.mean, n_resamples=RESAMPLES, method="percentile", batch=100, rng=np.random.default_rng(0)
    ).confidence_interval
    return Figure(value, len(array), float(interval.low), float(interval.high), note)


def not_computed(reason: str) -> Figure:
    """A figure that could not be computed, in words."""
    return Figure(None, 0, note=f"not computed: {reason}")

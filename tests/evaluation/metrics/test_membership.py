"""Membership scores, their AUC, and PrivLeak: by hand and by brute force."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest

from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation.metrics import (
    membership_auc,
    min_k,
    min_k_plus_plus,
    privleak,
    reference_score,
    zlib_score,
)


def test_membership_auc():
    assert membership_auc([1, 2], [3, 4]) == 1.0
    assert membership_auc([3, 4], [1, 2]) == 0.0
    assert membership_auc([1, 3], [2, 2]) == 0.5
    assert membership_auc([1], [1, 2]) == 0.75  # one tie, one win


def test_membership_auc_is_the_share_of_pairs():
    rng = np.random.default_rng(0)
    members, others = rng.integers(0, 9, 37), rng.integers(2, 12, 53)  # many ties
    pairs = [(member < other) + (member == other) / 2 for member in members for other in others]
    assert membership_auc(members, others) == pytest.approx(sum(pairs) / len(pairs), rel=1e-12)


def test_membership_auc_needs_both_sides():
    with pytest.raises(UnlearningError, match="2 forget and 0 hold-out scores"):
        membership_auc([1, 2], [])


def test_min_k():
    log_probs = [-1.0, -5.0, -2.0, -4.0, -3.0]
    assert min_k(log_probs) == pytest.approx(4.5)  # the lowest two of five
    assert min_k(log_probs, k=0.2) == pytest.approx(5.0)
    assert min_k([-0.5, -1.5]) == pytest.approx(1.5)  # int(0.8) tokens, so one
    assert min_k([]) == 0.0


def test_min_k_plus_plus_standardises_by_the_predicted_distribution():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (5, 11))
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    tokens = [3, 0, 7, 10, 2]
    mean = (np.exp(log_probs) * log_probs).sum(1)
    std = np.sqrt((np.exp(log_probs) * (log_probs - mean[:, None]) ** 2).sum(1))
    scores = sorted((log_probs[i, token] - mean[i]) / std[i] for i, token in enumerate(tokens))
    chosen = [log_probs[i, token] for i, token in enumerate(tokens)]
    assert min_k_plus_plus(chosen, mean, std) == pytest.approx(-(scores[0] + scores[1]) / 2)


def test_min_k_plus_plus_where_the_model_is_certain():
    # the variance is taken as 1e-6
    assert min_k_plus_plus([-0.002], mean=[-0.001], std=[0.0]) == pytest.approx(1.0)


def test_zlib_and_reference_scores():
    answer = "Zürich, Zürich, Zürich"
    assert zlib_score(3.0, answer) == pytest.approx(3.0 / len(zlib.compress(answer.encode("utf-8"))))
    assert reference_score(1.5, 2.0) == -0.5


def test_privleak():
    assert privleak(1.0, 0.5) == pytest.approx(-100)
    assert privleak(0.5) == 0.0
    assert privleak(0.2, 0.6) == pytest.approx(100)  # (0.8 − 0.4) / 0.4
    assert privleak(0.50375) == pytest.approx(-0.7499999998500062, rel=1e-12)  # a published log
    assert math.isfinite(privleak(0.9, 1.0))

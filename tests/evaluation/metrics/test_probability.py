"""Metrics of token log-probabilities, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hf_unlearn.evaluation.metrics import (
    answer_loss,
    exact_memorization,
    extraction_strength,
    kl_to_reference,
    normalized_probability,
    perplexity,
    probability,
)


def test_probability():
    log_probs = np.log(np.array([0.5, 0.125], np.float32))
    assert probability(log_probs) == pytest.approx(0.25)  # (0.5 · 0.125)^(1/2)
    assert answer_loss(log_probs) == pytest.approx(math.log(4))
    assert probability([-0.5]) == pytest.approx(0.6065306597126334)


def test_probability_is_computed_in_double_precision():
    log_probs = np.full(4096, -0.1, np.float16)  # whose sum is no half-precision number
    assert probability(log_probs) == pytest.approx(math.exp(float(np.float16(-0.1))), rel=1e-12)


def test_normalized_probability():
    assert normalized_probability(0.2, [0.1, 0.5]) == pytest.approx(0.25)
    assert normalized_probability(0.0, [0.0]) == 0.0
    # world facts, row 0 of a published log, whose answers are all improbable
    wrong = [7.620606083946768e-06, 6.1386131164908875e-06, 3.489175651338883e-05]
    assert normalized_probability(1.0161980981138186e-06, wrong) == pytest.approx(0.02046011427890207, rel=1e-12)


@pytest.mark.parametrize(
    ("is_top1", "em", "es"),
    [
        ("xxxx", 1.0, 1.0),
        ("-xxx", 0.75, 0.75),  # k = 1
        ("x-xx", 0.75, 0.5),  # k = 2
        ("xxx-", 0.75, 0.0),  # the last token is wrong: no prefix gives the rest
        ("----", 0.0, 0.0),
        ("x", 1.0, 1.0),
        ("-", 0.0, 0.0),
        ("", 0.0, 0.0),  # nothing but EOS
    ],
)
def test_memorization(is_top1, em, es):
    flags = np.array([mark == "x" for mark in is_top1], dtype=bool)
    assert exact_memorization(flags) == em
    assert extraction_strength(flags) == es


def test_extraction_strength_is_its_definition():
    rng = np.random.default_rng(0)
    for _ in range(200):
        flags = rng.random(rng.integers(1, 12)) < 0.8
        prefix = next(k for k in range(len(flags) + 1) if flags[k:].all())
        assert extraction_strength(flags) == pytest.approx(1 - prefix / len(flags))


def test_kl_to_reference():
    assert kl_to_reference([0.1, 0.3]) == pytest.approx(0.2)
    assert kl_to_reference([]) == 0.0


def test_perplexity_weighs_rows_by_their_tokens():
    figure = perplexity([math.log(2), math.log(16)], [3, 1])  # (2³ · 16)^(1/4)
    assert figure.value == pytest.approx(128**0.25)
    assert figure.n == 2
    assert (figure.low, figure.high) == (pytest.approx(2), pytest.approx(16))
    assert perplexity([math.log(3)], [5]).low is None
    assert perplexity([0.5, 0.5], [5, 9]).high == pytest.approx(math.exp(0.5))


def test_the_interval_of_perplexity_is_that_of_a_mean():
    losses = np.random.default_rng(1).normal(2, 0.5, 400)
    figure = perplexity(losses, np.full(400, 7))
    half = 1.96 * losses.std() / 20
    assert math.log(figure.low) == pytest.approx(losses.mean() - half, abs=half / 10)
    assert math.log(figure.high) == pytest.approx(losses.mean() + half, abs=half / 10)


def test_perplexity_that_no_number_can_hold():
    assert perplexity([1e4, 1.0], [3, 3]).value is None
    assert "above 700 nats" in perplexity([1e4, 1.0], [3, 3]).note
    assert perplexity([], []).note == "not computed: no answer tokens"

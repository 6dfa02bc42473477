"""Truth ratio, forget quality and model utility: by hand and against a published log."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation.metrics import (
    closer_to_1,
    forget_quality,
    model_utility,
    probability_mean,
    true_better,
    truth_ratio,
)


# Truth ratios of the 40 rows of TOFU's forget01 in open-unlearning's logs of Llama-3.2-1B-Instruct: of the model
# trained on all rows, and of the one retrained without forget01.
FULL = [
    *(0.53278, 0.21146, 0.72231, 1.15862, 0.34664, 0.16858, 0.42014, 0.23852, 0.93676, 0.14470, 0.61200, 0.78879),
    *(0.52783, 0.84182, 0.64580, 0.42261, 0.17005, 0.90622, 0.28674, 0.34117, 0.46927, 1.44160, 1.08434, 0.44214),
    *(0.30981, 0.24323, 0.09084, 0.14244, 0.76042, 0.77827, 0.26942, 0.59675, 0.27767, 0.48435, 0.56344, 0.35046),
    *(0.19931, 0.29609, 0.34236, 0.54988),
]
RETRAINED = [
    *(0.90236, 0.19873, 0.65169, 1.29913, 0.83097, 2.84962, 0.55491, 1.01661, 0.98856, 0.22015, 0.88204, 0.92974),
    *(0.76115, 0.92991, 1.19705, 0.42445, 0.19430, 0.96242, 1.05488, 0.43830, 1.28595, 2.16613, 1.41981, 0.60301),
    *(1.21146, 0.57027, 0.35582, 0.29394, 0.92567, 1.23870, 0.34839, 0.78759, 0.43063, 0.76134, 0.81565, 0.58445),
    *(0.33840, 0.52780, 0.41113, 0.97620),
]


def test_truth_ratio():
    assert truth_ratio(1.0, [2.0, 4.0]) == pytest.approx(math.exp(-2))  # exp(−3) / exp(−1)
    assert truth_ratio(3.0, [1.0]) == pytest.approx(math.exp(2))
    # forget01, row 0 of the published log
    wrong = [2.922283172607422, 3.6635444164276123, 3.211350202560425, 3.0135536193847656, 3.474201202392578]
    assert truth_ratio(2.627347946166992, wrong) == pytest.approx(0.5327843262480526, rel=1e-12)
    assert truth_ratio(1000.0, [1000.0]) == 0.0


def test_aggregates():
    ratios = [0.5, 2.0, 4.0, 1.0]
    assert closer_to_1(ratios).value == pytest.approx((0.5 + 0.5 + 0.25 + 1) / 4)
    assert true_better(ratios).value == pytest.approx(0.5 / 4)
    assert probability_mean(ratios).value == pytest.approx((2 / 3 + 1 / 3 + 1 / 5 + 1 / 2) / 4)
    assert closer_to_1([0.0, math.inf]).value == 0.0
    for variant in (closer_to_1, true_better, probability_mean):
        figure = variant(ratios)
        assert figure.n == 4
        assert figure.low < figure.value < figure.high
        assert figure.note.startswith(f"{variant.__name__}: mean ")


def test_published_truth_ratio_of_forget01():
    assert closer_to_1(FULL).value == pytest.approx(0.47275169797934485, abs=1e-5)  # the digits above
    assert closer_to_1(RETRAINED).value < 1 < max(RETRAINED)


def test_published_forget_quality_of_forget01():
    assert forget_quality(FULL, RETRAINED) == pytest.approx(0.006760732303569208, rel=1e-12)
    assert forget_quality(RETRAINED, FULL) == pytest.approx(0.006760732303569208, rel=1e-12)


def test_forget_quality_by_hand():
    # one of two samples of 3 lies wholly above the other: 2 of the 20 ways to draw them
    assert forget_quality([1, 2, 3], [4, 5, 6]) == pytest.approx(0.1)


def test_the_same_file_on_both_sides_is_an_error():
    with pytest.raises(UnlearningError, match="the same model or file on both sides"):
        forget_quality(FULL, np.array(FULL))


def test_model_utility():
    assert model_utility([1.0, 0.5, 0.25]) == pytest.approx(3 / 7)
    assert model_utility([0.9, 0.0]) == 0.0
    published = [  # Llama-3.2-1B-Instruct: retain, real authors, world facts
        *(0.8706601643562317, 0.7932626474213142, 0.5179621870037618),
        *(0.4135646438190353, 0.797, 0.5273262603457551),
        *(0.43633082577309573, 0.827920227920228, 0.6201053693945934),
    ]
    assert model_utility(published) == pytest.approx(0.5991534707368931, rel=1e-12)

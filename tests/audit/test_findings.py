"""The rules at their edges, the intervals, and the words."""

from __future__ import annotations

import numpy as np
import pytest

from hf_unlearn.audit import AuditOptions
from hf_unlearn.audit.findings import Measurement, auc_figure, compare, difference, in_words, verdict_of
from hf_unlearn.audit.membership import judge_auc
from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation.figures import Figure


@pytest.mark.parametrize(
    ("attacked", "outcome"),
    [
        ([0.75] * 4, "leaks"),  # half of what .5 leaves to 1 is .25
        ([0.7499] * 4, "holds"),
        ([0.5] * 4, "holds"),
        ([0.0] * 4, "holds"),
        ([1.0, 1.0, 1.0, 0.0], "unclear"),  # .25 more, by three rows of four
        ([0.75], "unclear"),  # a single row has no interval
        ([float("nan")] * 4, "unclear"),
    ],
)
def test_the_rule_at_its_edges(attacked, outcome):
    found = compare("v", "probability", attacked, [0.5] * len(attacked), "hold-out rows", margin=0.5, paired=True)
    assert (found.outcome, found.needed) == (outcome, 0.25)


def test_nothing_can_be_gained_over_certainty():
    assert compare("v", "probability", [1.0, 1.0], [1.0, 1.0], "the base", margin=0.1, paired=True).outcome == "holds"


@pytest.mark.parametrize(
    ("auc", "low", "high", "outcome"),
    [
        (0.625, 0.51, 0.7, "holds"),  # not further than the tolerance
        (0.626, 0.51, 0.7, "leaks"),
        (0.626, 0.5, 0.7, "unclear"),
        (0.374, 0.3, 0.49, "leaks"),  # less likely than rows never seen
        (0.374, 0.3, 0.5, "unclear"),
        (0.9, None, None, "unclear"),
    ],
)
def test_the_rule_of_the_auc(auc, low, high, outcome):
    assert judge_auc("loss", Figure(auc, 20, low, high), 0.5, "no difference", 0.125).outcome == outcome


def test_pairs_are_resampled_together():
    """Rows differ much from each other, and each by exactly .1 from itself."""
    rows = np.linspace(0, 0.9, 10)
    paired, unpaired = (difference(rows + 0.1, rows, paired=paired) for paired in (True, False))
    assert paired.low == pytest.approx(0.1) and paired.high == pytest.approx(0.1)
    assert unpaired.value == pytest.approx(0.1) and unpaired.low < 0 < unpaired.high


def test_interval_of_two_sets():
    """Against a bootstrap by hand, with another generator."""
    generator = np.random.default_rng(7)
    first, second = generator.uniform(0.4, 1, 30), generator.uniform(0, 0.8, 20)
    means = generator.choice(first, (20_000, 30)).mean(1) - generator.choice(second, (20_000, 20)).mean(1)
    figure = difference(first, second, paired=False)
    assert figure.n == 50
    np.testing.assert_allclose([figure.low, figure.high], np.quantile(means, [0.025, 0.975]), atol=0.01)


def test_auc_counts_pairs():
    members, others = [1.0, 2.0, 2.0], [2.0, 3.0, 0.5, 2.5]
    won = sum((a < b) + 0.5 * (a == b) for a in members for b in others)
    figure = auc_figure(members, others)
    assert figure.value == pytest.approx(won / 12)
    assert figure.low <= figure.value <= figure.high


def test_words_name_the_worst_variant():
    def found(variant: str, value: float):
        return compare(variant, "probability", [value] * 2, [0.25] * 2, "hold-out rows", margin=0.1, paired=False)

    comparisons = [found("8 bits", 0.5), found("4 bits", 0.75), found("as it is", 0.25)]
    assert verdict_of(comparisons) == "leaks"
    assert in_words(comparisons) == (
        "Answer probability of the forget rows 0.750 (4 bits), hold-out rows 0.250, more by 0.500 (95 % interval of the "
        "difference 0.500 to 0.500); a difference of 0.075 or more leaks."
    )
    assert "it would take a difference of 0.075" in in_words([found("4 bits", 0.2)])
    assert in_words([]) == "Measured only: there is nothing to compare with."


def test_values_by_place():
    measurement = Measurement("v", "forget", [4, 1, 7], {"probability": [0.4, 0.1, 0.7]})
    assert measurement.at("probability", [7, 4]) == [0.7, 0.4]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"attacks": ("relearning", "guessing")}, "'guessing'.*relearning"),
        ({"attacks": ()}, "none"),
        ({"relearn_steps": 0}, "relearn_steps.*1 or more"),
        ({"margin": 0.0}, "margin"),
        ({"relearn_share": 1.0}, "relearn_share"),
        ({"auc_tolerance": 0.5}, "auc_tolerance"),
        ({"relearn_learning_rate": 0.0}, "relearn_learning_rate"),
        ({"prefix_shares": (0.5, 1.0)}, "prefix_shares"),
        ({"reverse_steps": (float("inf"),)}, "reverse_steps"),
        ({"system_prompt": " "}, "system_prompt"),
    ],
)
def test_refuses_options_out_of_range(options, named):
    with pytest.raises(UnlearningError, match=named):
        AuditOptions(**options)

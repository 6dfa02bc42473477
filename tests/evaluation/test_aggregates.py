"""Figures from columns, by hand."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
from scipy import stats

from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation.aggregates import question_figures
from hf_unlearn.evaluation.results import Evaluation


def custom() -> Evaluation:
    """Sets of one's own, without wrong answers."""
    forget = {
        "row": [0, 1, 2],
        "num_tokens": [2, 3, 5],
        "loss": [1.0, 2.0, 3.0],
        "probability": [math.exp(-1), math.exp(-2), math.exp(-3)],
        "exact_memorization": [1.0, 0.5, 0.0],
        "extraction_strength": [1.0, 0.0, 0.0],
        "rouge_1_recall": [1.0, 1.0, 1.0],
        "rouge_l_recall": [1.0, 0.5, 0.0],
        "rouge_l_f1": [0.5, 0.5, 0.5],
        "zlib_score": [0.1, 0.2, 0.3],
        "min_k_score": [2.0, 4.0, 6.0],
        "refusal": [0, 1, 1],
        "degenerate": [0, 0, 1],
    }
    holdout = {"row": [5, 7], "loss": [2.0, 4.0], "zlib_score": [0.3, 0.4], "min_k_score": [5.0, 7.0]}
    retain = {"row": [0, 1], "probability": [0.8, 0.6], "kl": [0.01, 0.03], "num_tokens": [4, 4], "loss": [0.2, 0.4]}
    return Evaluation("custom", rows={"forget": forget, "retain": retain, "holdout": holdout})


def retrained() -> Evaluation:
    """The same rows in another order."""
    forget = {"row": [2, 0, 1], "loss": [3.5, 2.0, 2.5], "min_k_score": [6.0, 4.0, 8.0]}
    holdout = {"row": [7, 5], "loss": [4.0, 2.25], "min_k_score": [7.0, 5.0]}
    return Evaluation("custom", rows={"forget": forget, "holdout": holdout})


def with_truth_ratios(*ratios: float) -> Evaluation:
    return Evaluation("tofu", rows={"forget": {"row": list(range(len(ratios))), "truth_ratio": list(ratios)}})


def tofu() -> Evaluation:
    kept = {"row": [0, 1], "rouge_l_recall": [0.4, 0.6], "truth_ratio": [0.5, 2.0]}
    return Evaluation(
        "tofu",
        rows={
            "forget": {"row": [0, 1], "truth_ratio": [0.5, 4.0]},
            "retain": kept | {"probability": [0.9, 0.7]},
            "real_authors": kept | {"probability": [0.1, 0.1], "normalized_probability": [0.5, 0.3]},
            "world_facts": kept | {"probability": [0.1, 0.1], "normalized_probability": [0.2, 0.2]},
        },
    )


def test_sets_of_ones_own():
    figures = question_figures(custom(), None)
    values = {name: figure.value for name, figure in figures.items()}
    expected = {
        "forget_quality": None,
        "membership_auc_loss": 4.5 / 6,  # pairs: 1 < 2, 4; 2 = 2, 2 < 4; 3 < 4
        "membership_auc_zlib": 5.5 / 6,
        "membership_auc_min_k": 5 / 6,
        "privleak": 100 * (0.5 - 5 / 6) / 0.5,
        "forget_probability": (math.exp(-1) + math.exp(-2) + math.exp(-3)) / 3,
        "forget_rouge_l_recall": 0.5,
        "forget_rouge_l_f1": 0.5,
        "forget_exact_memorization": 0.5,
        "forget_extraction_strength": 1 / 3,
        "forget_perplexity": math.exp((2 * 1 + 3 * 2 + 5 * 3) / 10),
        "forget_refusal_rate": 2 / 3,
        "forget_degenerate_rate": 1 / 3,
        "retain_probability": 0.7,
        "retain_kl": 0.02,
        "retain_perplexity": math.exp(0.3),
    }
    assert values == pytest.approx(expected)
    assert figures["forget_quality"].note == "not computed: no retrained log"
    assert figures["membership_auc_loss"].n == 5
    assert figures["privleak"].note == "against an AUC of 0.5: no retrained log"
    assert (figures["forget_probability"].n, figures["retain_kl"].n) == (3, 2)
    assert figures["retain_kl"].low == pytest.approx(0.01)
    assert figures["retain_kl"].high == pytest.approx(0.03)


def test_against_a_retrained_model():
    figures = question_figures(custom(), retrained())
    # loss − retrained loss: forget −1, −0.5, −0.5 and hold-out −0.25, 0
    assert figures["membership_auc_reference"].value == 1.0
    # AUC of min-k: 5/6, and 4/6 of the retrained model (pairs: 6 < 7; 4 < 5, 7; 8 below none: 3 of 6)
    assert figures["privleak"].value == pytest.approx(100 * ((1 - 5 / 6) - 0.5) / 0.5)
    assert figures["privleak"].note == "against the retrained model's AUC of 0.5"
    assert figures["forget_quality"].note.startswith("not computed: no truth ratios of the forget set")


def test_the_scores_of_a_log_come_before_recomputed_ones():
    evaluation = custom()
    evaluation.rows["forget"]["reference_score"] = [1.0, 1.0, 1.0]
    evaluation.rows["holdout"]["reference_score"] = [0.0, 0.0]
    assert question_figures(evaluation, retrained())["membership_auc_reference"].value == 0.0


def test_tofu():
    figures = question_figures(tofu(), None)
    assert figures["forget_truth_ratio"].value == pytest.approx((0.5 + 0.25) / 2)
    assert figures["forget_truth_ratio"].note.startswith("closer_to_1")
    assert figures["retain_truth_ratio"].value == pytest.approx(0.25)
    assert figures["retain_truth_ratio"].note.startswith("true_better")
    values = [0.8, 0.5, 0.25, 0.4, 0.5, 0.25, 0.2, 0.5, 0.25]
    assert figures["model_utility"].value == pytest.approx(9 / sum(1 / value for value in values))
    assert figures["model_utility"].n == 6


def test_model_utility_says_what_is_missing():
    evaluation = tofu()
    del evaluation.rows["real_authors"]["normalized_probability"]
    del evaluation.rows["world_facts"]
    figure = question_figures(evaluation, None)["model_utility"]
    assert figure.value is None
    assert "real_authors_normalized_probability, world_facts_normalized_probability" in figure.note


def test_forget_quality():
    figure = question_figures(with_truth_ratios(1, 2, 3), with_truth_ratios(4, 5, 6))["forget_quality"]
    assert (figure.value, figure.n) == (pytest.approx(0.1), 3)
    figure = question_figures(with_truth_ratios(1, 2, 3), Evaluation("tofu"))["forget_quality"]
    assert figure.note == "not computed: no truth ratios of the forget set in the retrained log"
    with pytest.raises(UnlearningError, match="same model or file"):
        question_figures(with_truth_ratios(1, 2, 3), with_truth_ratios(1, 2, 3))


def test_rows_without_a_value_are_left_out():
    evaluation = with_truth_ratios(0.5, 0.25, 7.0)
    evaluation.rows["forget"]["truth_ratio"][2] = None
    figures = question_figures(evaluation, with_truth_ratios(0.3, 0.6, 0.9))
    assert (figures["forget_truth_ratio"].value, figures["forget_truth_ratio"].n) == (pytest.approx(0.375), 2)
    assert figures["forget_quality"].value == pytest.approx(stats.ks_2samp([0.5, 0.25], [0.3, 0.6, 0.9]).pvalue)
    assert figures["forget_quality"].n == 2


def test_values_that_are_no_numbers_give_no_figure():
    evaluation = custom()
    evaluation.rows["forget"]["loss"][1] = math.nan
    evaluation.rows["forget"]["probability"][1] = math.nan
    figures = question_figures(evaluation, None)
    for name in ("forget_probability", "forget_perplexity"):
        assert figures[name].value is None
        assert figures[name].note == "not computed: 1 of 3 rows are not finite numbers"
    assert figures["membership_auc_loss"].note == "not computed: 1 of 5 rows are not finite numbers"
    assert figures["membership_auc_min_k"].value is not None


@pytest.mark.parametrize("name", ["forget", "holdout"])
def test_a_log_of_another_split_is_refused(name):
    other = retrained()
    other.rows[name] = {column: values * 2 for column, values in other.rows[name].items()}
    count = len(custom().rows[name]["row"])
    message = f"{name} set: {count} rows were evaluated, and the retrained log has {2 * count}. .*another split"
    with pytest.raises(UnlearningError, match=message):
        question_figures(custom(), other)


def test_other_rows_of_the_same_number_are_refused():
    other = retrained()
    other.rows["forget"]["row"] = [2, 0, 9]
    with pytest.raises(UnlearningError, match="has 3; 1 of the ids are not in the log"):
        question_figures(custom(), other)


def test_other_answers_under_the_same_ids_are_refused():
    evaluation, other = custom(), retrained()
    evaluation.rows["forget"]["ground_truth"] = ["In Lima .", "In Rome.", "In Oslo."]
    other.rows["forget"]["ground_truth"] = ["In Oslo.", "In Lima.", "In Rome."]  # but for spaces, the same
    question_figures(evaluation, other)
    other.rows["forget"]["ground_truth"][1] = "In Riga."
    with pytest.raises(
        UnlearningError, match=r"row 0: the answer is 'In Lima \.' here and 'In Riga\.' in the retrained"
    ):
        question_figures(evaluation, other)


def test_turns_of_one_conversation_are_compared_in_their_order():
    evaluation = custom()
    evaluation.rows["forget"]["row"] = [0, 0, 1]
    other = deepcopy(evaluation)
    other.rows["forget"]["loss"] = [1.5, 2.5, 3.5]
    other.rows["holdout"]["loss"] = [2.25, 4.25]
    assert question_figures(evaluation, other)["membership_auc_reference"].value == 1.0

"""The rules that choose α, on curves drawn by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from hf_unlearn import UnlearningError
from hf_unlearn.evaluation import Evaluation, Figure, choose_alpha, collapse
from hf_unlearn.evaluation.figures import not_computed
from hf_unlearn.evaluation.selection import _median_truth_ratio, trade_off


SPREAD = np.linspace(0, 0.9, 10)
HOLDOUT_LOSSES = 1.1 + SPREAD


class Drawn:
    """
    Losses, truth ratios and utility follow given functions of α.

    Forget losses are `loss(α)` … `loss(α)` + 0.9 over ten rows, those of the hold-out rows 1.1 … 2.
    """

    def __init__(self, loss=None, utility=lambda alpha: 1.0, ratio=None, holdout=True, generated=False, log=None):
        self.loss, self.utility, self.ratio, self.holdout, self.generated = loss, utility, ratio, holdout, generated
        self.protocol = SimpleNamespace(
            name="drawn",
            utility="model_utility" if generated else "retain_probability",
            forgetting="forget_probability",
            sets={"holdout": None} if holdout else {},
        )
        self.degenerate = lambda alpha: 0.0
        self.retrained = log
        self.calls: list[tuple[float, bool]] = []

    def evaluate(self, alpha: float, generate: bool) -> Evaluation:
        self.calls.append((alpha, generate))
        evaluation = Evaluation("drawn", alpha, rows={"forget": {}})
        figures = evaluation.figures
        if generate:
            figures["forget_degenerate_rate"] = Figure(self.degenerate(alpha), 10)
        value = self.utility(alpha) if generate or not self.generated else None
        figures[self.protocol.utility] = Figure(value, 10, note=None if value is not None else "not computed: missing")
        if self.loss is not None:
            losses = self.loss(alpha) + SPREAD
            evaluation.rows["forget"]["loss"] = list(losses)
            figures["forget_probability"] = Figure(float(np.exp(-losses).mean()), 10)
            if self.holdout:
                evaluation.rows["holdout"] = {"loss": list(HOLDOUT_LOSSES)}
                auc = np.mean([(a < b) + 0.5 * (a == b) for a in losses for b in HOLDOUT_LOSSES])
                figures["membership_auc_loss"] = Figure(float(auc), 20)
        if self.ratio is None:
            figures["forget_quality"] = not_computed("no retrained log")
        else:
            ratios = self.ratio(alpha) + SPREAD
            evaluation.rows["forget"]["truth_ratio"] = list(ratios)
            p_value = stats.ks_2samp(ratios, self.retrained.rows["forget"]["truth_ratio"]).pvalue
            figures["forget_quality"] = Figure(float(p_value), 10)
        return evaluation

    @property
    def alphas(self) -> list[float]:
        return [alpha for alpha, _ in self.calls]


def grown(alpha: float) -> float:
    """Forget rows reach the losses of the hold-out rows at α = 1.1 / 0.44 = 2.5."""
    return 0.44 * alpha


class TestMatchHoldout:
    def test_it_finds_the_crossing(self):
        drawn = Drawn(grown, lambda alpha: 1 - 0.01 * alpha)
        choice = choose_alpha(drawn, refinements=5)
        assert choice.met
        assert choice.alpha == pytest.approx(2.5, abs=0.07)
        assert max(drawn.alphas) == 4.0  # 8 is not evaluated once forgetting has gone too far
        assert (choice.target, choice.utility) == ("membership_auc_loss", "retain_probability")
        assert (choice.auc_tolerance, choice.min_utility) == (0.1, 0.95)
        assert choice.rule == (
            "match-holdout: membership AUC of forget against hold-out rows nearest 0.5 (within 0.1), "
            "retain probability at least 95% of the reference's"
        )
        assert choice.verdict.startswith(f"α = {choice.alpha:g}: membership AUC of forget against hold-out rows 0.")
        assert "(reference 0.99)" not in choice.verdict  # at α = 0 all forget rows are likelier than all others
        assert "(reference 1.00)" in choice.verdict
        assert choice.verdict.endswith("Forget rows look like rows the model never saw.")

    def test_the_evidence_is_every_alpha_tried(self):
        drawn = Drawn(grown, lambda alpha: 1 - 0.02 * alpha)
        choice = choose_alpha(drawn, [1, 4], refinements=1)
        assert [entry["alpha"] for entry in choice.evidence] == [0.0, 1, 2.5, 4]
        for entry in choice.evidence:
            assert entry["utility"] == entry["utility_share"] == pytest.approx(1 - 0.02 * entry["alpha"])
            assert entry["within_budget"] == (entry["alpha"] < 2.5 + 1e-9)
        assert [entry["membership_auc_loss"] for entry in choice.evidence][:3] == pytest.approx(
            [1.0, 0.92, 0.5], abs=0.03
        )
        assert choice.evidence[0]["remark"] == ""
        assert "over-forgotten: membership AUC 0.0" in choice.evidence[3]["remark"]
        assert choice.to_dict()["evidence"] == choice.evidence

    def test_a_budget_that_breaks_first_is_not_met(self):
        choice = choose_alpha(Drawn(grown, lambda alpha: 1 - 0.04 * alpha), refinements=6)  # 95 % at α = 1.25
        assert not choice.met
        assert choice.alpha == pytest.approx(1.25, abs=0.03)
        assert "Forget rows still stand out, and a larger α breaks the utility budget" in choice.verdict

    def test_a_grid_that_ends_too_early_says_so(self):
        choice = choose_alpha(Drawn(lambda alpha: 0.1 * alpha), [1, 2])
        assert (choice.alpha, choice.met) == (2, False)
        assert "not in the grid" in choice.verdict

    def test_over_forgetting_is_not_met(self):
        """Nothing lies between all likelier and all less likely, and the reference is as far from 0.5 as the rest."""
        choice = choose_alpha(Drawn(lambda alpha: -9.0 if alpha < 0.3 else 3.0), refinements=3)
        assert not choice.met
        assert choice.alpha > 0.3
        assert choice.verdict.endswith("over-forgotten.")

    def test_no_alpha_within_the_budget(self):
        choice = choose_alpha(Drawn(grown, lambda alpha: 1.0 if alpha == 0 else 0.5), refinements=3)
        assert (choice.alpha, choice.met) == (0.0, False)
        assert "No α within the utility budget brings forget rows nearer to rows never seen." in choice.verdict

    def test_a_reference_that_knows_nothing_of_the_forget_rows_is_no_success(self):
        choice = choose_alpha(Drawn(lambda alpha: 1.1 + alpha), [1])  # AUC 0.5 at α = 0
        assert (choice.alpha, choice.met) == (0.0, False)

    def test_it_needs_hold_out_rows(self):
        with pytest.raises(UnlearningError, match=r"match-holdout needs hold-out rows.*Pass a hold-out set"):
            choose_alpha(Drawn(grown, holdout=False), rule="match-holdout")

    @pytest.mark.parametrize(("tolerance", "met"), [(0.3, True), (0.1, False)])
    def test_the_tolerance_decides_what_is_met(self, tolerance, met):
        # losses 0.8 … 1.7 against 1.1 … 2: of 100 pairs, 7 are equal and in 21 the forget row is above: AUC 0.755
        choice = choose_alpha(Drawn(lambda alpha: 0.8 * min(alpha, 1)), [1], auc_tolerance=tolerance)
        assert (choice.alpha, choice.met) == (1, met)


class TestMatchRetrain:
    # truth ratios of the retrained model: 0.5 … 1.4; those of the forget rows reach them at α = 2
    LOG = Evaluation("drawn", rows={"forget": {"truth_ratio": list(0.5 + SPREAD)}})

    def test_it_finds_the_largest_forget_quality(self):
        drawn = Drawn(lambda alpha: 0.01 * alpha, ratio=lambda alpha: 0.251 * alpha - 1e-3, log=self.LOG)
        choice = choose_alpha(drawn, refinements=4)
        assert choice.met
        assert choice.alpha == pytest.approx(2.0, abs=0.25)
        assert choice.target == "forget_quality"
        assert choice.auc_tolerance is None
        assert choice.rule.startswith("match-retrain: the largest forget quality")
        assert choice.verdict.endswith("cannot be told from the retrained model's.")
        best = max(choice.evidence, key=lambda entry: entry["forget_quality"])
        assert (
            best["forget_quality"] == next(e for e in choice.evidence if e["alpha"] == choice.alpha)["forget_quality"]
        )
        assert 8 not in drawn.alphas

    def test_still_told_apart(self):
        ratio = lambda alpha: -3 + 0.1 * alpha  # noqa: E731
        choice = choose_alpha(Drawn(ratio=ratio, log=self.LOG, loss=grown), [1, 2], rule="match-retrain")
        assert not choice.met
        # All α give the same p-value, that of samples which do not overlap: the reference stays
        assert choice.alpha == 0
        assert choice.verdict.endswith("nearer to the retrained model than the reference.")
        some = choose_alpha(Drawn(ratio=lambda alpha: -0.55 + 0.1 * alpha, log=self.LOG), [1, 2])
        assert (some.alpha, some.met) == (2, False)
        assert some.verdict.endswith("Still told apart from the retrained model (p ≤ 0.05).")

    @pytest.mark.parametrize(
        ("ratios", "p_value", "alpha"),
        [
            # of ten against ten rows 0.1 apart: all shifts between 0.2 and 0.3 leave three without a partner, D = 0.3
            ({0: -3, 1: 0.22, 2: 0.27, 3: 0.29}, 0.7869, 3),
            ({0: -3, 1: 0.42, 2: 0.53, 3: 0.58}, 1.0, 2),  # D = 0.1 for 0.08 too low, 0.03 and 0.08 too high
        ],
    )
    def test_of_equal_qualities_the_nearer_truth_ratios_decide(self, ratios, p_value, alpha):
        choice = choose_alpha(Drawn(ratio=ratios.get, log=self.LOG), [1, 2, 3], rule="match-retrain", refinements=0)
        tried = [entry["forget_quality"] for entry in choice.evidence[1:]]
        assert tried == [pytest.approx(p_value, abs=1e-4)] * len(tried) and len(tried) > 1
        assert choice.alpha == alpha

    def test_the_budget_bounds_it(self):
        drawn = Drawn(ratio=lambda alpha: 0.25 * alpha, log=self.LOG, utility=lambda alpha: 1 - 0.05 * alpha)
        choice = choose_alpha(drawn, refinements=5)
        assert choice.alpha == pytest.approx(1.0, abs=0.04)

    def test_it_needs_a_log(self):
        with pytest.raises(UnlearningError, match=r"match-retrain.*no retrained log.*Pass a retrained model's log"):
            choose_alpha(Drawn(grown), rule="match-retrain")


class TestUtilityBudget:
    def test_the_largest_alpha_within_it(self):
        drawn = Drawn(grown, lambda alpha: 1 - 0.02 * alpha, holdout=False)  # 95 % at α = 2.5
        choice = choose_alpha(drawn, refinements=6)
        assert choice.met
        assert choice.alpha == pytest.approx(2.5, abs=0.05)
        assert (choice.target, choice.auc_tolerance) == ("", None)
        assert choice.rule.startswith("utility-budget: the largest α")
        assert choice.verdict.endswith(
            "With nothing to compare with, nobody can say whether that is forgotten or over-forgotten."
        )
        assert "Forget probability 0.664 → " in choice.verdict  # (1 − e⁻¹) / 10 (1 − e⁻⁰·¹)

    def test_another_budget(self):
        drawn = Drawn(grown, lambda alpha: 1 - 0.1 * alpha)
        choice = choose_alpha(drawn, rule="utility-budget", min_utility=0.7, refinements=6)
        assert choice.alpha == pytest.approx(3.0, abs=0.05)
        assert choice.rule.endswith("at least 70% of the reference's")
        assert "With nothing to compare with" not in choice.verdict  # there are some

    def test_it_is_not_met_where_nothing_is_forgotten(self):
        choice = choose_alpha(Drawn(lambda alpha: 1.0 - 0.01 * alpha, holdout=False))
        assert (choice.alpha, choice.met) == (8, False)

    def test_no_alpha_within_it(self):
        choice = choose_alpha(Drawn(grown, lambda alpha: float(alpha == 0), holdout=False), [1], refinements=2)
        assert (choice.alpha, choice.met) == (0.0, False)


def test_the_rule_is_the_first_that_the_data_allow():
    log = TestMatchRetrain.LOG
    names = [
        choose_alpha(drawn, [1], refinements=0).rule.split(":")[0]
        for drawn in (Drawn(grown, ratio=grown, log=log), Drawn(grown), Drawn(grown, holdout=False))
    ]
    assert names == ["match-retrain", "match-holdout", "utility-budget"]


def test_an_unknown_rule():
    with pytest.raises(UnlearningError, match=r"'lowest'.*match-retrain, match-holdout, utility-budget"):
        choose_alpha(Drawn(grown), rule="lowest")


@pytest.mark.parametrize("generated", [False, True])
def test_answers_are_generated_only_where_the_utility_needs_them(generated):
    drawn = Drawn(grown, lambda alpha: 1 - 0.01 * alpha, generated=generated)
    choice = choose_alpha(drawn, [1, 4], refinements=1)
    assert choice.utility == ("model_utility" if generated else "retain_probability")
    assert {generate for alpha, generate in drawn.calls if alpha > 0} == {generated}


@pytest.mark.parametrize(("value", "words"), [(None, "not computed: missing"), (0.0, "0")])
def test_a_reference_without_utility(value, words):
    with pytest.raises(UnlearningError, match=rf"utility budget is of model_utility, which at α = 0 is {words}\."):
        choose_alpha(Drawn(grown, lambda alpha: value, generated=True))


def test_an_alpha_whose_utility_cannot_be_computed_is_outside_the_budget():
    choice = choose_alpha(Drawn(grown, lambda alpha: 1.0 if alpha < 1 else None), [0.5, 1, 2], refinements=0)
    assert choice.alpha == 0.5
    assert [entry["within_budget"] for entry in choice.evidence] == [True, True, False]


class TestCollapse:
    def of(self, utility="model_utility", before=0.6, **values):
        def make(figures):
            return Evaluation("drawn", figures={name: Figure(value, 10) for name, value in figures.items()})

        return collapse(make(values), make({"model_utility": before}), utility)

    @pytest.mark.parametrize(
        ("values", "words"),
        [
            ({"model_utility": 0.6}, None),
            ({"model_utility": 0.3}, None),  # half is not below half
            ({"model_utility": 0.15}, "collapsed: model_utility 0.150, 25% of the reference's"),
            ({"model_utility": None}, None),
            ({"retain_degenerate_rate": 0.5}, None),
            ({"retain_degenerate_rate": 0.75}, "collapsed: 75% of the retain answers are no text"),
            ({"real_authors_degenerate_rate": None}, None),
            ({"membership_auc_loss": 0.25}, None),
            (
                {"membership_auc_loss": 0.125},
                "over-forgotten: membership AUC 0.12, forget rows stand out as unlikely",
            ),
            (
                {"model_utility": 0.15, "forget_degenerate_rate": 1.0},
                "collapsed: model_utility 0.150, 25% of the reference's; "
                "collapsed: 100% of the forget answers are no text",
            ),
        ],
    )
    def test_words_and_thresholds(self, values, words):
        assert self.of(**values) == words

    def test_without_a_reference_or_a_name_utility_says_nothing(self):
        evaluation = Evaluation("drawn", figures={"model_utility": Figure(0.0, 10)})
        assert collapse(evaluation) is None
        assert self.of(utility="", model_utility=0.0) is None
        assert self.of(before=0.0, model_utility=0.0) is None


@pytest.mark.parametrize(
    ("auc", "utility", "expected"),
    [
        (0.5, 0.8, 1.0),
        (0.5, 1.6, 1.0),  # more than the reference's counts as all of it
        (0.5, 0.4, 2 / 3),  # of 1/2 and 1
        (0.75, 0.8, 2 / 3),  # of 1 and 1/2
        (0.25, 0.8, 2 / 3),  # standing out as unlikely is as bad
        (1.0, 0.8, 0.0),
        (0.0, 0.0, 0.0),
        (None, 0.8, None),
        (0.5, None, None),
    ],
)
def test_trade_off(auc, utility, expected):
    after = Evaluation("drawn", figures={"membership_auc_loss": Figure(auc, 20), "model_utility": Figure(utility, 10)})
    before = Evaluation("drawn", figures={"model_utility": Figure(0.8, 10)})
    assert trade_off(after, before, "model_utility") == (None if expected is None else pytest.approx(expected))


class TestAChosenModelThatHasFailed:
    def test_answers_that_are_no_text_fail_the_rule_that_did_not_look_at_them(self):
        drawn = Drawn(grown, lambda alpha: 1 - 0.01 * alpha)
        drawn.degenerate = lambda alpha: 0.8 if alpha > 2 else 0.0
        unseen = choose_alpha(drawn, refinements=5)
        assert unseen.met
        choice = choose_alpha(drawn, refinements=5, generate=True)
        assert (choice.alpha, choice.met) == (unseen.alpha, False)
        assert choice.verdict.endswith("But it has failed: collapsed: 80% of the forget answers are no text.")
        assert "no text" in next(line for line in choice.evidence if line["alpha"] == choice.alpha)["remark"]
        assert [alpha for alpha, generate in drawn.calls if generate] == [choice.alpha]

    def test_figures_that_are_not_finite(self):
        before = Evaluation("drawn", 0.0, figures={"retain_probability": Figure(0.9, 10)})
        broken = not_computed("10 of 10 rows are not finite numbers")
        after = Evaluation("drawn", 8.0, figures={"retain_probability": broken})
        assert collapse(after, before, "retain_probability") == (
            "collapsed: retain_probability not computed: 10 of 10 rows are not finite numbers"
        )


class TestRulesThatCannotBeFollowed:
    @pytest.mark.parametrize(("rule", "said"), [("match-retrain", "no retrained log"), ("match-holdout", "hold-out")])
    def test_they_are_refused_before_anything_is_computed(self, rule, said):
        drawn = Drawn(grown, holdout=False)
        with pytest.raises(UnlearningError, match=said):
            choose_alpha(drawn, rule=rule)
        assert drawn.calls == []

    def test_rows_without_a_truth_ratio_are_left_out_of_the_median(self):
        evaluation = Evaluation("drawn", rows={"forget": {"truth_ratio": [None, 1.0, 2.0, 6.0]}})
        assert _median_truth_ratio(evaluation) == 2.0

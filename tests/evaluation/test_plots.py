"""What the plots draw, and where."""

from __future__ import annotations

import pytest

from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation.figures import Figure, not_computed
from hf_unlearn.evaluation.plots import (
    LEAST_P_VALUE,
    curve_panels,
    figure_label,
    figure_of,
    metric_of,
    plot_evaluations,
    plot_training,
    trade_off_panel,
)
from hf_unlearn.evaluation.results import Evaluation
from hf_unlearn.evaluation.selection import Choice


LOG = [
    {"step": step, "memorization_loss": 1 / step, "retain_kl": 0.01 * step, "forget_token_accuracy": 0.9}
    for step in (1, 2, 3)
] + [{"step": 3, "train_runtime": 12.5}]


def make_evaluation(alpha: float | None, **values: float) -> Evaluation:
    """Intervals are 0.05 to either side."""
    figures = {name: Figure(value, 40, value - 0.05, value + 0.05) for name, value in values.items()}
    return Evaluation("tofu", alpha, figures=figures)


def make_evaluations() -> list[Evaluation]:
    return [
        make_evaluation(
            0.0, forget_probability=0.9, retain_probability=0.8, membership_auc_loss=1.0, model_utility=0.6
        ),
        make_evaluation(
            2.0, forget_probability=0.3, retain_probability=0.7, membership_auc_loss=0.5, model_utility=0.5
        ),
        make_evaluation(
            1.0, forget_probability=0.6, retain_probability=0.8, membership_auc_loss=0.8, model_utility=0.6
        ),
    ]


def make_choice(alpha: float = 1.0, target: str = "membership_auc_loss", tolerance: float | None = 0.1) -> Choice:
    return Choice(
        alpha=alpha,
        met=True,
        rule="a rule",
        verdict="a verdict",
        target=target,
        utility="model_utility",
        min_utility=0.95,
        auc_tolerance=tolerance,
        evidence=[],
    )


def draw(panel):
    (axes,) = figure_of([panel]).axes
    return axes, {line.get_label(): line for line in axes.lines}


@pytest.mark.parametrize(
    ("name", "series", "metric", "label"),
    [
        ("forget_probability", "forget", "probability", "Answer probability, forget"),
        ("real_authors_normalized_probability", "real_authors", "normalized_probability", None),
        ("forget_quality", "", "forget_quality", "Forget quality"),
        ("membership_auc_min_k", "min_k", "membership_auc", "Membership AUC, min-k"),
        ("forget_truth_ratio", "forget", "truth_ratio", None),
        ("something_else", "", "something_else", "Something else"),
    ],
)
def test_names(name, series, metric, label):
    assert metric_of(name) == (series, metric)
    assert label is None or figure_label(name) == label


def test_trade_off():
    retrained = make_evaluation(None, membership_auc_loss=0.48, model_utility=0.59)
    axes, lines = draw(trade_off_panel(make_evaluations(), make_choice(), retrained))
    path = lines["Model, by α"]
    assert list(path.get_xdata()) == [0.6, 0.6, 0.5] and list(path.get_ydata()) == [1.0, 0.8, 0.5]  # in the order of α
    assert (lines["Chosen"].get_xdata()[0], lines["Chosen"].get_ydata()[0]) == (0.6, 0.8)
    assert (lines["Retrained model"].get_xdata()[0], lines["Retrained model"].get_ydata()[0]) == (0.59, 0.48)
    assert lines["Budget, 95%"].get_xdata()[0] == pytest.approx(0.95 * 0.6)
    assert list(lines["0.5: no difference"].get_ydata()) == [0.5, 0.5]
    assert {text.get_text() for text in axes.texts} == {"0", "1", "2"}
    (accepted,) = [area for area in axes.collections if area.get_label() == "Accepted"]
    corners = accepted.get_paths()[0].get_extents()
    assert (corners.y0, corners.y1) == pytest.approx((0.4, 0.6)) and corners.x0 == pytest.approx(0.57)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Model utility", "Membership AUC, loss")


@pytest.mark.parametrize(
    ("missing", "x", "y"),
    [
        ((), "Model utility", "Membership AUC, loss"),
        (("model_utility", "membership_auc_loss"), "Answer probability, retain", "Answer probability, forget"),
    ],
)
def test_trade_off_takes_the_best_there_is(missing, x, y):
    evaluations = make_evaluations()
    for evaluation in evaluations:
        for name in missing:
            evaluation.figures[name] = not_computed("no reason")
    axes, _ = draw(trade_off_panel(evaluations))
    assert (axes.get_xlabel(), axes.get_ylabel()) == (x, y)
    evaluations = [make_evaluation(each.alpha, forget_probability=0.5) for each in evaluations]
    assert trade_off_panel(evaluations) is None


def test_forget_quality_has_a_log_scale_and_the_retrained_model_is_its_best():
    evaluations = [make_evaluation(alpha, model_utility=0.6) for alpha in (0.0, 1.0)]
    evaluations[0].figures["forget_quality"] = Figure(0.0, 40)  # a p-value may underflow
    evaluations[1].figures["forget_quality"] = Figure(0.3, 40)
    retrained = make_evaluation(None, model_utility=0.59)
    axes, lines = draw(trade_off_panel(evaluations, make_choice(1.0, "forget_quality", None), retrained))
    assert axes.get_yscale() == "log"
    assert list(lines["Model, by α"].get_ydata()) == [LEAST_P_VALUE, 0.3]
    assert lines["Retrained model"].get_ydata()[0] == 1.0
    assert lines["p = 0.05"].get_ydata()[0] == 0.05
    axes.figure.canvas.draw()
    ticks = [tick.get_text() for tick in axes.get_yticklabels()]
    retrained.figures["forget_quality"] = Figure(0.5, 40)  # of itself: says nothing
    _, lines = draw(curve_panels(evaluations, None, retrained)["forget_quality"])
    assert list(lines) == ["Forget quality"]
    assert any(tick.startswith("10⁻") for tick in ticks) and not any("$" in tick for tick in ticks)


def test_labels_that_have_no_room_are_left_out_but_never_the_chosen_one():
    evaluations = [make_evaluation(0.1 * step, model_utility=0.6, forget_probability=0.5) for step in range(60)]
    axes, _ = draw(trade_off_panel(evaluations, make_choice(5.9)))
    labels = [text.get_text() for text in axes.texts]
    assert "5.9" in labels and len(labels) < 10


def test_curves_have_intervals_and_the_retrained_models_value():
    retrained = make_evaluation(None, forget_probability=0.15)
    panels = curve_panels(make_evaluations(), make_choice(), retrained)
    assert list(panels) == ["model_utility", "membership_auc", "probability"]
    axes, lines = draw(panels["probability"])
    assert list(lines["Forget"].get_xdata()) == [0, 1, 2] and list(lines["Forget"].get_ydata()) == [0.9, 0.6, 0.3]
    assert lines["Chosen, α = 1"].get_xdata()[0] == 1
    dashed = [line for line in axes.lines if line.get_linestyle() == "--" and len(line.get_ydata())]
    assert [(line.get_ydata()[0], line.get_color()) for line in dashed] == [(0.15, lines["Forget"].get_color())]
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((0.25, 0.95))
    axes, lines = draw(panels["model_utility"])
    assert lines["Budget, 95%"].get_ydata()[0] == pytest.approx(0.57)


def test_a_missing_value_is_a_gap():
    evaluations = make_evaluations()
    evaluations[2].figures["forget_probability"] = not_computed("no reason")
    _, lines = draw(curve_panels(evaluations)["probability"])
    assert lines["Forget"].get_ydata()[1] != lines["Forget"].get_ydata()[1]
    assert list(lines["Retain"].get_ydata()) == [0.8, 0.8, 0.7]


def test_plot_evaluations():
    figure = plot_evaluations(make_evaluations(), make_choice())
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["Forgetting against utility", "Model utility", "Membership AUC", "Answer probability"]
    (axes,) = plot_evaluations([make_evaluation(None, forget_probability=0.5, retain_probability=0.8)]).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["This model"]
    with pytest.raises(UnlearningError, match="nothing to plot"):
        plot_evaluations([Evaluation("tofu")])
    with pytest.raises(UnlearningError, match="no evaluation"):
        plot_evaluations([])
    with pytest.raises(UnlearningError, match="one has none"):
        plot_evaluations([make_evaluation(0.0), make_evaluation(None)])


def test_plot_training():
    loss, drift, accuracy = plot_training(LOG).axes
    assert list(loss.lines[0].get_ydata()) == [1, 1 / 2, 1 / 3]
    assert drift.get_title(loc="left") == "Drift on the retain rows"
    assert accuracy.get_ylim() == (0, 1)
    with pytest.raises(UnlearningError, match="no training metric"):
        plot_training([{"step": 1, "loss": 1.0}])

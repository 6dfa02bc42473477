"""Plots of evaluations over α and of a training run; no pyplot, so no global figures and no display."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation.figures import not_computed
from hf_unlearn.evaluation.results import Evaluation
from hf_unlearn.evaluation.selection import ALPHA_LEVEL, Choice


Panel = Callable[[Axes], None]
Point = tuple[float, float]

# Okabe-Ito: told apart under colour blindness, and mid-tones that can be read on white and on near-black.
VERMILLION, BLUE, GREEN, PURPLE, OCHRE = "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#a67c00"
INK, GRID = "#1f2630", "#c3c9d1"
CSS_VARIABLES = {VERMILLION: "--forget", BLUE: "--retain", GREEN: "--holdout", PURPLE: "--other"}
CSS_VARIABLES |= {OCHRE: "--fifth", GRID: "--grid"}
INKED = ("axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "legend.labelcolor", "text.color")
RC = dict.fromkeys((*INKED, "xtick.color", "ytick.color"), INK) | {
    "font.size": 10,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "svg.fonttype": "none",
    "svg.hashsalt": "hf_unlearn",
    "text.parse_math": False,
}

SERIES = {
    "forget": ("Forget", VERMILLION, "o"),
    "retain": ("Retain", BLUE, "s"),
    "holdout": ("Hold-out", GREEN, "^"),
    "real_authors": ("Real authors", PURPLE, "D"),
    "world_facts": ("World facts", OCHRE, "v"),
    "loss": ("Loss", VERMILLION, "o"),
    "zlib": ("Loss by zlib length", BLUE, "s"),
    "min_k": ("Min-k", GREEN, "^"),
    "min_k_plus_plus": ("Min-k++", PURPLE, "D"),
    "reference": ("Reference model", OCHRE, "v"),
    "gradnorm": ("Gradient norm", INK, "x"),
}
LEAST_P_VALUE = 1e-30  # smaller ones, 0 among them, are drawn here
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# metric: name, axis label and scale; in the order in which they are shown
METRICS = {
    "forget_quality": ("Forget quality", "p-value", "p-value"),
    "model_utility": ("Model utility", "Utility", "share"),
    "membership_auc": ("Membership AUC", "AUC", "share"),
    "probability": ("Answer probability", "Probability", "share"),
    "rouge_l_recall": ("ROUGE-L recall", "Share of the words", "share"),
    "truth_ratio": ("Truth ratio", "Truth ratio", "share"),
    "normalized_probability": ("Probability among the choices", "Probability", "share"),
    "exact_memorization": ("Exact memorisation", "Share of the tokens", "share"),
    "extraction_strength": ("Extraction strength", "Share of the tokens", "share"),
    "privleak": ("PrivLeak", "Per cent", "linear"),
    "rouge_l_f1": ("ROUGE-L F1", "F1", "share"),
    "kl": ("KL from the reference", "nats per token", "linear"),
    "perplexity": ("Perplexity", "Perplexity", "log"),
    "refusal_rate": ("Refusals", "Share of the answers", "share"),
    "degenerate_rate": ("Degenerate answers", "Share of the answers", "share"),
}
# logged value: title and axis label of its panel, name, colour and line
TRAINING = {
    "memorization_loss": ("Loss on the forget rows", "nats per token", "Memorisation loss", VERMILLION, "-"),
    "forget_loss": ("Loss on the forget rows", "nats per token", "Forget loss", VERMILLION, "-"),
    "retain_kl": ("Drift on the retain rows", "nats per token", "Retain KL", BLUE, "-"),
    "forget_token_accuracy": ("Token accuracy while memorising", "Share of the tokens", "Forget", VERMILLION, "-"),
    "retain_token_accuracy": ("Token accuracy while memorising", "Share of the tokens", "Retain", BLUE, "--"),
}
FORGETTING = ("forget_quality", "membership_auc_loss", "forget_probability")
UTILITIES = ("model_utility", "retain_probability")
RELATIVE = ("forget_quality", "privleak")  # to the retrained model, of which they say nothing


def metric_of(name: str) -> tuple[str, str]:
    """Name of a figure as its set (or attack) and its metric: `"forget_kl"` is `("forget", "kl")`."""
    for metric in sorted(METRICS, key=len, reverse=True):
        if name == metric:
            return "", metric
        if name.endswith(f"_{metric}"):
            return name.removesuffix(f"_{metric}"), metric
        if name.startswith(f"{metric}_"):
            return name.removeprefix(f"{metric}_"), metric
    return "", name


def label(name: str) -> str:
    """Name of a metric, of a set or of an attack for a reader."""
    return (METRICS.get(name) or SERIES.get(name) or (name.replace("_", " ").capitalize(),))[0]


def figure_label(name: str) -> str:
    """Name of a figure for a reader, e.g. `Answer probability, forget`."""
    series, metric = metric_of(name)
    return f"{label(metric)}, {label(series).lower()}" if series else label(metric)


def alpha_label(alpha: float) -> str:
    """An α for a reader."""
    return f"{alpha:.4g}".replace("-", "−")


def by_alpha(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """The evaluations in the order of their α; one alone needs none."""
    if not evaluations:
        raise UnlearningError("There is no evaluation to show. Evaluate the model, or the adapter at some α, first.")
    if len(evaluations) > 1 and any(evaluation.alpha is None for evaluation in evaluations):
        raise UnlearningError("Several evaluations are shown over their α, but one has none. Show that one by itself.")
    return sorted(evaluations, key=lambda evaluation: evaluation.alpha or 0.0)


def plot_evaluations(
    evaluations: Sequence[Evaluation], choice: Choice | None = None, retrained: Evaluation | None = None
) -> Figure:
    """
    The trade-off between forgetting and utility, and every metric over α with its 95 % intervals.

    Args:
        evaluations (sequence of [`Evaluation`]):
            What was evaluated; all of them are marked. Several need an α each.
        choice ([`Choice`], *optional*):
            The chosen α, marked, with the region that its rule accepts.
        retrained ([`Evaluation`], *optional*):
            The model retrained without the forget set: a star in the trade-off, dashed lines in the curves.
    """
    panels = evaluation_panels(evaluations, choice, retrained)
    if not panels:
        raise UnlearningError(
            "No evaluation has the figures of a curve or of a trade-off, so there is nothing to plot."
        )
    return figure_of(panels)


def plot_training(log_history: list[dict[str, Any]]) -> Figure:
    """
    Forget loss, retain KL and token accuracies over the optimiser steps, as far as they were logged.

    Args:
        log_history (`list[dict]`): `trainer.state.log_history`.
    """
    panels = training_panels(log_history)
    if not panels:
        raise UnlearningError("The log history has no training metric to plot. Train with a smaller logging_steps.")
    return figure_of(panels)


def figure_of(panels: Sequence[Panel]) -> Figure:
    """A figure with the panels, up to three beside each other."""
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(4.2 * columns, 3.9 * rows), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
        parts = figure.subfigures(rows, columns, squeeze=False).flat  # so that a legend narrows its own panel only
        for part, draw in zip(parts, panels, strict=False):
            draw(part.subplots())
    return figure


def evaluation_panels(
    evaluations: Sequence[Evaluation], choice: Choice | None = None, retrained: Evaluation | None = None
) -> list[Panel]:
    """The panels of [`plot_evaluations`]; none where there is nothing to draw."""
    trade_off = trade_off_panel(evaluations, choice, retrained)
    return [*([trade_off] if trade_off else []), *curve_panels(evaluations, choice, retrained).values()]


def trade_off_panel(
    evaluations: Sequence[Evaluation], choice: Choice | None = None, retrained: Evaluation | None = None
) -> Panel | None:
    """Forgetting against utility, as a path over α; `None` where either has no value."""
    evaluations = by_alpha(evaluations)
    x = _first_with_value(evaluations, (choice.utility if choice else "", *UTILITIES))
    y = _first_with_value(evaluations, (choice.target if choice else "", *FORGETTING))
    path = [each for each in evaluations if x and y and each.value(x) is not None and each.value(y) is not None]
    if not path:
        return None

    def draw(axes: Axes) -> None:
        points = [(each.value(x), _drawn(y, each.value(y))) for each in path]
        chosen = [place for place, each in enumerate(path) if choice is not None and each.alpha == choice.alpha]
        name = "Model, by α" if len(path) > 1 else "This model"
        axes.plot(*zip(*points, strict=True), color=VERMILLION, marker="o", label=name, clip_on=False, zorder=3)
        for place in chosen:
            ring = {"marker": "o", "markersize": 11, "markerfacecolor": "none", "markeredgewidth": 1.6}
            axes.plot(*points[place], color=INK, label="Chosen", linestyle="", clip_on=False, zorder=5, **ring)
        star = _star(retrained, x, y)
        if star is not None:
            style = {"marker": "*", "markersize": 14, "color": PURPLE, "label": "Retrained model"}
            axes.plot(*star, linestyle="", clip_on=False, zorder=4, **style)
        axes.margins(0.14)
        axes.locator_params("x", nbins=6)
        _scale(axes, METRICS[metric_of(y)[1]][2])
        _aim(axes, evaluations, choice, x, y)
        labels = {place: alpha_label(each.alpha) for place, each in enumerate(path) if each.alpha is not None}
        _label_points(axes, points, {place: labels[place] for place in chosen} | labels, star)
        axes.set(title="Forgetting against utility", xlabel=figure_label(x), ylabel=figure_label(y))
        _legend(axes)

    return draw


def curve_panels(
    evaluations: Sequence[Evaluation], choice: Choice | None = None, retrained: Evaluation | None = None
) -> dict[str, Panel]:
    """One panel a metric over α, for each metric that has a value; none where there is one α only."""
    evaluations = by_alpha(evaluations)
    if len(evaluations) == 1:
        return {}
    names = {name: None for each in evaluations for name in each.figures if each.value(name) is not None}

    def panel(metric: str, of_metric: list[str]) -> Panel:
        def draw(axes: Axes) -> None:
            _curves(axes, of_metric, evaluations, retrained)
            if metric == "membership_auc":
                _auc_aim(axes, choice)
            if choice is not None and choice.utility in of_metric:
                _budget(axes.axhline, evaluations, choice)
            if choice is not None:
                style = {"color": INK, "linestyle": ":", "linewidth": 1.6}
                axes.axvline(choice.alpha, label=f"Chosen, α = {alpha_label(choice.alpha)}", zorder=2, **style)
            title, unit, scale = METRICS[metric]
            _scale(axes, scale)
            axes.set(title=title, xlabel="Extrapolation strength α", ylabel=unit)
            axes.set_xlim(min(0.0, evaluations[0].alpha), evaluations[-1].alpha or 1.0)
            _legend(axes)

        return draw

    sorted_names = {metric: [name for name in names if metric_of(name)[1] == metric] for metric in METRICS}
    return {metric: panel(metric, of_metric) for metric, of_metric in sorted_names.items() if of_metric}


def training_panels(log_history: list[dict[str, Any]]) -> list[Panel]:
    """The panels of [`plot_training`], for other arrangements; those without a logged value are left out."""
    entries = [entry for entry in log_history if "step" in entry]

    def panel(title: str, unit: str, keys: list[str]) -> Panel:
        def draw(axes: Axes) -> None:
            for key in keys:
                *_, label, color, linestyle = TRAINING[key]
                logged = [(entry["step"], entry[key]) for entry in entries if key in entry]
                style = {"color": color, "linestyle": linestyle, "marker": "." if len(logged) < 40 else ""}
                axes.plot(*zip(*logged, strict=True), label=label, **style)
            axes.set(title=title, xlabel="Optimiser step", ylabel=unit)
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=min(0, axes.dataLim.y0), top=1 if unit.startswith("Share") else None)
            axes.xaxis.get_major_locator().set_params(integer=True)
            _legend(axes)

        return draw

    found = [key for key in TRAINING if any(key in entry for entry in entries)]
    panels = dict.fromkeys(TRAINING[key][:2] for key in found)
    return [panel(title, unit, [key for key in found if TRAINING[key][0] == title]) for title, unit in panels]


def _first_with_value(evaluations: Sequence[Evaluation], names: Sequence[str]) -> str | None:
    return next((name for name in names if any(each.value(name) is not None for each in evaluations)), None)


def _star(retrained: Evaluation | None, x: str, y: str) -> Point | None:
    """Where the retrained model is; the p-value of a test against itself is 1."""
    point = () if retrained is None else (retrained.value(x), 1.0 if y == "forget_quality" else retrained.value(y))
    return None if None in point else point or None


def _drawn(name: str, value: float | None) -> float:
    """Where a value is drawn: a gap for none, and the least p-value for those that a log scale cannot hold."""
    if value is None:
        return math.nan
    return max(value, LEAST_P_VALUE) if name == "forget_quality" else value


def _curves(axes: Axes, names: list[str], evaluations: Sequence[Evaluation], retrained: Evaluation | None) -> None:
    """Each figure over α with its intervals, and the retrained model's as a dashed line of the same colour."""
    alphas = [each.alpha for each in evaluations]
    known = {} if retrained is None else {name: retrained.figures[name] for name in names if name in retrained.figures}
    known = {name: figure for name, figure in known.items() if figure.value is not None and name not in RELATIVE}
    for name in names:
        label, color, marker = SERIES.get(metric_of(name)[0], (figure_label(name), BLUE, "o"))
        figures = [each.figures.get(name) or not_computed("") for each in evaluations]
        values, lows, highs = (
            [_drawn(name, getattr(figure, bound)) for figure in figures] for bound in ("value", "low", "high")
        )
        axes.plot(alphas, values, color=color, marker=marker, label=label, clip_on=False, zorder=3)
        axes.fill_between(alphas, lows, highs, color=color, alpha=0.15, linewidth=0)
        if name in known:
            axes.axhline(known[name].value, color=color, linestyle="--", linewidth=1.2)
            if known[name].low is not None:
                axes.axhspan(known[name].low, known[name].high, color=color, alpha=0.07, linewidth=0)
    if known:
        axes.plot([], [], color=INK, linestyle="--", linewidth=1.2, label="Retrained model")


def _budget(line: Callable[..., Any], evaluations: Sequence[Evaluation], choice: Choice) -> float | None:
    """Draw the least utility that the rule accepts."""
    utility = next((each.value(choice.utility) for each in evaluations if each.alpha == 0), None)
    if utility is None:
        return None
    budget = choice.min_utility * utility
    label = f"Budget, {100 * choice.min_utility:.4g}%"
    line(budget, color=BLUE, linestyle="-.", linewidth=1.2, label=label)
    return budget


def _auc_aim(axes: Axes, choice: Choice | None) -> None:
    """The AUC of rows that cannot be told from rows never seen, and how far the rule lets it be from that."""
    axes.axhline(0.5, color=GREEN, linewidth=1.2, label="0.5: no difference")
    if choice is not None and choice.auc_tolerance is not None:
        band = (0.5 - choice.auc_tolerance, 0.5 + choice.auc_tolerance)
        axes.axhspan(*band, color=GREEN, alpha=0.15, linewidth=0, label=f"Tolerance, ±{choice.auc_tolerance:g}")


def _aim(axes: Axes, evaluations: Sequence[Evaluation], choice: Choice | None, x: str, y: str) -> None:
    """What the trade-off is to reach: the level of forgetting, the budget, and the region that the rule accepts."""
    low, high = axes.get_ylim()
    if y.startswith("membership_auc"):
        axes.axhline(0.5, color=GREEN, linewidth=1.2, label="0.5: no difference")
        tolerance = (choice and choice.auc_tolerance) or 0.0
        low, high = 0.5 - tolerance, 0.5 + tolerance
    elif y == "forget_quality":
        axes.axhline(ALPHA_LEVEL, color=GREEN, linewidth=1.2, label=f"p = {ALPHA_LEVEL:g}")
        low = ALPHA_LEVEL
    budget = _budget(axes.axvline, evaluations, choice) if choice is not None and x == choice.utility else None
    if budget is not None:
        left, right = axes.get_xlim()
        axes.fill_between([budget, right], low, high, color=GREEN, alpha=0.15, linewidth=0, label="Accepted")
        axes.set_xlim(left, right)


def _label_points(axes: Axes, points: list[Point], labels: dict[int, str], star: Point | None) -> None:
    """The first labels first, each on the side of its point where it covers least; those without any room are left out."""
    to_axes = axes.transData - axes.transAxes  # both coordinates from 0 to 1
    places = to_axes.transform(points)
    steps = np.linspace(0, 1, 25)[:, None]
    path = np.concatenate([places, *(a + steps * (b - a) for a, b in itertools.pairwise(places))])
    sides = np.array([(1, 1), (-1, 1), (1, -1), (-1, -1), (0, 1.2), (0, -1.2), (1.2, 0), (-1.2, 0)])
    written = [] if star is None else [(to_axes.transform(star), np.array([0.025, 0.035]))]
    for place, label in labels.items():
        half = np.array([0.014 * len(label) + 0.008, 0.033])
        centres = places[place] + sides * (half + np.array([0.022, 0.03]))
        free = [
            centre
            for centre in centres
            if (np.abs(centre - 0.5) < 0.53).all()
            and not any((np.abs(centre - other) < half + size).all() for other, size in written)
        ]
        if free:
            centre = min(free, key=lambda centre: (np.abs(path - centre) < half + 0.004).all(1).sum())
            axes.text(*centre, label, transform=axes.transAxes, ha="center", va="center", fontsize=9)
            written.append((centre, half))


def _scale(axes: Axes, scale: str) -> None:
    """Limits and ticks of the y axis; powers of ten as plain text, since the font of a page draws them."""

    def tick(value: float, _: int) -> str:
        plain = 1e-3 <= value < 1e5
        return f"{value:g}" if plain else f"10{str(round(math.log10(value))).translate(SUPERSCRIPTS)}"

    if scale == "share":
        axes.set_ylim(0, 1)
    elif scale in ("log", "p-value"):
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.set_ylim(low, 4 if scale == "p-value" else high)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        axes.yaxis.set_major_formatter(FuncFormatter(tick))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _legend(axes: Axes) -> None:
    """Below the axes, where it covers no curve."""
    axes.legend(loc="upper left", bbox_to_anchor=(-0.04, -0.19), ncols=2, handlelength=1.9, columnspacing=1.4)

"""Plots of a sweep over α and of a training run; no pyplot, so no global figures and no display."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation.selection import Choice
from hf_unlearn.evaluation.sweep import SweepPoint


Panel = Callable[[Axes], None]

# Okabe-Ito: told apart under colour blindness, and mid-tones that can be read on white and on near-black.
VERMILLION, BLUE, GREEN, PURPLE = "#d55e00", "#0072b2", "#009e73", "#cc79a7"
INK, GRID = "#1f2630", "#c3c9d1"
CSS_VARIABLES = {VERMILLION: "--forget", BLUE: "--retain", GREEN: "--holdout", PURPLE: "--other", GRID: "--grid"}
STYLES = {
    "forget": {"color": VERMILLION, "marker": "o", "label": "Forget"},
    "retain": {"color": BLUE, "marker": "s", "label": "Retain"},
    "holdout": {"color": GREEN, "marker": "^", "label": "Hold-out"},
}
RC = {
    "font.size": 10,
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "svg.fonttype": "none",
    "svg.hashsalt": "hf_unlearn",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
}


def plot_sweep(
    points: Sequence[SweepPoint],
    choice: Choice | None = None,
    min_retain: float | None = None,
    auc_tolerance: float | None = None,
) -> Figure:
    """
    Two panels over α: answer probabilities, and membership AUC (or memorisation where there is no hold-out set).

    Args:
        points (sequence of [`SweepPoint`]):
            The evaluated α; all of them are marked.
        choice ([`Choice`], *optional*):
            What was chosen, drawn as a vertical line.
        min_retain (`float`, *optional*):
            Share of the reference's retain probability that must remain, drawn as a dashed line.
        auc_tolerance (`float`, *optional*):
            Accepted distance of the membership AUC from 0.5, drawn as a band.
    """
    return figure_of(sweep_panels(points, choice, min_retain, auc_tolerance))


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
    """A figure with the panels side by side."""
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(4.2 * len(panels), 3.7), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
        for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            draw(axes)
    return figure


def to_svg(figure: Figure, prefix: str) -> str:
    """
    A figure as an `<svg>` element for an HTML page: transparent, in the page's ink, its colours the page's variables
    (see `CSS_VARIABLES`) where it has them, its panel titles what screen readers say.

    Args:
        figure (`Figure`): The figure.
        prefix (`str`): Start of all its ids, unique in the page.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context(RC):
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace("xlink:href=", "href=")
    label = html.escape("; ".join(axes.get_title(loc="left") for axes in figure.axes))
    root = rf'<svg viewBox="\1" role="img" aria-label="{label}">'
    svg = re.sub(r'<svg[^>]*viewBox="([^"]*)"[^>]*>', root, svg, count=1)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # it would style the whole page
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    for colour, variable in CSS_VARIABLES.items():
        svg = svg.replace(colour, f"var({variable}, {colour})")
    return svg.replace(INK, "currentColor")


def sweep_panels(
    points: Sequence[SweepPoint],
    choice: Choice | None = None,
    min_retain: float | None = None,
    auc_tolerance: float | None = None,
) -> list[Panel]:
    """The panels of [`plot_sweep`], for other arrangements."""
    points = sorted(points, key=lambda point: point.alpha)
    if not points:
        raise UnlearningError("There is no evaluated α to plot. Run the sweep first.")

    def probabilities(axes: Axes) -> None:
        for name, style in STYLES.items():
            if name in points[0].rows:
                _line(axes, points, [point.mean(name, "probability") for point in points], **style)
        reference = next((point for point in points if point.alpha == 0), None)
        if min_retain is not None and reference is not None:
            budget = min_retain * reference.mean("retain", "probability")
            axes.axhline(
                budget, color=BLUE, linestyle="--", linewidth=1.2, label=f"Retain budget, {100 * min_retain:.4g}%"
            )
        _finish(axes, points, choice, "Mean answer probability", "Probability")

    def membership(axes: Axes) -> None:
        if auc_tolerance is not None:
            band = (0.5 - auc_tolerance, 0.5 + auc_tolerance)
            axes.axhspan(*band, color=GREEN, alpha=0.18, linewidth=0, label=f"Tolerance, ±{auc_tolerance:g}")
        axes.axhline(0.5, color=GREEN, linestyle="--", linewidth=1.2, label="0.5: no difference")
        _line(axes, points, [point.membership_auc for point in points], **STYLES["forget"] | {"label": "Forget"})
        _finish(axes, points, choice, "Membership AUC against hold-out rows", "AUC")

    def memorization(axes: Axes) -> None:
        exact, strength = STYLES["forget"], STYLES["forget"] | {"color": PURPLE, "marker": "D"}
        values = [point.mean("forget", "exact_memorization") for point in points]
        _line(axes, points, values, **exact | {"label": "Exact memorisation"})
        values = [point.mean("forget", "extraction_strength") for point in points]
        _line(axes, points, values, **strength | {"label": "Extraction strength"})
        _finish(axes, points, choice, "Memorisation of the forget set", "Share of the answer tokens")

    return [probabilities, membership if points[0].membership_auc is not None else memorization]


def training_panels(log_history: list[dict[str, Any]]) -> list[Panel]:
    """The panels of [`plot_training`], for other arrangements; those without a logged value are left out."""
    losses = {
        "memorization_loss": {"color": VERMILLION, "label": "Memorisation loss"},
        "forget_loss": {"color": VERMILLION, "label": "Forget loss"},
    }
    accuracies = {
        "forget_token_accuracy": {"color": VERMILLION, "label": "Forget"},
        "retain_token_accuracy": {"color": BLUE, "linestyle": "--", "label": "Retain"},
    }
    return [
        _training_panel(log_history, present, title, unit, top)
        for series, title, unit, top in (
            (losses, "Loss on the forget rows", "nats per token", None),
            ({"retain_kl": {"color": BLUE, "label": "Retain KL"}}, "Drift on the retain rows", "nats per token", None),
            (accuracies, "Token accuracy while memorising", "Share of the answer tokens", 1.0),
        )
        if (
            present := {
                key: style
                for key, style in series.items()
                if any(key in entry and "step" in entry for entry in log_history)
            }
        )
    ]


def _training_panel(
    log_history: list[dict[str, Any]], series: dict[str, dict[str, str]], title: str, unit: str, top: float | None
) -> Panel:
    def draw(axes: Axes) -> None:
        lowest = 0.0
        for key, style in series.items():
            logged = [(entry["step"], entry[key]) for entry in log_history if key in entry and "step" in entry]
            axes.plot(*zip(*logged, strict=True), marker="." if len(logged) < 40 else "", **style)
            lowest = min([lowest, *(value for _, value in logged if math.isfinite(value))])
        axes.set(title=title, xlabel="Optimiser step", ylabel=unit)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=lowest if lowest < 0 else 0, top=top)
        axes.xaxis.get_major_locator().set_params(integer=True)
        _legend(axes)

    return draw


def _line(axes: Axes, points: Sequence[SweepPoint], values: Sequence[float | None], **style: Any) -> None:
    axes.plot([point.alpha for point in points], values, clip_on=False, zorder=3, **style)


def _finish(axes: Axes, points: Sequence[SweepPoint], choice: Choice | None, title: str, unit: str) -> None:
    """The chosen α, axes from 0, labels."""
    if choice is not None:
        label = f"Chosen, α = {choice.alpha:.4g}".replace("-", "−")
        axes.axvline(choice.alpha, color=INK, linestyle=":", linewidth=1.6, label=label, zorder=2)
    axes.set(title=title, xlabel="Extrapolation strength α", ylabel=unit, ylim=(0, 1))
    axes.set_xlim(min(0.0, points[0].alpha), points[-1].alpha if points[-1].alpha > points[0].alpha else 1.0)
    _legend(axes)


def _legend(axes: Axes) -> None:
    """Below the axes, where it covers no curve."""
    axes.legend(loc="upper left", bbox_to_anchor=(-0.04, -0.19), ncols=2, handlelength=1.9, columnspacing=1.4)

"""The report of an evaluation: one HTML file that needs nothing else, to be read by whoever must decide on the result."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import matplotlib

from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation.figures import Figure
from hf_unlearn.evaluation.plots import (
    CSS_VARIABLES,
    FORGETTING,
    INK,
    METRICS,
    RC,
    RELATIVE,
    SUPERSCRIPTS,
    UTILITIES,
    Panel,
    alpha_label,
    by_alpha,
    curve_panels,
    figure_label,
    figure_of,
    label,
    metric_of,
    trade_off_panel,
    training_panels,
)
from hf_unlearn.evaluation.results import Evaluation
from hf_unlearn.evaluation.selection import Choice


FOLDER = Path(__file__).parent / "report_page"
MEANINGS = {
    "forget_quality": "p-value of a test of the truth ratios against the retrained model's; above 0.05 no difference shows",
    "model_utility": "harmonic mean over the sets that are to be kept",
    "membership_auc": "forget against hold-out rows; 0.5: cannot be told from rows never seen; 1: stands out; far below "
    "0.5: over-forgotten",
    "privleak": "membership against the retrained model's; 0: alike; far below: still known; far above: over-forgotten",
    "probability": "of the reference answer, per token; 1 is certain",
    "rouge_l_recall": "share of the answer's words found, in order, in the generated answer",
    "truth_ratio": "wrong answers against the right one; forget rows: 1 is no preference; other rows: 1 is sure of the "
    "right one",
    "exact_memorization": "share of the answer tokens that are the model's first choice",
    "extraction_strength": "share of the answer that the model completes by itself",
}  # of the metrics in the headline
ROW_COLUMNS = {
    "probability": "Answer probability",
    "normalized_probability": "Probability among the choices",
    "rouge_l_recall": "ROUGE-L recall",
    "exact_memorization": "Exact memorisation",
    "extraction_strength": "Extraction strength",
    "truth_ratio": "Truth ratio, raw",
}
HEADLINE_SERIES = ("", "forget", "retain", "holdout", "loss")  # sets, and of the membership attacks the one by loss
FIRST_ROWS = 20  # of a set, until the reader asks for more
FIRST_CURVES = 6


@dataclass(frozen=True)
class RowText:
    """
    What a row asks and what its data answers.

    Args:
        prompt (`str`): The question.
        reference (`str`): The answer in the data.
    """

    prompt: str
    reference: str


@dataclass(frozen=True)
class Column:
    """One evaluation in the headline."""

    label: str
    detail: str
    evaluation: Evaluation


def write_report(
    path: str | Path,
    *,
    title: str,
    evaluations: Sequence[Evaluation],
    texts: dict[str, list[RowText]],
    choice: Choice | None = None,
    retrained: Evaluation | None = None,
    facts: dict[str, str] | None = None,
    log_history: list[dict[str, Any]] | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """
    Write a self-contained HTML report; a report that is there already is replaced in one step.

    Args:
        path (`str` or `Path`):
            The file to write. Missing folders are made.
        title (`str`):
            Heading of the report.
        evaluations (sequence of [`Evaluation`]):
            What was evaluated: one adapter at several α, or one model.
        texts (`dict[str, list[RowText]]`):
            Per set, the texts of the evaluated rows in their order. Sets without texts are in the figures only.
        choice ([`Choice`], *optional*):
            The chosen α, one of those evaluated.
        retrained ([`Evaluation`], *optional*):
            The model retrained without the forget set, shown beside the others; its answers by the ids of their rows.
        facts (`dict[str, str]`, *optional*):
            How the result came about: base model, training time, versions, ...
        log_history (`list[dict]`, *optional*):
            `trainer.state.log_history`, for the training curves.
        notes (sequence of `str`, *optional*):
            What a reader must know, e.g. on the security of the method.
    """
    evaluations = by_alpha(evaluations)
    if retrained is not None:
        figures = {name: each for name, each in retrained.figures.items() if each.value is not None}
        retrained = replace(retrained, figures={name: figures[name] for name in figures if name not in RELATIVE})
    columns = _columns(evaluations, choice, retrained)
    shown = next(column.evaluation for column in reversed(columns) if column.evaluation is not retrained)
    several = len(evaluations) > 1 or retrained is not None
    trade_off = trade_off_panel(evaluations, choice, retrained) if several else None
    curves = curve_panels(evaluations, choice, retrained)
    script = (FOLDER / "page.js").read_text(encoding="utf-8")
    page = _template().render(
        title=title,
        choice=choice,
        evaluations=evaluations,
        columns=columns,
        headline=_headline(columns),
        trade_off=_svgs([trade_off] if trade_off else [], "trade-off"),
        main_curve=_svgs([curves.pop("probability")] if "probability" in curves else [], "main-curve"),
        curves=_svgs(curves.values(), "curve"),
        first_curves=FIRST_CURVES,
        rows=_rows(evaluations, texts, shown, choice, retrained),
        evidence=_evidence(choice),
        figures=_figures(evaluations + ([retrained] if retrained is not None else [])),
        training=_svgs(training_panels(log_history or []), "training"),
        facts=facts or {},
        notes=notes,
        style=(FOLDER / "page.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    return _write_atomically(Path(path), page)


def _columns(evaluations: list[Evaluation], choice: Choice | None, retrained: Evaluation | None) -> list[Column]:
    """Before, after and retrained, as far as they are there."""
    last = evaluations[-1]
    if choice is not None:
        last = next((each for each in evaluations if each.alpha == choice.alpha), None)
        if last is None:
            alphas = ", ".join(_model_label(each) for each in evaluations)
            raise UnlearningError(
                f"The chosen α = {choice.alpha:g} was not evaluated (only {alphas}). Evaluate it first."
            )
    after = "This model" if len(evaluations) == 1 else "Largest" if choice is None else "After"
    columns = [Column("Before", _model_label(each), each) for each in evaluations if each.alpha == 0]
    if not columns or columns[0].evaluation is not last:
        columns.append(Column(after, _model_label(last) if last.alpha is not None else "", last))
    if retrained is not None:
        columns.append(Column("Retrained", "", retrained))
    return columns


def _model_label(evaluation: Evaluation) -> str:
    return "This model" if evaluation.alpha is None else f"α = {alpha_label(evaluation.alpha)}"


def _headline(columns: list[Column]) -> list[dict[str, Any]]:
    """The main metrics, and of each the figures of the main sets."""
    groups = []
    for metric, meaning in MEANINGS.items():
        lines = _lines([column.evaluation for column in columns], metric)
        lines = [line for line in lines if metric_of(line["name"])[0] in HEADLINE_SERIES]
        if lines:
            share = METRICS[metric][2] == "share"
            groups.append({"name": label(metric), "meaning": meaning, "lines": lines, "share": share})
    return groups


def _figures(evaluations: list[Evaluation]) -> list[dict[str, Any]]:
    """All figures by metric, those of known metrics first."""
    named = {metric_of(name)[1]: None for each in evaluations for name in each.figures}
    metrics = [
        *(metric for metric in METRICS if metric in named),
        *(metric for metric in named if metric not in METRICS),
    ]
    return [{"name": label(metric), "lines": _lines(evaluations, metric)} for metric in metrics]


def _lines(evaluations: list[Evaluation], metric: str) -> list[dict[str, Any]]:
    """Per figure of the metric its label, its values, its numbers of rows, and its variants or why there is no value."""
    names = {name: None for each in evaluations for name in each.figures if metric_of(name)[1] == metric}
    lines = []
    for name in names:
        cells = [each.figures.get(name) for each in evaluations]
        there = [cell for cell in cells if cell is not None]
        series = metric_of(name)[0]
        line = {"name": name, "label": label(series) if series else "", "cells": cells}
        line["n"] = " / ".join(dict.fromkeys(str(cell.n) for cell in there if cell.value is not None))
        line["note"] = "; ".join(dict.fromkeys(cell.note.replace("_", " ") for cell in there if cell.note))
        lines.append(line)
    return lines


def _evidence(choice: Choice | None) -> list[dict[str, str]]:
    """The choice's evidence as a table of words."""
    if choice is None:
        return []
    names = {"alpha": "α", "utility": figure_label(choice.utility), "utility_share": "Share of α = 0"}

    def word(key: str, value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        if key == "alpha":
            return alpha_label(value)
        if key == "utility_share" and value is not None:
            return f"{value:.1%}"
        return _number(value) if value is None or isinstance(value, (int, float)) else str(value)

    filled = {key for line in choice.evidence for key, value in line.items() if value != ""}  # there may be no remark
    return [
        {names.get(key, figure_label(key)): word(key, value) for key, value in line.items() if key in filled}
        for line in choice.evidence
    ]


def _rows(
    evaluations: list[Evaluation],
    texts: dict[str, list[RowText]],
    shown: Evaluation,
    choice: Choice | None,
    retrained: Evaluation | None,
) -> dict[str, Any]:
    """Everything that is shown row by row, as the page's script reads it; `shown` is what the page starts with."""
    states = [each for each in evaluations if each is shown or any(each.answers.get(name) for name in texts)]
    if not any(each.answers.get(name) for each in states for name in texts):
        states = evaluations
    wanted = (choice.target, choice.utility) if choice is not None else ()
    names = dict.fromkeys((*wanted, *FORGETTING, *UTILITIES))
    names = [name for name in names if any(each.value(name) is not None for each in states)][:4]
    return {
        "labels": [_model_label(each) for each in states],
        "figures": [[f"{figure_label(name)} {_number(each.value(name))}" for name in names] for each in states],
        "start": states.index(shown),
        "chosen": states.index(shown) if choice is not None else None,
        "before": next((place for place, each in enumerate(states) if each.alpha == 0 and len(states) > 1), None),
        "page": FIRST_ROWS,
        "sets": {
            name: _set_rows(name, rows, states, retrained)
            for name, rows in texts.items()
            if any(name in each.rows or name in each.answers for each in states)
        },
    }


def _set_rows(
    name: str, texts: list[RowText], states: list[Evaluation], retrained: Evaluation | None
) -> dict[str, Any]:
    for each in states:
        for what, values in (each.rows.get(name, {}) | {"answers": each.answers.get(name) or texts}).items():
            if len(values) != len(texts):
                raise UnlearningError(
                    f"Set {name!r} has {len(texts)} texts but {len(values)} entries in {what!r} ({_model_label(each)}). "
                    "Pass the texts of the evaluated rows, in their order."
                )
    ids = next((each.rows[name]["row"] for each in states if "row" in each.rows.get(name, {})), range(len(texts)))
    columns = [column for column in ROW_COLUMNS if any(column in each.rows.get(name, {}) for each in states)]
    return {
        "label": label(name),
        "ids": [int(row) for row in ids],
        "rows": [[text.prompt, text.reference.strip()] for text in texts],
        "columns": [ROW_COLUMNS[column] for column in columns],
        "probability": columns[:1] == ["probability"],  # whether the first of the values is one
        "states": [_state(each, name, columns) for each in states],
        "retrained": _retrained_state(retrained, name, list(ids)),
    }


def _state(evaluation: Evaluation, name: str, columns: list[str]) -> dict[str, Any]:
    """Answers and values of the rows of a set, as compact as they are shown."""
    answers = evaluation.answers.get(name)
    values = [evaluation.rows.get(name, {}).get(column) for column in columns]
    return {
        "answers": [answer.strip() for answer in answers] if answers else None,
        "values": [column and [_compact(value) for value in column] for column in values],
    }


def _retrained_state(retrained: Evaluation | None, name: str, ids: list[int]) -> dict[str, Any] | None:
    """The retrained model's answers, by the ids of their rows."""
    if retrained is None or not retrained.answers.get(name) or "row" not in retrained.rows.get(name, {}):
        return None
    places = {row: place for place, row in enumerate(retrained.rows[name]["row"])}
    state = _state(retrained, name, ["probability"])

    def by_id(values: list[Any] | None) -> list[Any] | None:
        return values and [values[places[row]] if row in places else None for row in ids]

    return {"answers": by_id(state["answers"]), "values": [by_id(column) for column in state["values"]]}


def _compact(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def _svgs(panels: Iterable[Panel], prefix: str) -> list[str]:
    """Each panel as an `<svg>` of its own, so that they stand side by side on a desktop and stack on a phone."""
    return [to_svg(figure_of([panel]), f"{prefix}{number}") for number, panel in enumerate(panels)]


def to_svg(figure: matplotlib.figure.Figure, prefix: str) -> str:
    """
    A figure as an `<svg>` element for an HTML page: transparent, in the page's ink, its colours the page's variables
    (see `CSS_VARIABLES`) where it has them, its panel titles what screen readers say. All its ids start with `prefix`.
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


def _number(value: float | None) -> str:
    """A number for a table; what there is no value for is a dash."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}·10{str(int(exponent)).translate(SUPERSCRIPTS)}".replace("-", "−")
    return f"{value:.{3 if abs(value) < 10 else 1}f}".replace("-", "−")


def _interval(figure: Figure) -> str:
    if figure.low is None:
        return ""
    return f"{_number(figure.low)}{'–' if figure.low >= 0 else ' to '}{_number(figure.high)}"


def _embedded(content: Any) -> str:
    """JSON that can stand in a `<script>` element, whatever it says."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def page_templates(folder: Path) -> jinja2.Environment:
    """The templates of the pages in a folder: what they show is escaped, and a missing value is an error."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def _template() -> jinja2.Template:
    environment = page_templates(FOLDER)
    environment.filters |= {"number": _number, "interval": _interval, "alpha": alpha_label, "embedded": _embedded}
    return environment.get_template("page.html.jinja")


def _write_atomically(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path

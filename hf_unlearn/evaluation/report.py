"""The report of a run: one HTML file that needs nothing else, to be read by whoever must decide on the result."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import datasets
import jinja2

from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation.plots import Panel, figure_of, sweep_panels, to_svg, training_panels
from hf_unlearn.evaluation.selection import Choice
from hf_unlearn.evaluation.sweep import SweepPoint, text_of


SET_LABELS = {"forget": "Forget", "retain": "Retain", "holdout": "Hold-out"}
METRICS = {
    "probability": ("Answer probability", "of the reference answer, per token; 1 is certain"),
    "exact_memorization": ("Exact memorisation", "share of the answer tokens that are the model's first choice"),
    "extraction_strength": ("Extraction strength", "share of the answer that the model completes by itself"),
    "rouge_l": ("ROUGE-L recall", "share of the answer's words found, in order, in the generated answer"),
}


class Evaluated(Protocol):
    """What a report reads of a [`Sweep`]."""

    sets: dict[str, datasets.Dataset]

    @property
    def points(self) -> list[SweepPoint]: ...

    @property
    def reference(self) -> SweepPoint: ...


@dataclass(frozen=True)
class Answer:
    """What the model answered to one row at one α."""

    column: str
    alpha: float
    text: str
    probability: float
    is_reference: bool


@dataclass(frozen=True)
class Row:
    """One row with its answers before and after."""

    prompt: str
    reference: str
    answers: list[Answer]


def write_report(
    path: str | Path,
    *,
    title: str,
    sweep: Evaluated,
    choice: Choice,
    facts: dict[str, str] | None = None,
    log_history: list[dict[str, Any]] | None = None,
    notes: Sequence[str] = (),
    min_retain: float | None = None,
    auc_tolerance: float | None = None,
) -> Path:
    """
    Write a self-contained HTML report; a report that is there already is replaced in one step.

    Args:
        path (`str` or `Path`):
            The file to write. Missing folders are made.
        title (`str`):
            Heading of the report.
        sweep ([`Sweep`]):
            What was evaluated. Answers are shown where they were generated at α = 0 or at the chosen α.
        choice ([`Choice`]):
            The chosen α, one of those evaluated.
        facts (`dict[str, str]`, *optional*):
            How the result came about: base model, training time, versions, ...
        log_history (`list[dict]`, *optional*):
            `trainer.state.log_history`, for the training curves.
        notes (sequence of `str`, *optional*):
            What a reader must know, e.g. on the security of the method.
        min_retain (`float`, *optional*):
            The retain budget α was chosen with, drawn into the curves.
        auc_tolerance (`float`, *optional*):
            The tolerance of the membership AUC α was chosen with, drawn into the curves.
    """
    before = sweep.reference
    after = next((point for point in sweep.points if point.alpha == choice.alpha), None)
    if after is None:
        alphas = ", ".join(f"{point.alpha:g}" for point in sweep.points)
        raise UnlearningError(f"The chosen α = {choice.alpha:g} was not evaluated (only {alphas}). Evaluate it first.")
    columns = {"Before": before} | ({"After": after} if after is not before else {})
    page = _template().render(
        title=title,
        choice=choice,
        columns=columns,
        headline=_headline(columns),
        answers=_answers(sweep, columns),
        points=sweep.points,
        table_metrics=_table_metrics(sweep.points),
        sweep_plots=_svgs(sweep_panels(sweep.points, choice, min_retain, auc_tolerance), "sweep"),
        training_plots=_svgs(training_panels(log_history or []), "training"),
        facts=facts or {},
        notes=notes,
    )
    return _write_atomically(Path(path), page)


def _headline(columns: dict[str, SweepPoint]) -> list[dict[str, Any]]:
    """Per metric its name, its meaning and, per set, the means of the columns."""
    points = list(columns.values())
    groups = []
    for metric, (name, meaning) in METRICS.items():
        sets = [key for key in points[0].rows if any(metric in point.rows[key] for point in points)]
        lines = [(_set_label(key), [_mean(point, key, metric) for point in points]) for key in sets]
        groups.append({"name": name, "meaning": meaning, "lines": lines})
    if points[0].membership_auc is not None:
        lines = [("Forget against hold-out", [point.membership_auc for point in points])]
        meaning = "0.5: cannot be told from rows never seen; 1: stands out; far below 0.5: over-forgotten"
        groups.append({"name": "Membership AUC", "meaning": meaning, "lines": lines})
    return [group for group in groups if group["lines"]]


def _answers(sweep: Evaluated, columns: dict[str, SweepPoint]) -> list[dict[str, Any]]:
    """Per set with generated answers its rows, and how many answers equal the reference answer in each column."""
    sections = []
    for name, rows in sweep.sets.items():
        generated = {label: point for label, point in columns.items() if name in point.answers}
        if not generated:
            continue
        table = [
            Row(text_of(prompt), text_of(reference), _row_answers(generated, name, index, text_of(reference)))
            for index, (prompt, reference) in enumerate(zip(rows["prompt"], rows["completion"], strict=True))
        ]
        equal = [
            f"{sum(row.answers[column].is_reference for row in table)} of {len(table)} {label.lower()}"
            for column, label in enumerate(generated)
        ]
        sections.append({"set": name, "label": _set_label(name), "rows": table, "equal": ", ".join(equal)})
    return sections


def _row_answers(generated: dict[str, SweepPoint], name: str, index: int, reference: str) -> list[Answer]:
    return [
        Answer(
            column=label,
            alpha=point.alpha,
            text=point.answers[name][index].strip(),
            probability=point.rows[name]["probability"][index],
            is_reference=point.answers[name][index].strip() == reference.strip(),
        )
        for label, point in generated.items()
    ]


def _table_metrics(points: Sequence[SweepPoint]) -> dict[str, list[str]]:
    """The metrics of each set that have a value at some α: the columns of `summary()`."""
    hidden = "log_probability"
    return {
        name: list(dict.fromkeys(metric for point in points for metric in point.rows[name] if metric != hidden))
        for name in points[0].rows
    }


def _mean(point: SweepPoint, set_name: str, metric: str) -> float | None:
    return point.mean(set_name, metric) if metric in point.rows[set_name] else None


def _set_label(name: str) -> str:
    return SET_LABELS.get(name, name)


def _svgs(panels: Sequence[Panel], prefix: str) -> list[str]:
    """Each panel as an `<svg>` of its own, so that they stand side by side on a desktop and stack on a phone."""
    return [to_svg(figure_of([panel]), f"{prefix}{number}") for number, panel in enumerate(panels)]


def _number(value: float | None, digits: int = 3) -> str:
    """A number for a table; what there is no value for is a dash."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.{digits}f}".replace("-", "−")


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": _number,
        "share": lambda value: 0 if value is None or math.isnan(value) else value,
        "alpha": lambda value: f"{value:.4g}".replace("-", "−"),
        "set_label": _set_label,
        "metric_label": lambda name: METRICS[name][0] if name in METRICS else name.replace("_", " ").capitalize(),
    }
    return environment.get_template("report.html.jinja")


def _write_atomically(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path

"""Evaluations as files for other programs: JSON, CSV and a picture."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation.plots import evaluation_panels, figure_of
from hf_unlearn.evaluation.results import Evaluation
from hf_unlearn.evaluation.selection import Choice


FIGURE_FIELDS = ("alpha", "figure", "value", "n", "low", "high", "note")


def write_tables(
    folder: str | Path,
    evaluations: Sequence[Evaluation],
    choice: Choice | None = None,
    retrained: Evaluation | None = None,
) -> list[Path]:
    """
    Write `evaluation.json` (all of it), `figures.csv` (one line per α and figure), `rows.csv` (one line per α, set and
    row) and, where there is something to draw, `evaluation.png`; return their paths. What has no value is empty in CSV and `null` in JSON.

    Args:
        folder (`str` or `Path`):
            Where to write. It is made if missing.
        evaluations (sequence of [`Evaluation`]):
            What was evaluated.
        choice ([`Choice`], *optional*):
            The chosen α.
        retrained ([`Evaluation`], *optional*):
            The model retrained without the forget set, for the picture.
    """
    if not evaluations:
        raise UnlearningError("There is no evaluation to write. Evaluate the model, or the adapter at some α, first.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "evaluations": [evaluation.to_dict() for evaluation in evaluations],
        "choice": None if choice is None else choice.to_dict(),
    }
    paths = [folder / name for name in ("evaluation.json", "figures.csv", "rows.csv", "evaluation.png")]
    paths[0].write_text(json.dumps(_finite(content), ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    _write_csv(paths[1], FIGURE_FIELDS, _figure_lines(evaluations))
    sets = [columns for evaluation in evaluations for columns in evaluation.rows.values()]
    names = dict.fromkeys(name for columns in sets for name in columns)
    names.pop("row", None)
    answered = any(evaluation.answers for evaluation in evaluations)
    _write_csv(paths[2], ("alpha", "set", "row", *names, *(["answer"] if answered else [])), _row_lines(evaluations))
    panels = evaluation_panels(evaluations, choice, retrained)
    if not panels:
        return paths[:3]
    figure_of(panels).savefig(paths[3], dpi=150)
    return paths


def _figure_lines(evaluations: Sequence[Evaluation]) -> Iterator[dict[str, Any]]:
    for evaluation in evaluations:
        for name, figure in evaluation.figures.items():
            yield {"alpha": evaluation.alpha, "figure": name} | asdict(figure)


def _row_lines(evaluations: Sequence[Evaluation]) -> Iterator[dict[str, Any]]:
    for evaluation in evaluations:
        for name, columns in evaluation.rows.items():
            if evaluation.answers.get(name):
                columns = columns | {"answer": evaluation.answers[name]}
            for place, values in enumerate(zip(*columns.values(), strict=True)):
                line = {"alpha": evaluation.alpha, "set": name, "row": place}
                yield line | dict(zip(columns, values, strict=True))


def _write_csv(path: Path, fields: Sequence[str], lines: Iterator[dict[str, Any]]) -> None:
    """Lists as JSON; `None` and what is not finite as nothing."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        for line in lines:
            line = {name: _finite(value) for name, value in line.items()}
            writer.writerow({name: json.dumps(v) if isinstance(v, list) else v for name, v in line.items()})


def _finite(content: Any) -> Any:
    """The content with `None` for what JSON has no number for."""
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content

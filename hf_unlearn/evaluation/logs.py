"""Logs of evaluations: open-unlearning's `TOFU_EVAL.json`, read and written, and our own `evaluation.json`, read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hf_unlearn.errors import UnlearningError, parse_json
from hf_unlearn.evaluation.aggregates import ATTACKS, question_figures
from hf_unlearn.evaluation.results import Evaluation


OWN_LOG, OPEN_UNLEARNING_LOG = "evaluation.json", "TOFU_EVAL.json"

_PREFIXES = {"forget": "forget", "retain": "retain", "ra": "real_authors", "wf": "world_facts"}
_FIELDS = {  # what follows the prefix: field of a row, the aggregated one first: our column
    "Q_A_Prob": {"prob": "probability", "avg_loss": "loss"},
    "Q_A_PARA_Prob": {"avg_loss": "paraphrased_loss"},
    "Q_A_PERT_Prob": {"avg_loss": "wrong_losses"},
    "Q_A_Prob_normalised": {"prob": "normalized_probability"},
    "Q_A_ROUGE": {
        "rougeL_recall": "rouge_l_recall",
        "rouge1_recall": "rouge_1_recall",
        "rougeL_f1": "rouge_l_f1",
        "ground_truth": "ground_truth",
        "generation": "generation",
    },
    "Truth_Ratio": {"score": "truth_ratio"},
}
# entry of the log: (our set, field of a row: our column)
ENTRIES = {f"{prefix}_{rest}": (name, _FIELDS[rest]) for prefix, name in _PREFIXES.items() for rest in _FIELDS}
ENTRIES["forget_truth_ratio"] = ENTRIES.pop("forget_Truth_Ratio")
ENTRIES |= {column: ("forget", {"score": column}) for column in ("exact_memorization", "extraction_strength")}
HEADLINES = ("forget_quality", "model_utility", "privleak")

_OLD_LOG_KEYS = {"avg_gt_loss", "gt_loss", "avg_paraphrased_loss"}


def read_log(path: str | Path) -> Evaluation:
    """
    Read a log as an evaluation; of open-unlearning's, the figures are computed from its rows.

    From open-unlearning's, the columns of `Evaluation.rows` have their usual names; `ground_truth` is one more of them
    and holds the answer texts of the log, by which one can tell whether its rows are one's own.

    Args:
        path (`str` or `Path`):
            `TOFU_EVAL.json`, or our own `evaluation.json`, or a folder that holds one of them (ours comes first). Of
            several evaluations in ours, the one at the chosen α is taken.
    """
    path = find_log(path)
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnlearningError(f"{path} is not JSON ({error}). Give {OPEN_UNLEARNING_LOG} or {OWN_LOG}.") from error
    if isinstance(content, dict):
        if _is_old_log(content):
            raise UnlearningError(
                f"{path} is a log of the first TOFU code (locuslab/tofu). Those hold 300 rows at most, not the same "
                f"for every model, so they can't be compared row by row. Give open-unlearning's {OPEN_UNLEARNING_LOG} "
                "of the retrained model, or evaluate it here."
            )
        is_own = "evaluations" in content or "protocol" in content
        try:
            if is_own:
                return _read_own(content, path)
            if any(isinstance(entry, dict) and "agg_value" in entry for entry in content.values()):
                return _read_open_unlearning(content)
        except UnlearningError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = "evaluation" if is_own else "log"
            raise UnlearningError(f"{path} is no complete {what}: {error}. Evaluate the model again.") from error
    raise UnlearningError(
        f"{path} is no log of a known shape. Give open-unlearning's {OPEN_UNLEARNING_LOG} (not the summary) or our own "
        f"{OWN_LOG}."
    )


def find_log(path: str | Path) -> Path:
    """The file of a log that is named by its file or its folder."""
    path = Path(path).expanduser().resolve()
    if path.is_file():
        return path
    if not path.is_dir():
        raise UnlearningError(f"There is no log {path}. Check the path.")
    for name in (OWN_LOG, OPEN_UNLEARNING_LOG):
        if (path / name).is_file():
            return path / name
    below = sorted(str(found.parent) for found in path.glob(f"*/{OPEN_UNLEARNING_LOG}"))
    remedy = f"Give one of {', '.join(below)}." if below else "Give the folder or the file of a log."
    raise UnlearningError(f"{path} holds neither {OPEN_UNLEARNING_LOG} nor {OWN_LOG}. {remedy}")


def _is_old_log(content: dict[str, Any]) -> bool:
    return any(_OLD_LOG_KEYS & entry.keys() for entry in (content, *content.values()) if isinstance(entry, dict))


def _read_own(content: dict[str, Any], path: Path) -> Evaluation:
    entries = content.get("evaluations", [content])
    if len(entries) > 1 and content.get("choice"):
        entries = [entry for entry in entries if entry.get("alpha") == content["choice"]["alpha"]]
    if len(entries) != 1:
        alphas = ", ".join(str(entry.get("alpha")) for entry in content["evaluations"])
        raise UnlearningError(
            f"{path} holds evaluations at α = {alphas or 'none'}, and none of them is the chosen one. Give the log of a "
            "single model."
        )
    evaluation = Evaluation.from_dict(entries[0])
    columns = [column for table in evaluation.rows.values() for column in table.values()]
    if not all(isinstance(column, list) for column in [*columns, *evaluation.answers.values()]):
        raise TypeError("a column is no list")
    return evaluation


# ---- open-unlearning ----


def _read_open_unlearning(content: dict[str, Any]) -> Evaluation:
    sets: dict[str, dict[int, dict[str, Any]]] = {}  # set: row: columns
    for name, fields, values in _row_values(content):
        for row, entry in values.items():
            columns = {ours: entry[theirs] for theirs, ours in fields.items() if theirs in entry}
            sets.setdefault(name, {}).setdefault(int(row), {}).update(columns)
    evaluation = Evaluation("tofu")
    for name, rows in sets.items():
        names = dict.fromkeys(column for columns in rows.values() for column in columns)
        table = {column: [columns.get(column) for columns in rows.values()] for column in names}
        if "generation" in table:
            evaluation.answers[name] = table.pop("generation")
        evaluation.rows[name] = {"row": list(rows)} | table
    evaluation.figures = question_figures(evaluation, None)
    return evaluation


def _row_values(content: dict[str, Any]) -> Iterator[tuple[str, dict[str, str], dict[str, Any]]]:
    """Set, fields and values by row of every entry that is known."""
    for key, (name, fields) in ENTRIES.items():
        if key in content:
            yield name, fields, content[key]["value_by_index"]
    for attack, column in ATTACKS.items():
        for name in ("forget", "holdout"):
            if f"mia_{attack}" in content:
                yield name, {"score": column}, content[f"mia_{attack}"][name]["value_by_index"]


def write_open_unlearning(evaluation: Evaluation, path: str | Path) -> None:
    """
    Write an evaluation in the shape of open-unlearning's `TOFU_EVAL.json`, to be used there as `retain_logs_path`.

    Args:
        evaluation (`Evaluation`): Columns of TOFU's sets and, as far as they are computed, its figures.
        path (`str` or `Path`): The file.
    """
    content: dict[str, Any] = {}
    for key, (name, fields) in ENTRIES.items():
        entry = _entry(evaluation, name, fields)
        if entry is not None:
            content[key] = entry
            if "truth_ratio" in fields.values():
                content[key]["agg_value"] = evaluation.value(f"{name}_truth_ratio")
    for attack, column in ATTACKS.items():
        sets = {name: _entry(evaluation, name, {"score": column}) for name in ("forget", "holdout")}
        if None not in sets.values():
            auc = evaluation.value(f"membership_auc_{attack}")
            content[f"mia_{attack}"] = sets | {"auc": auc, "agg_value": auc}
    for name in HEADLINES:
        if name in evaluation.figures:
            content[name] = {"agg_value": evaluation.value(name)}
    Path(path).write_text(json.dumps(dict(sorted(content.items())), indent=4), encoding="utf-8")


def _entry(evaluation: Evaluation, name: str, fields: dict[str, str]) -> dict[str, Any] | None:
    """Values of a set by row and their mean; `None` if the column to be aggregated was not measured."""
    columns = evaluation.rows.get(name, {}) | {"generation": evaluation.answers.get(name)}
    aggregated, column = next(iter(fields.items()))
    if columns.get(column) is None:
        return None
    table = {theirs: columns[ours] for theirs, ours in fields.items() if columns.get(ours) is not None}
    if aggregated == "avg_loss":  # the only entries whose probabilities are no columns of ours
        aggregated = "prob"
        table = {
            "prob": [None if loss is None else np.exp(-np.array(loss)).tolist() for loss in columns[column]]
        } | table
    rows = [str(row) for row in columns["row"]]
    if len(set(rows)) < len(rows):
        raise UnlearningError(
            f"{name} set: several rows have the same id, such as the turns of one conversation, which open-unlearning's "
            f"format can't hold. Use {OWN_LOG}."
        )
    by_row = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
    means = [np.mean(value) for value in table[aggregated] if value is not None]
    return {
        "agg_value": float(np.mean(means)) if means else None,
        "value_by_index": dict(zip(rows, by_row, strict=True)),
    }

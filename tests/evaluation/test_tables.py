"""What other programs read of an evaluation."""

from __future__ import annotations

import csv
import json
import math

import pytest

from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation.figures import Figure, not_computed
from hf_unlearn.evaluation.results import Evaluation
from hf_unlearn.evaluation.selection import Choice
from hf_unlearn.evaluation.tables import write_tables


def make_evaluation(alpha: float | None) -> Evaluation:
    return Evaluation(
        "custom",
        alpha,
        rows={
            "forget": {"row": [7, 3], "probability": [0.5, math.nan], "wrong_losses": [[1.0, 2.5], [3.0, math.inf]]},
            "holdout": {"row": [0], "loss": [0.25]},
        },
        answers={"forget": ['Ann, "the spy"', "two\nlines – ä"]},
        figures={
            "forget_probability": Figure(0.5, 2, 0.4, 0.6),
            "retain_probability": Figure(0.8, 2, note="a, note"),
            "forget_quality": not_computed("no retrained log"),
        },
    )


def make_choice() -> Choice:
    return Choice(
        alpha=2.0,
        met=False,
        rule="a rule",
        verdict="a verdict",
        target="",
        utility="retain_probability",
        min_utility=0.95,
        auc_tolerance=None,
        evidence=[{"alpha": 2.0, "utility": 0.8, "utility_share": 1.0, "within_budget": True}],
    )


def read_csv(path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_json_is_strict_and_can_be_read_back(tmp_path):
    path = write_tables(tmp_path / "new", [make_evaluation(0.0), make_evaluation(2.0)], make_choice())[0]

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert [each["alpha"] for each in content["evaluations"]] == [0.0, 2.0]
    assert content["choice"]["evidence"][0]["within_budget"] is True and content["choice"]["alpha"] == 2.0
    again, original = Evaluation.from_dict(content["evaluations"][1]), make_evaluation(2.0)
    assert again.figures == original.figures and again.answers == original.answers
    assert again.rows["forget"]["wrong_losses"] == [[1.0, 2.5], [3.0, None]]
    assert again.rows["forget"]["probability"] == [0.5, None] and again.rows["holdout"] == original.rows["holdout"]


def test_figures(tmp_path):
    lines = read_csv(write_tables(tmp_path, [make_evaluation(0.0), make_evaluation(2.0)])[1])
    assert [(line["alpha"], line["figure"]) for line in lines] == [
        (alpha, figure)
        for alpha in ("0.0", "2.0")
        for figure in ("forget_probability", "retain_probability", "forget_quality")
    ]
    probability, retain, quality = lines[:3]
    assert list(probability) == ["alpha", "figure", "value", "n", "low", "high", "note"]
    assert list(probability.values())[2:] == ["0.5", "2", "0.4", "0.6", ""]
    assert list(retain.values())[2:] == ["0.8", "2", "", "", "a, note"]
    assert list(quality.values())[2:] == ["", "0", "", "", "not computed: no retrained log"]


def test_rows(tmp_path):
    lines = read_csv(write_tables(tmp_path, [make_evaluation(None)])[2])
    assert [(line["alpha"], line["set"], line["row"]) for line in lines] == [
        ("", "forget", "7"),
        ("", "forget", "3"),
        ("", "holdout", "0"),
    ]
    first, second, third = lines
    assert first["probability"] == "0.5" and second["probability"] == "" and third["loss"] == "0.25"
    assert json.loads(first["wrong_losses"]) == [1.0, 2.5] and json.loads(second["wrong_losses"]) == [3.0, None]
    assert [line["answer"] for line in lines] == ['Ann, "the spy"', "two\nlines – ä", ""]


def test_picture(tmp_path):
    paths = write_tables(tmp_path, [make_evaluation(0.0), make_evaluation(2.0)], make_choice(), make_evaluation(None))
    assert [path.name for path in paths] == ["evaluation.json", "figures.csv", "rows.csv", "evaluation.png"]
    header = paths[3].read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert int.from_bytes(header[16:20], "big") == round(2 * 4.2 * 150)  # two panels beside each other


def test_no_picture_where_there_is_nothing_to_draw(tmp_path):
    evaluation = make_evaluation(None)
    del evaluation.figures["retain_probability"]
    paths = write_tables(tmp_path, [evaluation])
    assert sorted(tmp_path.iterdir()) == sorted(paths) and len(paths) == 3


def test_nothing_to_write(tmp_path):
    with pytest.raises(UnlearningError, match="no evaluation"):
        write_tables(tmp_path / "new", [])
    assert not (tmp_path / "new").exists()

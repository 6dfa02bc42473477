"""LUME: prompts, sets and the aggregate of SemEval-2025 task 4, on a small folder with its layout."""

from __future__ import annotations

import json

import datasets
import pytest

from hf_unlearn import UnlearningError
from hf_unlearn.evaluation.figures import Figure
from hf_unlearn.evaluation.protocols.lume import lume_protocol
from hf_unlearn.evaluation.results import Evaluation


def side_rows(side: str) -> list[dict[str, str]]:
    """Of each task one beginning, `one two three four` to be recited, and two questions."""
    rows = []
    for task in (1, 2, 3):
        document = {
            "task": f"Task{task}",
            "input": f"The {side} story {task} begins with",
            "output": "one two three four",
        }
        rows.append({"id": f'"{side}-{task}"sc1', **document})
        for number, answer in enumerate(("900-22-6238", "Mira")):
            question = {"task": f"Task{task}", "input": f"Who or what is {number}?", "output": answer}
            rows.append({"id": f"{side}{task}qa{number}", **question})
    return rows


def write_lines(path, rows):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    for side in ("forget", "retain"):
        datasets.Dataset.from_list(side_rows(side)).to_parquet(
            tmp_path / "data" / f"{side}_validation-00000-of-00001.parquet"
        )
    write_lines(
        tmp_path / "mia_data" / "member.jsonl", [{"id": 1, "document": "Seen."}, {"id": 2, "document": "Read."}]
    )
    write_lines(tmp_path / "mia_data" / "nonmember.jsonl", [{"id": 3, "document": "Unseen."}])
    return tmp_path


def evaluation(figures: dict[str, Figure] | None = None) -> Evaluation:
    """The forget side recites a quarter and knows half, the retain side recites all and knows half."""
    recited = {"forget": "one and no more", "retain": "one two three four"}
    rows, answers = {}, {}
    for side in ("forget", "retain"):
        for task in (1, 2, 3):
            rows[f"{side}_task{task}_completion"] = {"row": [0], "ground_truth": ["one two three four"]}
            answers[f"{side}_task{task}_completion"] = [recited[side]]
            rows[f"{side}_task{task}_question"] = {"row": [0, 1], "ground_truth": ["900-22-6238", "Mira"]}
            answers[f"{side}_task{task}_question"] = ["900226238", " MIRA\n"]
    rows["forget"] = {"row": [0, 1], "loss": [1.0, 3.0]}
    rows["holdout"] = {"row": [0], "loss": [2.0]}
    return Evaluation(protocol="lume", rows=rows, answers=answers, figures=figures or {})


def test_sets(folder):
    sets = lume_protocol(folder).sets
    kinds = {"completion": (("rouge",), 1), "question": (("exact_match",), 2)}
    for side in ("forget", "retain"):
        for task in (1, 2, 3):
            for kind, (measures, count) in kinds.items():
                part = sets.pop(f"{side}_task{task}_{kind}")
                assert (part.measures, len(part.rows), part.max_new_tokens) == (measures, count, 256)
                if (side, task, kind) == ("retain", 2, "completion"):
                    assert part.rows[0] == {
                        "prompt": "The retain story 2 begins with",
                        "completion": "one two three four",
                        "row": 0,
                    }
    assert {name: part.measures for name, part in sets.items()} == {
        "forget": ("membership",),
        "holdout": ("membership",),
    }
    assert sets["forget"].rows["completion"] == ["Seen.", "Read."]
    assert sets["forget"].rows["prompt"] == ["", ""]


def test_task_scores(folder):
    figures = lume_protocol(folder).figures(evaluation(), None)
    assert figures["forget_task1_regurgitation"].value == pytest.approx(1 / 4)
    assert figures["retain_task3_regurgitation"].value == 1
    # case and outer spaces do not count, dashes do
    assert figures["forget_task2_knowledge"].value == pytest.approx(1 / 2)
    assert figures["forget_task2_knowledge"].n == 2
    assert figures["retain_score"].value == pytest.approx((1 + 1 / 2) / 2)


def test_task_aggregate(folder):
    # forget side 3 × (1 − 1/4) and 3 × (1 − 1/2), retain side 3 × 1 and 3 × 1/2
    expected = 12 / (3 / (3 / 4) + 3 / (1 / 2) + 3 / 1 + 3 / (1 / 2))
    figure = lume_protocol(folder).figures(evaluation(), None)["task_aggregate"]
    assert figure.value == pytest.approx(expected)
    assert figure.n == 18


def test_one_score_of_zero_makes_the_aggregate_zero(folder):
    known = evaluation()
    known.answers["forget_task1_question"] = ["900-22-6238", "Mira"]
    assert lume_protocol(folder).figures(known, None)["task_aggregate"].value == 0


def test_membership_score(folder):
    protocol = lume_protocol(folder)
    figures = protocol.figures(evaluation(), None)
    assert figures["membership_auc_loss"].value == pytest.approx(1 / 2)
    assert figures["membership_score"].value == pytest.approx(1)
    for losses in ([1.0, 1.5], [3.0, 4.0]):  # AUC 1 and 0 give members away alike
        standing_out = evaluation()
        standing_out.rows["forget"]["loss"] = losses
        assert protocol.figures(standing_out, None)["membership_score"].value == pytest.approx(0)


def test_final_score(folder):
    protocol = lume_protocol(folder)
    without = protocol.figures(evaluation(), None)
    assert without["final_score"].value is None
    assert "mmlu" in without["final_score"].note
    assert "task_aggregate" not in without["final_score"].note
    assert without["mmlu"].value is None
    figures = protocol.figures(evaluation({"mmlu": Figure(0.45, 14042)}), None)
    aggregate = 12 / (4 + 6 + 3 + 6)
    assert figures["final_score"].value == pytest.approx((aggregate + 1 + 0.45) / 3)
    assert figures["mmlu"] == Figure(0.45, 14042)


def test_what_is_missing_is_named(folder):
    lacking = evaluation()
    del lacking.answers["retain_task2_question"]
    figures = lume_protocol(folder).figures(lacking, None)
    assert figures["task_aggregate"].value is None
    assert "retain_task2_knowledge" in figures["task_aggregate"].note
    assert "retain_task2_knowledge" in figures["retain_score"].note
    assert "task_aggregate" in figures["final_score"].note


def test_release_without_splits_and_without_membership_data(tmp_path):
    for side in ("forget", "retain"):
        write_lines(tmp_path / "data" / f"{side}.jsonl", side_rows(side))
    protocol = lume_protocol(tmp_path)
    assert len(protocol.sets) == 12
    bare = evaluation()
    del bare.rows["forget"], bare.rows["holdout"]
    assert "mia_data" in protocol.figures(bare, None)["membership_score"].note


def test_split_is_taken(folder):
    for side in ("forget", "retain"):
        rows = [row | {"output": "train"} for row in side_rows(side)]
        write_lines(folder / "train" / f"{side}.jsonl", rows)
    assert lume_protocol(folder, "train").sets["forget_task1_completion"].rows["completion"] == ["train"]
    completions = lume_protocol(folder).sets["forget_task1_completion"].rows["completion"]
    assert completions == ["one two three four"]


def test_limit(folder):
    sets = lume_protocol(folder, limit=1).sets
    assert {len(part.rows) for part in sets.values()} == {1}


def test_a_limit_that_leaves_no_rows(folder):
    with pytest.raises(UnlearningError, match="limit=0 leaves no rows"):
        lume_protocol(folder, limit=0)


def test_utility_is_a_figure(folder):
    protocol = lume_protocol(folder)
    assert protocol.utility in protocol.figures(evaluation(), None)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "1sc1", "task": "Task9", "input": "a", "output": "b"}], "row 0: its task is 'Task9'"),
        ([{"id": "1xx1", "task": "Task1", "input": "a", "output": "b"}], "its id '1xx1'"),
        ([{"id": "1sc1", "task": "Task1", "input": "a", "output": "b"}], "no rows for forget_task1_question"),
        ([{"id": "1sc1", "task": "Task1", "question": "a", "output": "b"}], "none named input"),
    ],
)
def test_files_of_another_shape(tmp_path, rows, message):
    write_lines(tmp_path / "forget.jsonl", rows)
    with pytest.raises(UnlearningError, match=message):
        lume_protocol(tmp_path)


def test_split_and_folder_that_do_not_exist(tmp_path):
    with pytest.raises(UnlearningError, match="split='test'"):
        lume_protocol(tmp_path, "test")
    with pytest.raises(UnlearningError, match="forget_validation"):
        lume_protocol(tmp_path)

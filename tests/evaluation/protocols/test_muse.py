"""MUSE: prompts, sets and figures, on a small folder with the layout of the benchmark."""

from __future__ import annotations

import json

import datasets
import pytest

from hf_unlearn import UnlearningError
from hf_unlearn.evaluation.protocols.muse import first_answer, muse_protocol, muse_request
from hf_unlearn.evaluation.results import Evaluation


FILES = {
    "verbmem/forget": [
        {"prompt": "The harbour of Ostrel was closed for three", "gt": "weeks after the storm"},
        {"prompt": "Its lighthouse keeper said he had", "gt": "never seen such waves"},
    ],
    "knowmem/forget_qa": [
        {"question": "How long was the harbour closed?", "answer": "three weeks"},
        {"question": "What did the keeper see?", "answer": "waves"},
    ],
    "knowmem/forget_qa_icl": [
        {"question": "Where is the harbour?", "answer": "in Ostrel"},
        {"question": "Who keeps the light?", "answer": "Mr Dane"},
    ],
    "knowmem/retain_qa": [{"question": "What grows in Brill?", "answer": "barley"}],
    "knowmem/retain_qa_icl": [{"question": "Where is Brill?", "answer": "inland"}],
    "privleak/forget": ["The harbour was closed.", "The keeper watched."],
    "privleak/holdout": ["Trains were late.", "A bridge was opened.", "Rain fell."],
    "scal/forget_2": ["One.", "Two."],
    "sust/forget_2": ["Two."],
}


@pytest.fixture
def folder(tmp_path):
    for stem, content in FILES.items():
        path = tmp_path / f"{stem}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")
    return tmp_path


def evaluation(**options) -> Evaluation:
    """Two of two forget rows, out of order; one of them is answered word for word, then with a further question."""
    rows = {
        "forget_verbatim": {"row": [0, 1], "ground_truth": ["weeks after the storm", "never seen such waves"]},
        "forget_knowledge": {"row": [1, 0], "ground_truth": ["waves", "three weeks"]},
        "retain_knowledge": {"row": [0], "ground_truth": ["barley"]},
        "forget": {"row": [0, 1], "loss": [1.0, 4.0], "min_k_score": [2.0, 6.0]},
        "holdout": {"row": [0, 1, 2], "loss": [2.0, 3.0, 5.0], "min_k_score": [3.0, 4.0, 5.0]},
    }
    answers = {
        "forget_verbatim": ["weeks after the storm", "never"],
        "forget_knowledge": ["nothing", "three weeks\n\nQuestion: Who was there?\nAnswer: nobody"],
        "retain_knowledge": ["barley and wheat\nQuestion"],
    }
    return Evaluation(protocol="muse-news", rows=rows | options, answers=answers)


def test_questions_follow_the_examples(folder):
    rows = muse_protocol("News", folder).sets["forget_knowledge"].rows
    assert rows[0] == {
        "prompt": "Question: Where is the harbour?\nAnswer: in Ostrel\n\nQuestion: Who keeps the light?\nAnswer: Mr Dane\n\n"
        "Question: How long was the harbour closed?\nAnswer: ",
        "completion": "three weeks",
        "row": 0,
    }


def test_sets(folder):
    sets = muse_protocol("News", folder).sets
    measured = {name: (part.measures, part.max_new_tokens, len(part.rows)) for name, part in sets.items()}
    assert measured == {
        "forget_verbatim": (("rouge",), 128, 2),
        "forget_knowledge": (("rouge",), 32, 2),
        "retain_knowledge": (("rouge",), 32, 1),
        "forget": (("membership",), 200, 2),
        "holdout": (("membership",), 200, 3),
    }
    assert sets["holdout"].max_length == 2048
    assert sets["forget_verbatim"].rows[1] == {
        "prompt": "Its lighthouse keeper said he had",
        "completion": "never seen such waves",
        "row": 1,
    }
    assert sets["holdout"].rows[2] == {"prompt": "", "completion": "Rain fell.", "row": 2}


def test_limit_keeps_all_examples(folder):
    rows = muse_protocol("News", folder, limit=1).sets["forget_knowledge"].rows
    assert len(rows) == 1
    assert rows[0]["prompt"].count("Question: ") == 3


def test_a_limit_that_leaves_no_rows(folder):
    with pytest.raises(UnlearningError, match="limit=0 leaves no rows"):
        muse_protocol("News", folder, limit=0)


def test_layout_of_the_hub(folder):
    for stem, content in FILES.items():
        (folder / f"{stem}.json").unlink()
        rows = [row if isinstance(row, dict) else {"text": row} for row in content]
        for shard in range(min(2, len(rows))):
            part = datasets.Dataset.from_list(rows[shard::2])
            part.to_parquet(folder / f"{stem}-{shard:05}-of-00002.parquet")
    sets = muse_protocol("News", folder).sets
    assert sets["forget_knowledge"].rows["completion"] == ["three weeks", "waves"]
    assert sorted(sets["holdout"].rows["completion"]) == sorted(FILES["privleak/holdout"])


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("in May\n\nQuestion: Why?", "in May"),
        ("in May\nQuestion: Why?", "in May"),
        ("in May Question: Why?", "in May "),
        ("in May\nor June", "in May\nor June"),
        ("\n\nin May", ""),
    ],
)
def test_first_answer(text, answer):
    assert first_answer(text) == answer


def test_figures(folder):
    figures = muse_protocol("News", folder).figures(evaluation(), None)
    # "never": precision 1, recall 1/4 → F1 = .4; the other row is recited
    assert figures["verbmem"].value == pytest.approx(100 * (1 + 0.4) / 2)
    assert figures["verbmem"].n == 2
    # the row answered rightly counts in full although the text goes on
    assert figures["knowmem_forget"].value == pytest.approx(50)
    # "barley and wheat" for "barley": precision 1/3, recall 1 → F1 = .5
    assert figures["knowmem_retain"].value == pytest.approx(50)
    # loss: 1 is below all of 2, 3, 5 and 4 below one → 4 of 6 pairs; min-k: 2 below all, 6 below none → 3 of 6
    assert figures["membership_auc_loss"].value == pytest.approx(4 / 6)
    assert figures["membership_auc_min_k"].value == pytest.approx(3 / 6)
    assert "membership_auc_reference" not in figures
    assert "per cent" in figures["verbmem"].note


def test_privleak(folder):
    figures = muse_protocol("News", folder).figures
    members = evaluation(forget={"row": [0, 1], "min_k_score": [1.0, 3.5]})  # 3 + 2 of 6 pairs
    alone = figures(members, None)["privleak"]
    assert alone.value == pytest.approx(100 * (1 / 6 - 1 / 2) / (1 / 2))
    assert "0.5" in alone.note
    retrained = evaluation(forget={"row": [0, 1], "min_k_score": [3.5, 9.0]})  # 2 + 0 of 6 pairs
    against = figures(members, retrained)["privleak"]
    assert against.value == pytest.approx(100 * (1 / 6 - 4 / 6) / (4 / 6))
    assert against.n == 5
    other_rows = evaluation(forget={"row": [0, 7], "min_k_score": [3.5, 9.0]})
    with pytest.raises(UnlearningError, match="same rows"):
        figures(members, other_rows)
    assert "0.3333" in against.note


def test_what_is_missing_is_not_computed(folder):
    figures = muse_protocol("News", folder).figures(Evaluation("muse-news"), None)
    assert set(figures) == {"verbmem", "knowmem_forget", "knowmem_retain", "privleak"}
    assert {figure.value for figure in figures.values()} == {None}
    losses_only = evaluation(forget={"row": [0, 1], "loss": [1.0, 2.0]})
    figures = muse_protocol("News", folder).figures(losses_only, None)
    assert "membership_auc_loss" in figures
    assert "no min-k scores" in figures["privleak"].note


def test_utility_is_a_figure(folder):
    protocol = muse_protocol("Books", folder)
    assert protocol.name == "muse-books"
    assert protocol.utility in protocol.figures(evaluation(), None)


def test_requests(folder):
    assert muse_request("News", "scal", 2, folder)["text"] == ["One.", "Two."]
    assert muse_request("News", "sust", 2, folder)["text"] == ["Two."]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("BBC", "scal", 1), "corpus='BBC'"),
        (("News", "scale", 1), "kind='scale'"),
        (("News", "scal", 5), "1 to 4"),
        (("Books", "sust", 1), "for Books"),
        (("News", "scal", 3), "scal/forget_3"),
    ],
)
def test_requests_that_do_not_exist(folder, arguments, message):
    with pytest.raises(UnlearningError, match=message):
        muse_request(*arguments, folder)


def test_files_of_another_shape(folder):
    (folder / "knowmem" / "retain_qa.json").write_text('[{"q": "What grows in Brill?", "answer": "barley"}]')
    with pytest.raises(UnlearningError, match="knowmem/retain_qa has the columns q, answer, and none named question"):
        muse_protocol("News", folder)
    (folder / "knowmem" / "retain_qa.json").write_text('[{"question": ')
    with pytest.raises(UnlearningError, match="line 1"):
        muse_protocol("News", folder)

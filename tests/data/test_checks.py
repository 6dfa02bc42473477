from __future__ import annotations

import json

import datasets
import pytest
from rich.console import Console
from word_tokenizer import ids

from hf_unlearn.data import (
    DataReport,
    check_sets,
    data_hash,
    drop_untrainable,
    raise_for_untrainable,
    summarize,
    to_prompt_completion,
    tokenize_rows,
)
from hf_unlearn.errors import UnlearningError


MAX_LENGTH = 6


@pytest.fixture
def tokenized(tokenizer):
    def build(*pairs: tuple[str, str | None]) -> datasets.Dataset:
        rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
        rows = to_prompt_completion(datasets.Dataset.from_list(rows), name="set", chat=False)
        return tokenize_rows(rows, tokenizer, MAX_LENGTH)

    return build


@pytest.fixture
def report(tokenized):
    def build(forget: datasets.Dataset, retain: datasets.Dataset | None = None) -> DataReport:
        return check_sets(forget, retain, max_length=MAX_LENGTH)

    return build


ADA, BO = ("who is Ada", " a poet"), ("who is Bo", " painter")
EMPTY, NULL, LONG = ("who is Ada ?", " "), ("who is Bo ?", None), ("who is Ada and Bo ?", " painter")


def test_summary(tokenized):
    summary = summarize(tokenized(ADA, BO, EMPTY, NULL, LONG), name="forget set", max_length=MAX_LENGTH)
    assert (summary.rows, summary.source_rows, summary.longest) == (5, 5, 6)
    assert summary.answer_tokens == 2 + 2  # "a poet" without its EOS, "painter </s>"
    assert summary.prompt_tokens == 4 + 4 + 5 + 5 + 6
    assert summary.cut_rows == [0]
    assert summary.untrainable_rows == [
        (2, "the answer is empty"),
        (3, "the answer is empty"),
        (4, "the whole answer lies beyond max_length=6"),
    ]


def test_one_token_answer_is_trained_on(tokenized, report):
    forget = tokenized(("who", " Ada"))
    assert forget[0]["labels"] == [-100, -100, *ids("Ada </s>")]
    raise_for_untrainable(report(forget))


def test_turns_of_a_conversation_share_their_source_row(chat_tokenizer):
    turns = [{"role": role, "content": "Ada"} for role in ("user", "assistant") * 2]
    rows = datasets.Dataset.from_list([{"messages": turns[:2]}, {"messages": turns}])
    rows = to_prompt_completion(rows, name="forget set", chat=True)
    report = check_sets(tokenize_rows(rows, chat_tokenizer, 8), None, max_length=8)
    assert (report.forget.rows, report.forget.source_rows) == (3, 2)
    assert report.forget.duplicate_rows == [(1, 0)]
    with pytest.raises(UnlearningError, match=r"1 of 3 rows of the forget set .*max_length=8 \(rows 1\)"):
        raise_for_untrainable(report)


def test_duplicates_but_for_case_and_space(tokenized, report):
    same = ("WHO  is\nada", "a POET ")
    found = report(tokenized(ADA, BO, same, ADA), tokenized(("who is", " poet"), BO, same, ADA))
    assert found.forget.duplicate_rows == [(2, 0), (3, 0)]
    assert found.retain.duplicate_rows == [(3, 2)]
    assert found.shared_rows == [(0, 2), (1, 1), (2, 2), (3, 2)]


def test_another_answer_is_no_duplicate(tokenized, report):
    found = report(tokenized(ADA), tokenized((ADA[0], " painter")))
    assert (found.forget.duplicate_rows, found.shared_rows) == ([], [])


def test_duplicates_in_chats(chat_tokenizer):
    rows = [{"question": "who is Ada", "answer": "a poet"}, {"question": "Who is Ada ", "answer": "A poet"}]
    rows = to_prompt_completion(datasets.Dataset.from_list(rows), name="set", chat=True)
    assert summarize(tokenize_rows(rows, chat_tokenizer, None), name="set").duplicate_rows == [(1, 0)]


def test_forget_rows_must_all_be_trained_on(tokenized, report):
    with pytest.raises(UnlearningError) as error:
        raise_for_untrainable(report(tokenized(EMPTY, *[LONG] * 12, ADA), tokenized(BO)))
    message = str(error.value)
    assert "13 of 14 rows of the forget set" in message
    assert "the answer is empty (rows 0)" in message
    assert "max_length=6 (rows 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 2 more)" in message
    assert "raise max_length" in message


def test_retain_rows_are_reported_and_dropped(tokenized, report):
    retain = tokenized(EMPTY, BO, LONG)
    found = report(tokenized(ADA), retain)
    raise_for_untrainable(found)
    assert any("2 of 3 rows of the retain set are left out" in warning for warning in found.warnings())
    assert drop_untrainable(retain)["row"][:] == [1]


def test_retain_set_of_which_nothing_is_left(tokenized, report):
    with pytest.raises(UnlearningError, match=r"No row of the retain set .*empty \(rows 0\)"):
        raise_for_untrainable(report(tokenized(ADA), tokenized(EMPTY)))


def test_one_forget_row_and_no_retain_set(tokenized, report):
    found = report(tokenized(BO))
    raise_for_untrainable(found)
    assert (found.forget.rows, found.retain, found.warnings()) == (1, None, [])


def test_single_token_that_nothing_predicts(report):
    row = {"prompt": "", "completion": "Ada", "row": 0, "input_ids": [5], "labels": [-100], "num_cut": 0}
    assert report(datasets.Dataset.from_list([row])).forget.untrainable_rows == [
        (0, "it is one token long, and nothing predicts that token")
    ]


def test_tokenized_elsewhere(report):
    rows = datasets.Dataset.from_list([{"input_ids": [1, 2], "labels": [-100, 2]}])
    with pytest.raises(UnlearningError, match="forget set is tokenised already but lacks the columns prompt, "):
        report(rows)


def test_report_as_json_table_and_sentences(tokenized, report):
    found = report(tokenized(ADA, ADA), tokenized(ADA, LONG))
    as_dict = found.to_dict()
    assert json.loads(json.dumps(as_dict)) == as_dict
    assert as_dict["forget"]["duplicate_rows"] == [[1, 0]]
    assert as_dict["shared_rows"] == [[0, 0], [1, 0]]

    console = Console(width=100)
    with console.capture() as capture:
        console.print(found.render())
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capture.get().splitlines()]
    assert ["rows not trained on", "0", "1"] in lines
    assert ["rows in both sets", "2", ""] in lines

    shared, left_out, cut, repeated, retain_cut = found.warnings()
    assert "2 forget rows also stand in the retain set (forget = retain: 0 = 0, 1 = 0)" in shared
    assert "1 of 2 rows of the retain set are left out" in left_out
    assert "2 rows of the forget set lose the end of their answer to max_length (rows 0, 1)" in cut
    assert "1 rows of the forget set repeat an earlier one (1 = 0)" in repeated
    assert "1 rows of the retain set lose the end" in retain_cut


def test_hash(tokenized):
    rows = datasets.Dataset.from_list([{"prompt": "é", "completion": "b", "row": 0}])
    # printf '["é", "b"]\n' | sha256sum
    assert data_hash(rows) == "b58654b706faa66ced7c8c057dc21a804645639b3d413238a410e7561017d664"
    assert data_hash(tokenized(ADA, BO)) != data_hash(tokenized(BO, ADA))
    assert data_hash(tokenized(ADA, BO).remove_columns(["input_ids", "labels"])) == data_hash(tokenized(ADA, BO))

"""Paraphrases and wrong answers of the forget rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset

from hf_unlearn import UnlearningError, to_prompt_completion
from hf_unlearn.data.hard import paraphrased_rows, wrong_answer_rows


TOFU = Path(__file__).parents[3] / "shared" / "data" / "tofu"
ROWS = [
    {
        "question": "Who is Ada?",
        "answer": "A poet.",
        "other": ["Ada writes verse.", "A writer of poems."],
        "asked": "What does Ada do?",
        "wrong": ["A painter.", "A pilot."],
    },
    {"question": "Who is Bo?", "answer": "A cook.", "other": ["Bo cooks."], "asked": "And Bo?", "wrong": ["A judge."]},
]


def make(rows: list[dict], chat: bool = False) -> tuple[Dataset, Dataset]:
    rows = Dataset.from_list(rows)
    return to_prompt_completion(rows, name="forget set", chat=chat), rows


def tuples(rows: Dataset) -> list[tuple]:
    return [(row["prompt"], row["completion"], row["row"]) for row in rows]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


class TestParaphrases:
    def test_answers_and_questions_as_text(self):
        ada, bo = "Question: Who is Ada?\nAnswer:", "Question: Who is Bo?\nAnswer:"
        assert tuples(paraphrased_rows(*make(ROWS), answers="other", questions="asked")) == [
            (ada, " Ada writes verse.", 0),
            (ada, " A writer of poems.", 0),
            (bo, " Bo cooks.", 1),
            ("Question: What does Ada do?\nAnswer:", " A poet.", 0),
            ("Question: And Bo?\nAnswer:", " A cook.", 1),
        ]

    def test_questions_as_messages_keep_what_comes_before(self):
        system = {"role": "system", "content": "Be brief."}
        rows = [
            {"prompt": [system, *user("Who is Ada?")], "completion": assistant("A poet."), "asked": ["Ada?", "A?"]}
        ]
        assert tuples(paraphrased_rows(*make(rows, chat=True), questions="asked")) == [
            ([system, *user("Ada?")], assistant("A poet."), 0),
            ([system, *user("A?")], assistant("A poet."), 0),
        ]

    def test_plain_rows(self):
        rows = [{"prompt": "The capital of Atlantis is", "completion": " Poseidonis.", "other": "called Poseidonis."}]
        prompt = "The capital of Atlantis is"
        assert tuples(paraphrased_rows(*make(rows), answers="other")) == [(prompt, " called Poseidonis.", 0)]
        assert tuples(paraphrased_rows(*make(rows), questions="other")) == [("called Poseidonis.", " Poseidonis.", 0)]
        texts = [{"text": "Ann flies.", "other": "Ann is a pilot."}]
        assert tuples(paraphrased_rows(*make(texts), answers="other")) == [("", "Ann is a pilot.", 0)]

    @pytest.mark.parametrize(
        ("rows", "options", "message"),
        [
            (ROWS, {"answers": "others"}, r"no column `others`; it has question, answer, other"),
            ([ROWS[0], ROWS[1] | {"other": []}], {"answers": "other"}, r"row 1: `other` holds no text"),
            ([ROWS[0] | {"asked": None}, ROWS[1]], {"questions": "asked"}, r"row 0: `asked` holds no text"),
            ([ROWS[0] | {"other": ["a", "  "]}, ROWS[1]], {"answers": "other"}, r"row 0: `other`"),
            ([{"text": "a b", "other": "c"}], {"questions": "other"}, r"row 0: it has no prompt.*`other`"),
            (
                [{"messages": [*user("a"), *assistant("b")] * 2, "other": "c"}],
                {"answers": "other"},
                r"row 0: the conversation has 2 assistant turns",
            ),
        ],
    )
    def test_what_cannot_be_used_is_named(self, rows, options, message):
        pairs, rows = make(rows, chat="messages" in rows[0])
        with pytest.raises(UnlearningError, match=message):
            paraphrased_rows(pairs, rows, **options)


class TestWrongAnswers:
    def test_each_is_a_row_of_the_same_prompt(self):
        assert tuples(wrong_answer_rows(*make(ROWS, chat=True), "wrong")) == [
            (user("Who is Ada?"), assistant("A painter."), 0),
            (user("Who is Ada?"), assistant("A pilot."), 0),
            (user("Who is Bo?"), assistant("A judge."), 1),
        ]

    def test_one_that_is_right_is_refused(self):
        pairs, rows = make([ROWS[0], ROWS[1] | {"wrong": ["A judge.", "a  COOK."]}])
        with pytest.raises(UnlearningError, match=r"row 1: a wrong answer in `wrong` equals the right one"):
            wrong_answer_rows(pairs, rows, "wrong")

    def test_one_that_is_a_paraphrase_is_refused(self):
        pairs, rows = make([ROWS[0] | {"wrong": ["ada writes verse."]}, ROWS[1]])
        assert len(wrong_answer_rows(pairs, rows, "wrong")) == 2
        paraphrases = paraphrased_rows(pairs, rows, answers="other")
        with pytest.raises(UnlearningError, match=r"row 0: a wrong answer"):
            wrong_answer_rows(pairs, rows, "wrong", paraphrases=paraphrases)

    def test_the_right_answer_of_another_row_is_wrong_here(self):
        pairs, rows = make([ROWS[0] | {"wrong": ["A cook."]}, ROWS[1]])
        assert len(wrong_answer_rows(pairs, rows, "wrong")) == 2

    def test_a_missing_column_and_an_empty_list(self):
        with pytest.raises(UnlearningError, match="no column `lies`"):
            wrong_answer_rows(*make(ROWS), "lies")
        with pytest.raises(UnlearningError, match="row 1: `wrong` holds no text"):
            wrong_answer_rows(*make([ROWS[0], ROWS[1] | {"wrong": []}]), "wrong")

    def test_every_turn_counts_for_a_conversation(self):
        one, two = [*user("a"), *assistant("b")], [*user("a"), *assistant("b")] * 2
        rows = [{"messages": one, "wrong": "c"}, {"messages": two, "wrong": "c"}]
        with pytest.raises(UnlearningError, match="row 1: the conversation has 2"):
            wrong_answer_rows(*make(rows, chat=True), "wrong")


@pytest.mark.skipif(not TOFU.is_dir(), reason="needs the TOFU sets")
def test_tofu():
    source = json.loads((TOFU / "forget10_perturbed.json").read_text(encoding="utf-8"))
    pairs, rows = make(source, chat=True)
    paraphrases = paraphrased_rows(pairs, rows, answers="paraphrased_answer", questions="paraphrased_question")
    assert len(paraphrases) == 800
    assert paraphrases[1]["completion"][0]["content"] == source[1]["paraphrased_answer"]
    assert paraphrases[402]["prompt"][0]["content"] == source[2]["paraphrased_question"]
    wrong = wrong_answer_rows(pairs, rows, "perturbed_answer", paraphrases=paraphrases)
    assert len(wrong) == sum(len(row["perturbed_answer"]) for row in source)
    assert [row["completion"][0]["content"] for row in wrong][5:10] == source[1]["perturbed_answer"]
    assert {row["row"] for row in wrong} == set(range(400))

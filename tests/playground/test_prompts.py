"""Prompts to click on."""

from __future__ import annotations

import datasets
import pytest

from hf_unlearn.errors import UnlearningError
from hf_unlearn.playground import known_prompts
from hf_unlearn.playground.prompts import MAX_PROMPTS


def prompts(*rows: dict, chat: bool = False):
    return known_prompts(datasets.Dataset.from_list(list(rows)), "forget set", chat)


def test_questions_as_the_model_gets_them():
    row = {"question": "Who is Ada?", "answer": "A poet."}
    (plain,) = prompts(row)
    assert (plain.where, plain.text, plain.completion) == (
        "forget set, row 0",
        "Question: Who is Ada?\nAnswer:",
        " A poet.",
    )
    (chat,) = prompts(row, chat=True)
    assert chat.text == "Who is Ada?"
    assert chat.prompt == [{"role": "user", "content": "Who is Ada?"}]
    assert chat.completion == [{"role": "assistant", "content": "A poet."}]


def test_conversations_show_their_last_question():
    turns = [("user", "Hello"), ("assistant", "Hi"), ("user", "Who is Ada?"), ("assistant", "A poet.")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    first, second = prompts(row, chat=True)
    assert (first.text, second.text) == ("Hello", "Who is Ada?")
    assert len(second.prompt) == 3


def test_rows_without_a_prompt_or_an_answer():
    rows = [{"prompt": " ", "completion": "a"}, {"prompt": "b", "completion": ""}, {"prompt": "c", "completion": "d"}]
    assert [(known.where, known.completion) for known in prompts(*rows)] == [
        ("forget set, row 1", None),
        ("forget set, row 2", "d"),
    ]
    assert prompts({"text": "all of it"}) == []


def test_a_large_set_is_cut():
    found = prompts(*({"prompt": f"p{row}", "completion": "c"} for row in range(MAX_PROMPTS + 5)))
    assert [known.text for known in found] == [f"p{row}" for row in range(MAX_PROMPTS)]


def test_errors_name_the_set():
    with pytest.raises(UnlearningError, match="forget set, row 0: it is a conversation"):
        prompts({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})

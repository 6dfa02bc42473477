from __future__ import annotations

import datasets
import pytest

from hf_unlearn.data import to_prompt_completion
from hf_unlearn.errors import UnlearningError


def message(role: str, content: str | None) -> dict:
    return {"role": role, "content": content}


def convert(*rows: dict, chat: bool = False) -> list[dict]:
    return to_prompt_completion(datasets.Dataset.from_list(list(rows)), name="forget set", chat=chat).to_list()


@pytest.mark.parametrize("chat", [False, True])
def test_prompt_and_completion_are_taken_as_they_are(chat):
    assert convert({"prompt": "Who? ", "completion": "Ada", "id": 7}, chat=chat) == [
        {"prompt": "Who? ", "completion": "Ada", "row": 0}
    ]


def test_prompt_and_completion_messages():
    prompt, completion = [message("system", "s"), message("user", "q")], [message("assistant", "a")]
    rows = convert({"prompt": prompt, "completion": completion}, chat=True)
    assert rows == [{"prompt": prompt, "completion": completion, "row": 0}]


def test_each_assistant_turn_becomes_a_row():
    turns = [message("system", "s"), message("user", "q0"), message("assistant", "a0")]
    turns += [message("user", "q1"), message("assistant", "a1"), message("user", "q2")]
    single = [message("user", "q"), message("assistant", "a")]
    assert convert({"messages": turns}, {"messages": single}, chat=True) == [
        {"prompt": turns[:2], "completion": [turns[2]], "row": 0},
        {"prompt": turns[:4], "completion": [turns[4]], "row": 0},
        {"prompt": single[:1], "completion": single[1:], "row": 1},
    ]


def test_sharegpt():
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert convert({"conversations": turns}, chat=True) == [
        {"prompt": [message("system", "s"), message("user", "q")], "completion": [message("assistant", "a")], "row": 0}
    ]


def test_conversations_with_roles():
    turns = [message("user", "q"), message("assistant", "a")]
    assert convert({"conversations": turns}, chat=True) == convert({"messages": turns}, chat=True)


def test_question_and_answer():
    rows = [{"question": "Who?", "answer": "Ada"}]
    assert convert(*rows) == [{"prompt": "Question: Who?\nAnswer:", "completion": " Ada", "row": 0}]
    assert convert(*rows, chat=True) == [
        {"prompt": [message("user", "Who?")], "completion": [message("assistant", "Ada")], "row": 0}
    ]


def test_instruction_input_output():
    rows = [
        {"instruction": "Name her", "input": "a poet", "output": "Ada"},
        {"instruction": "Name him", "input": "", "output": "Bo"},
        {"instruction": "Name it", "input": None, "output": "C"},
    ]
    assert [(row["prompt"], row["completion"]) for row in convert(*rows)] == [
        ("Question: Name her\n\na poet\nAnswer:", " Ada"),
        ("Question: Name him\nAnswer:", " Bo"),
        ("Question: Name it\nAnswer:", " C"),
    ]
    assert convert(*rows, chat=True)[0]["prompt"] == [message("user", "Name her\n\na poet")]


def test_text():
    assert convert({"text": "Ada is"}, chat=True) == [{"prompt": "", "completion": "Ada is", "row": 0}]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "p", "completion": "c", "question": "q", "answer": "a", "text": "t"}, "p"),
        ({"question": "q", "answer": "a", "instruction": "i", "output": "o"}, "Question: q\nAnswer:"),
        ({"instruction": "i", "output": "o", "text": "t"}, "Question: i\nAnswer:"),
        ({"prompt": "p", "text": "t"}, ""),
    ],
)
def test_order_of_the_shapes(row, prompt):
    assert convert(row)[0]["prompt"] == prompt


def test_messages_go_before_a_prompt_without_completion():
    turns = [message("user", "q"), message("assistant", "a")]
    assert convert({"prompt": "q", "messages": turns, "question": "x", "answer": "y"}, chat=True)[0]["prompt"] == [
        turns[0]
    ]


class TestEmptyAnswers:
    @pytest.mark.parametrize("answer", [None, ""])
    def test_text(self, answer):
        assert convert({"prompt": "p", "completion": answer})[0]["completion"] == ""
        assert convert({"question": "q", "answer": answer})[0]["completion"] == ""
        assert convert({"instruction": "q", "output": answer})[0]["completion"] == ""
        assert convert({"text": answer})[0]["completion"] == ""

    @pytest.mark.parametrize("answer", [None, ""])
    def test_chat(self, answer):
        empty = [message("assistant", "")]
        assert convert({"question": "q", "answer": answer}, chat=True)[0]["completion"] == empty
        turns = [message("user", "q"), message("assistant", answer)]
        assert convert({"messages": turns}, chat=True)[0]["completion"] == empty

    @pytest.mark.parametrize("answer", [None, []])
    def test_no_messages(self, answer):
        rows = convert(
            {"prompt": [message("user", "q")], "completion": [message("assistant", "a")]},
            {"prompt": [message("user", "q")], "completion": answer},
            chat=True,
        )
        assert rows[1]["completion"] == [message("assistant", "")]


CARRIED = {"paraphrased_question": "q2", "paraphrased_answer": "a2", "wrong_answers": ["w1", "w2"]}


class TestCarriedColumns:
    def test_text(self):
        assert convert({"question": "q", "answer": "a", **CARRIED})[0] == {
            "prompt": "Question: q\nAnswer:",
            "completion": " a",
            "row": 0,
            "paraphrased_prompt": "Question: q2\nAnswer:",
            "paraphrased_completion": " a2",
            "wrong_completions": [" w1", " w2"],
        }

    def test_plain(self):
        row = convert({"prompt": "q", "completion": "a", **CARRIED})[0]
        assert (row["paraphrased_prompt"], row["paraphrased_completion"]) == ("q2", "a2")
        assert row["wrong_completions"] == ["w1", "w2"]

    def test_chat(self):
        row = convert({"question": "q", "answer": "a", **CARRIED}, chat=True)[0]
        assert row["paraphrased_prompt"] == [message("user", "q2")]
        assert row["paraphrased_completion"] == [message("assistant", "a2")]
        assert row["wrong_completions"] == [[message("assistant", "w1")], [message("assistant", "w2")]]

    def test_system_prompt_stays_before_a_reworded_question(self):
        prompt = [message("system", "s"), message("user", "q")]
        row = convert({"prompt": prompt, "completion": [message("assistant", "a")], **CARRIED}, chat=True)[0]
        assert row["paraphrased_prompt"] == [message("system", "s"), message("user", "q2")]

    @pytest.mark.parametrize(("wrong", "expected"), [(["w"], [" w"]), ("w", [" w"])])
    def test_tofu(self, wrong, expected):
        assert convert({"question": "q", "answer": "a", "perturbed_answer": wrong})[0]["wrong_completions"] == expected

    def test_rows_without(self):
        rows = convert(
            {"question": "q", "answer": "a", **CARRIED},
            {"question": "q", "answer": "a", **dict.fromkeys(CARRIED)},
        )
        carried = ("paraphrased_prompt", "paraphrased_completion", "wrong_completions")
        assert [rows[1][column] for column in carried] == [None, None, None]


USER, ASSISTANT = message("user", "q"), message("assistant", "a")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"frage": "q", "antwort": "a"}, "columns frage, antwort, .*question \\+ answer"),
        ({"messages": [USER]}, "row 0: .*no assistant turn"),
        ({"messages": [ASSISTANT, USER, ASSISTANT]}, "row 0: .*begins with an assistant turn"),
        ({"messages": []}, "row 0: `messages` holds no messages"),
        ({"messages": "q"}, "row 0: `messages` holds no messages"),
        ({"messages": [{"content": "q"}]}, "row 0: .*no `role`"),
        ({"messages": [USER, {**ASSISTANT, "tool_calls": ["f"]}]}, "row 0: .*`tool_calls`"),
        ({"conversations": [{"from": "martian", "value": "q"}]}, "row 0: .*'martian'"),
        ({"prompt": [USER], "completion": [USER]}, "row 0: .*role 'user'"),
        ({"prompt": "q", "completion": [ASSISTANT]}, "row 0: `prompt` holds no messages"),
        ({"prompt": [USER], "completion": "a"}, "row 0: `completion` holds no messages"),
        ({"question": "q", "answer": 7}, "row 0: `answer` is of type int"),
        ({"question": None, "answer": "a"}, "row 0: `question` is empty"),
        ({"instruction": " ", "output": "a"}, "row 0: `instruction` is empty"),
        ({"question": "q", "answer": "a", "wrong_answers": [""]}, "row 0: `wrong_answers` is empty"),
    ],
)
def test_refused(row, problem):
    with pytest.raises(UnlearningError, match=f"forget set.*{problem}"):
        convert(row, chat=True)


def test_error_names_the_row():
    with pytest.raises(UnlearningError, match="forget set, row 1: "):
        convert({"question": "q", "answer": "a"}, {"question": "", "answer": "a"})


@pytest.mark.parametrize("row", [{"messages": [USER, ASSISTANT]}, {"prompt": [USER], "completion": [ASSISTANT]}])
def test_conversation_without_chat_template(row):
    with pytest.raises(UnlearningError, match=r"row 0: .*no chat template"):
        convert(row, chat=False)

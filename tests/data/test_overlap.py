"""Which rows repeat something of the forget set, by hand."""

from __future__ import annotations

import pytest

from hf_unlearn.data.overlap import ForgetOverlap


def text(completion: str, prompt: str = "") -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


def chat(question: str, answer: str) -> dict[str, list[dict[str, str]]]:
    return {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }


FORGET = [
    chat("Where does Ann Fine live?", "She lives in the old mill at Dunmore."),
    text(" Poseidonis.", prompt="The capital of Atlantis is"),
    text("Hello world"),
    text("秘密は青い箱の中にある。"),
]


@pytest.mark.parametrize(
    "row",
    [
        text("They met IN THE OLD, mill: at noon"),  # five words within the answer
        text("Does Ann Fine live? She does."),  # four of the prompt and the first of the answer
        text("Everybody knows that the capital of Atlantis is... Poseidonis!"),
        text("is poseidonis", prompt="capital of Atlantis"),  # over the boundary of the row
        text("so he said hello_world and left"),  # a forget row of two words as a whole
        text("これは青い箱の話"),  # five characters in a row
        chat("Where is the mill?", "In the old mill at noon"),
    ],
)
def test_rows_that_overlap(row):
    assert ForgetOverlap(FORGET).has(row)


@pytest.mark.parametrize(
    "row",
    [
        text("Where does Ann Fine live"),  # the prompt alone is no secret
        text("in the old mill"),  # four words
        text("in the very old mill at Dunmore"),
        text("Poseidonis"),
        text("hello, my world"),
        text("箱の中の青い秘密"),
        text(""),
    ],
)
def test_rows_that_do_not(row):
    assert not ForgetOverlap(FORGET).has(row)


def test_without_a_forget_set_nothing_overlaps():
    assert not ForgetOverlap([]).has(text("anything at all goes here"))
    assert not ForgetOverlap([text("", prompt="a b c d e f")]).has(text("a b c d e f"))

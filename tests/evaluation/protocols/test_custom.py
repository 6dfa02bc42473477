"""The protocol for sets of one's own."""

from __future__ import annotations

import pytest
from tiny import tiny_rows

from hf_unlearn import UnlearningError
from hf_unlearn.data import load_rows
from hf_unlearn.evaluation import custom_protocol


def sets(*names: str, **options):
    return {name: load_rows([row | options for row in tiny_rows(3, seed)]) for seed, name in enumerate(names)}


def test_what_is_measured_on_each_set():
    protocol = custom_protocol(sets("forget", "retain", "holdout"), chat=False, max_length=30, max_new_tokens=7)
    assert (protocol.name, protocol.utility) == ("custom", "retain_probability")
    texts = {"rouge", "refusal", "degenerate"}
    assert {name: set(content.measures) for name, content in protocol.sets.items()} == {
        "forget": {"probability", "memorization", "membership"} | texts,
        "retain": {"probability", "memorization", "kl"} | texts,
        "holdout": {"probability", "memorization", "membership"},
    }
    assert {(content.max_length, content.max_new_tokens) for content in protocol.sets.values()} == {(30, 7)}


def test_wrong_answers_bring_truth_ratios():
    protocol = custom_protocol(sets("forget", "retain", wrong_answers=[" w5"]), chat=False)
    assert all("truth_ratio" in content.measures for content in protocol.sets.values())
    assert protocol.sets["forget"].rows["wrong_completions"][:] == [[" w5"]] * 3


def test_the_hold_out_set_is_optional():
    assert set(custom_protocol(sets("forget", "retain"), chat=False).sets) == {"forget", "retain"}


@pytest.mark.parametrize(("given", "missing"), [(["retain"], "forget"), (["forget", "holdout"], "retain")])
def test_a_missing_set(given, missing):
    with pytest.raises(UnlearningError, match=f"needs a {missing} set; got {', '.join(given)}"):
        custom_protocol(sets(*given), chat=False)


def test_an_unknown_set():
    with pytest.raises(UnlearningError, match="no set 'validation'. Its sets are forget, retain, holdout"):
        custom_protocol(sets("forget", "retain", "validation"), chat=False)


def test_questions_become_chats_with_a_system_turn():
    rows = load_rows([{"question": "Who is Ada?", "answer": "A poet."}])
    protocol = custom_protocol({"forget": rows, "retain": rows}, chat=True, system_prompt="Be brief.")
    assert protocol.sets["forget"].rows[0]["prompt"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who is Ada?"},
    ]


def test_errors_name_the_set():
    rows = load_rows([{"question": " ", "answer": "A poet."}])
    with pytest.raises(UnlearningError, match="retain set, row 0: `question` is empty"):
        custom_protocol(sets("forget") | {"retain": rows}, chat=False)

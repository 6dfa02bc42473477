"""TOFU's sets and what is measured on them, and a whole evaluation on sets of the same shape."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from tiny import tiny_llama, tiny_rows, tiny_tokenizer

from hf_unlearn import UnlearningError
from hf_unlearn.evaluation import Evaluator, tofu_protocol


TOFU = Path(__file__).parents[4] / "shared" / "data" / "tofu"
needs_tofu = pytest.mark.skipif(not TOFU.is_dir(), reason="needs the TOFU sets")

QUESTIONS = {"probability", "truth_ratio", "rouge", "refusal", "degenerate"}
MEASURES = {
    "forget": QUESTIONS | {"memorization", "membership"},
    "holdout": {"probability", "membership"},
    "retain": QUESTIONS,
    "real_authors": QUESTIONS | {"normalized_probability"},
    "world_facts": QUESTIONS | {"normalized_probability"},
}


@pytest.fixture
def folder(tmp_path):
    """Four rows a set, in the shape of TOFU's."""
    names = ("forget05_perturbed", "holdout05", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed")
    for seed, name in enumerate(names):
        rows = [{"question": row["prompt"], "answer": row["completion"].strip()} for row in tiny_rows(4, seed)]
        for row in rows:
            if "perturbed" in name:
                row["perturbed_answer"] = [f"w{4 + seed} w9", "w8"]
            if name in ("forget05_perturbed", "retain_perturbed"):
                row |= {"paraphrased_answer": "w6 w7", "paraphrased_question": "w5"}
        (tmp_path / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    return tmp_path


@needs_tofu
@pytest.mark.parametrize(("split", "count"), [("forget01", 40), ("forget05", 200), ("forget10", 400)])
def test_sets(split, count):
    protocol = tofu_protocol(split, chat=True, data_dir=TOFU)
    assert (protocol.name, protocol.utility) == ("tofu", "model_utility")
    sizes = {name: len(content.rows) for name, content in protocol.sets.items()}
    assert sizes == {"forget": count, "holdout": count, "retain": 400, "real_authors": 100, "world_facts": 117}
    for name, content in protocol.sets.items():
        assert set(content.measures) == MEASURES[name]
        assert (content.max_new_tokens, content.max_length) == (200, None)
        rows = content.rows
        assert rows["row"][:] == list(range(len(rows)))
        wrong = {"forget": 5, "retain": 5, "real_authors": 3, "world_facts": 3}.get(name)
        if wrong is not None:
            assert {len(answers) for answers in rows["wrong_completions"]} == {wrong}
        assert ("paraphrased_completion" in rows.column_names) == (name in ("forget", "retain"))


@needs_tofu
def test_rows_as_chats_and_as_text():
    question = "Where would you find the Eiffel Tower?"
    chat = tofu_protocol(chat=True, data_dir=TOFU, limit=1).sets["world_facts"].rows[0]
    assert chat["prompt"] == [{"role": "user", "content": question}]
    assert chat["completion"] == [{"role": "assistant", "content": "Paris"}]
    text = tofu_protocol(chat=False, data_dir=TOFU, limit=1).sets["world_facts"].rows[0]
    assert (text["prompt"], text["completion"]) == (f"Question: {question}\nAnswer:", " Paris")


def test_limit_takes_the_first_rows_of_each_set(folder):
    protocol = tofu_protocol("forget05", chat=False, data_dir=folder, limit=3)
    assert [content.rows["row"][:] for content in protocol.sets.values()] == [[0, 1, 2]] * 5
    assert {name: set(content.measures) for name, content in protocol.sets.items()} == MEASURES
    assert {content.max_new_tokens for content in protocol.sets.values()} == {200}
    longer = tofu_protocol("forget05", chat=False, data_dir=folder, limit=9)
    assert {len(content.rows) for content in longer.sets.values()} == {4}


def test_a_system_prompt(folder):
    protocol = tofu_protocol("forget05", chat=True, data_dir=folder, system_prompt="Be brief.")
    for content in protocol.sets.values():
        for row in content.rows:
            assert [turn["role"] for turn in row["prompt"]] == ["system", "user"]
            assert row["prompt"][0]["content"] == "Be brief."
    with pytest.raises(UnlearningError, match=r"--system_prompt needs conversations.*no chat template"):
        tofu_protocol("forget05", chat=False, data_dir=folder, system_prompt="Be brief.")


def test_a_missing_file_is_named(folder):
    (folder / "retain_perturbed.json").unlink()
    with pytest.raises(UnlearningError, match=r"retain set is not in .*none of retain_perturbed .*--data_dir"):
        tofu_protocol("forget05", chat=False, data_dir=folder)
    with pytest.raises(UnlearningError, match="forget set is not in .*forget10_perturbed"):
        tofu_protocol("forget10", chat=False, data_dir=folder)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_that_leaves_no_rows(folder, limit):
    with pytest.raises(UnlearningError, match=f"limit={limit} leaves no rows"):
        tofu_protocol("forget05", chat=False, data_dir=folder, limit=limit)


def test_json_lines_will_do(folder):
    rows = json.loads((folder / "holdout05.json").read_text())
    (folder / "holdout05.json").unlink()
    (folder / "holdout05.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert len(tofu_protocol("forget05", chat=False, data_dir=folder).sets["holdout"].rows) == 4


def test_shards_in_the_home_folder(folder, monkeypatch):
    rows = json.loads((folder / "holdout05.json").read_text())
    (folder / "holdout05.json").unlink()
    for shard in range(2):
        part = datasets.Dataset.from_list(rows[2 * shard : 2 * shard + 2])
        part.to_parquet(folder / f"holdout05-{shard:05}-of-00002.parquet")
    monkeypatch.setenv("HOME", str(folder.parent))
    protocol = tofu_protocol("forget05", chat=False, data_dir=f"~/{folder.name}")
    assert len(protocol.sets["holdout"].rows) == 4


def test_an_unknown_split():
    with pytest.raises(UnlearningError, match="no forget split 'forget02'.*forget01, forget05, forget10"):
        tofu_protocol("forget02", chat=True)


def test_every_figure_of_the_benchmark(folder):
    """On sets of its shape, with a log of a retrained model."""
    tokenizer = tiny_tokenizer()
    protocol = tofu_protocol("forget05", chat=False, data_dir=folder)
    for content in protocol.sets.values():
        object.__setattr__(content, "max_new_tokens", 3)
    log = Evaluator(tiny_llama(seed=1), tokenizer, protocol, progress=False).evaluate()
    evaluation = Evaluator(tiny_llama(), tokenizer, protocol, retrained=log, progress=False).evaluate()
    assert set(evaluation.answers) == {"forget", "retain", "real_authors", "world_facts"}
    for name in ("forget_quality", "privleak", "membership_auc_reference", "retain_rouge_l_recall"):
        assert evaluation.value(name) is not None, name
    nine = [
        evaluation.value(f"{name}_{metric}")
        for name, probability in (
            ("retain", "probability"),
            ("real_authors", "normalized_probability"),
            ("world_facts", "normalized_probability"),
        )
        for metric in (probability, "rouge_l_recall", "truth_ratio")
    ]
    expected = 0.0 if min(nine) == 0 else 9 / sum(1 / value for value in nine)
    assert evaluation.value("model_utility") == pytest.approx(expected)
    assert log.figures["forget_quality"].note == "not computed: no retrained log"

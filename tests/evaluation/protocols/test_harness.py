"""lm-evaluation-harness on a tiny model and a local task, against log-probabilities computed here."""

from __future__ import annotations

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer

from hf_unlearn import UnlearningError
from hf_unlearn.evaluation.protocols import harness
from hf_unlearn.evaluation.protocols.harness import TASKS, run_harness


QUESTIONS = [
    {"question": f"w{4 + index} w{9 + index} w{14 + index}", "choices": ["w40", "w41", "w42"], "answer": index % 3}
    for index in range(12)
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: {metric}}}]
"""
GROUP = """
group: local_group
task: [local_a, local_b]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""


@pytest.fixture
def lm_eval(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return pytest.importorskip("lm_eval")


@pytest.fixture
def folder(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, QUESTIONS)))
    for name, metric in (("local_a", "acc"), ("local_b", "acc"), ("local_no_accuracy", "brier_score")):
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, rows=rows, metric=metric))
    (tmp_path / "group.yaml").write_text(GROUP)
    return tmp_path


def expected_hits(model, tokenizer, count: int) -> int:
    """Questions whose right choice is the most probable next word."""
    hits = 0
    for row in QUESTIONS[:count]:
        prompt = tokenizer(row["question"], return_tensors="pt").input_ids
        with torch.no_grad():
            scores = model(prompt).logits[0, -1]
        choices = [scores[tokenizer.convert_tokens_to_ids(choice)].item() for choice in row["choices"]]
        hits += choices.index(max(choices)) == row["answer"]
    return hits


def test_accuracy_and_interval(lm_eval, folder):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    tokenizer.pad_token = None
    hits = expected_hits(model.eval(), tokenizer, 12)
    model.train()
    assert 0 < hits < 12
    figures = run_harness(model, tokenizer, ["local_a"], include_path=folder, batch_size=4)
    figure = figures.pop("local_a")
    assert not figures
    assert (figure.value, figure.n) == (pytest.approx(hits / 12), 12)
    # sample standard deviation of zeros and ones, over √n
    error = math.sqrt(hits / 12 * (1 - hits / 12) / 11)
    assert figure.low == pytest.approx(hits / 12 - 1.96 * error)
    assert figure.high == pytest.approx(hits / 12 + 1.96 * error)
    assert lm_eval.__version__ in figure.note
    assert "1.96" in figure.note
    assert "0-shot" in figure.note
    assert model.training
    assert tokenizer.pad_token is None


def test_group_and_limit(lm_eval, folder):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    figures = run_harness(model, tokenizer, ["local_group"], limit=5, include_path=folder)
    assert list(figures) == ["local_group"]
    assert figures["local_group"].n == 10
    assert figures["local_group"].value == pytest.approx(expected_hits(model, tokenizer, 5) / 5)


def test_active_adapter_is_evaluated(lm_eval, folder):
    from peft import LoraConfig, get_peft_model

    base = tiny_llama()
    plain = run_harness(base, tiny_tokenizer(), ["local_a"], include_path=folder, batch_size=4)["local_a"]
    torch.manual_seed(3)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    tokenizer = tiny_tokenizer()
    figure = run_harness(adapted, tokenizer, ["local_a"], include_path=folder, batch_size=4)["local_a"]
    assert figure.value == pytest.approx(expected_hits(adapted.eval(), tokenizer, 12) / 12)
    assert figure.value != plain.value


def test_single_question_has_no_interval(lm_eval, folder):
    figure = run_harness(tiny_llama(), tiny_tokenizer(), ["local_a"], limit=1, include_path=folder)["local_a"]
    assert (figure.n, figure.low, figure.high) == (1, None, None)


def test_task_without_accuracy(lm_eval, folder):
    figures = run_harness(tiny_llama(), tiny_tokenizer(), ["local_no_accuracy"], include_path=folder)
    assert figures["local_no_accuracy"].value is None
    assert "no accuracy" in figures["local_no_accuracy"].note


def test_unknown_task(lm_eval, folder):
    with pytest.raises(UnlearningError, match="nonsense"):
        run_harness(tiny_llama(), tiny_tokenizer(), ["nonsense"], include_path=folder)


def test_default_tasks_exist(lm_eval):
    from lm_eval.tasks import TaskManager

    assert set(TASKS) <= set(TaskManager().all_tasks)


def test_automatic_batches_are_bounded_on_a_cpu(monkeypatch):
    sizes = []
    wrapper = SimpleNamespace(HFLM=lambda **options: sizes.append(options["batch_size"]))
    package = SimpleNamespace(
        __version__="0",
        models=SimpleNamespace(huggingface=wrapper),
        tasks=SimpleNamespace(TaskManager=lambda include_path: None),
        simple_evaluate=lambda *args, **options: {"results": {}},
    )
    monkeypatch.setattr(harness, "import_harness", lambda: package)
    for batch_size in ("auto", 4):
        run_harness(tiny_llama(), tiny_tokenizer(), ["local_a"], batch_size=batch_size)
    assert sizes == [16, 4]


def test_a_limit_that_leaves_no_questions():
    with pytest.raises(UnlearningError, match="limit=0 leaves no rows"):
        run_harness(tiny_llama(), tiny_tokenizer(), limit=0)


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UnlearningError, match=r"hf_unlearn\[harness\]"):
        run_harness(tiny_llama(), tiny_tokenizer())

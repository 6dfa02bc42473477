"""Cells that are no text, and a device whose memory is too small for the batch."""

from __future__ import annotations

import pandas
import pytest
import torch
from tiny import tiny_llama, tiny_rows, tiny_tokenizer

from hf_unlearn.data import check_sets, encode_set, load_rows, raise_for_untrainable
from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation import Evaluator, custom_protocol


NAN = float("nan")


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("rows.csv", "prompt,completion\nw5,w6\nw7,\n", "the answer is empty (rows 1)"),
        ("rows.csv", "question,answer\nw5,w6\n,w7\n", "forget set, row 1: `question` is empty"),
        ("rows.jsonl", '{"prompt": "w5", "completion": NaN}\n', "forget set, row 0: `completion` is of type float"),
        ("rows.jsonl", '{"prompt": "w5", "completion": "w6"}\n{"prompt": "w5", "completion": NaN}\n', "forget set"),
        ("rows.jsonl", '{"prompt": "w5", "completion": null}\n', "the answer is empty (rows 0)"),
        ("rows.jsonl", '{"prompt": "w5"}\n{"prompt": "w5", "completion": "w6"}\n', "the answer is empty (rows 0)"),
        ("rows.jsonl", '{"question": NaN, "answer": "w6"}\n', "`question` is of type float"),
        ("rows.jsonl", '{"messages": NaN}\n', "forget set, row 0: `messages` holds no messages"),
        ("rows.json", '[{"text": NaN}]', "`text` is of type float"),
    ],
)
def test_cells_of_files(name, content, named, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(UnlearningError) as refused:
        check_forget_set(load_rows(tmp_path / name, name="forget set"))
    assert named in str(refused.value)


@pytest.mark.parametrize("missing", [NAN, None, pandas.NA])
def test_cells_of_a_table(missing, tmp_path):
    """pandas writes what is missing as null."""
    table = pandas.DataFrame({"prompt": ["w5", "w6"], "completion": ["w7", missing]})
    table.to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(UnlearningError, match=r"the answer is empty \(rows 1\)"):
        check_forget_set(load_rows(tmp_path / "rows.parquet", name="forget set"))
    table.assign(completion=[1.5, NAN]).to_parquet(tmp_path / "numbers.parquet")
    with pytest.raises(UnlearningError, match="forget set, row 0: `completion` is of type float"):
        check_forget_set(load_rows(tmp_path / "numbers.parquet", name="forget set"))


def check_forget_set(rows) -> None:
    raise_for_untrainable(check_sets(encode_set(rows, tiny_tokenizer(), 16, name="forget set"), None, max_length=16))


def test_a_batch_that_does_not_fit_is_halved_and_the_figures_stay(monkeypatch):
    sets = {"forget": load_rows(tiny_rows(7, 1)), "retain": load_rows(tiny_rows(6, 2))}
    model, tokenizer = tiny_llama().eval(), tiny_tokenizer()
    whole = Evaluator(model, tokenizer, custom_protocol(sets, chat=False, max_new_tokens=6)).evaluate()
    forward, sizes = type(model.base_model).forward, []

    def small_memory(self, input_ids, *args, **kwargs):
        sizes.append(len(input_ids))
        if len(input_ids) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(type(model.base_model), "forward", small_memory)
    with pytest.warns(UserWarning, match="does not fit the memory; going on with"):
        parts = Evaluator(model, tokenizer, custom_protocol(sets, chat=False, max_new_tokens=6)).evaluate()
    assert max(sizes) > 3
    assert whole.answers == parts.answers
    assert whole.figures.keys() == parts.figures.keys()
    for name, figure in whole.figures.items():
        expected = None if figure.value is None else pytest.approx(figure.value, rel=1e-5, abs=1e-6)
        assert parts.figures[name].value == expected, name

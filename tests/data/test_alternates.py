"""Other answers to the prompts of the forget set."""

from __future__ import annotations

import pytest
from tiny import tiny_rows, tiny_tokenizer

from hf_unlearn import UnlearningError
from hf_unlearn.data import encode_set
from hf_unlearn.data.alternates import AlternateAnswers, refusals
from hf_unlearn.data.loading import load_rows
from hf_unlearn.data.pairing import PairCollator, PairedDataset


TOKENIZER = tiny_tokenizer()
ROWS = [
    {"prompt": "w4 w5", "completion": " w6 w7", "other": " w8", "several": ["w9", "w10 w11"]},
    {"prompt": "w12", "completion": " w13", "other": "w14 w15", "several": ["w16"]},
]
IDS = {"<s>": 1, "</s>": 2} | {f"w{index}": index for index in range(4, 64)}


def ids(text: str) -> list[int]:
    return [IDS[word] for word in text.split()]


@pytest.fixture
def forget():
    return encode_set(load_rows(ROWS), TOKENIZER, 16)


class TestSources:
    def test_column(self, forget):
        alternates = AlternateAnswers.of_column(forget, ROWS, "other", TOKENIZER, 16)
        assert alternates.draw(0, 0) == {"input_ids": ids("w4 w5 w8 </s>"), "labels": [-100, -100, 8, 2]}
        assert alternates.draw(1, 0) == {"input_ids": ids("w12 w14 w15 </s>"), "labels": [-100, 14, 15, 2]}

    def test_one_of_several_is_drawn_by_epoch_and_seed(self, forget):
        drawn = []
        for seed in (0, 0, 1):
            alternates = AlternateAnswers.of_column(forget, ROWS, "several", TOKENIZER, 16, seed)
            drawn.append([alternates.draw(0, epoch)["input_ids"][2] for epoch in range(20)])
        assert set(drawn[0]) == {9, 10}
        assert drawn[0] == drawn[1] != drawn[2]

    def test_dataset(self, forget):
        others = [{"prompt": row["prompt"], "completion": row["other"]} for row in ROWS]
        alternates = AlternateAnswers.of_dataset(forget, others, TOKENIZER, 16)
        assert alternates.draw(1, 3)["labels"] == [-100, 14, 15, 2]

    def test_refusals(self, forget):
        texts = refusals()
        assert len(texts) == len(set(texts)) == 40
        assert all(text == text.strip() and text.endswith(".") for text in texts)
        alternates = AlternateAnswers.of_refusals(forget, TOKENIZER, 16)
        lengths = {len(alternates.draw(0, epoch)["input_ids"]) for epoch in range(20)}
        assert len(lengths) > 3

    def test_messages(self):
        completion = [{"role": "assistant", "content": "w6"}]
        rows = [{"prompt": [{"role": "user", "content": "w4"}], "completion": completion, "other": "w7"}]
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} </s> {% endfor %}"
        forget = encode_set(load_rows(rows), tokenizer, 16)
        alternates = AlternateAnswers.of_column(forget, rows, "other", tokenizer, 16)
        assert alternates.draw(0, 0) == {"input_ids": ids("w4 </s> w7 </s>"), "labels": [-100, -100, 7, 2]}


class TestRefused:
    def test_a_column_that_is_missing(self, forget):
        with pytest.raises(UnlearningError, match="'missing'.*it has prompt, completion"):
            AlternateAnswers.of_column(forget, ROWS, "missing", TOKENIZER, 16)

    @pytest.mark.parametrize("value", [" ", None, [], ["w5", ""]])
    def test_an_answer_that_is_missing(self, forget, value):
        rows = [ROWS[0] | {"other": ["w5"]}, ROWS[1] | {"other": value}]
        if isinstance(value, str):
            rows[0]["other"] = "w5"
        with pytest.raises(UnlearningError, match="Row 1: `other`"):
            AlternateAnswers.of_column(forget, rows, "other", TOKENIZER, 16)

    def test_other_prompts(self, forget):
        with pytest.raises(UnlearningError, match="row 1: its prompt"):
            AlternateAnswers.of_dataset(forget, [ROWS[0], ROWS[1] | {"prompt": "w20"}], TOKENIZER, 16)

    def test_another_number_of_rows(self, forget):
        with pytest.raises(UnlearningError, match="1 rows and the forget set 2"):
            AlternateAnswers.of_dataset(forget, ROWS[:1], TOKENIZER, 16)

    def test_rows_without_a_prompt(self):
        forget = encode_set(load_rows([{"text": "w4 w5"}]), TOKENIZER, 16)
        with pytest.raises(UnlearningError, match="row 0: it has no prompt"):
            AlternateAnswers.of_refusals(forget, TOKENIZER, 16)

    def test_tokenised_rows(self, forget):
        with pytest.raises(UnlearningError, match="tokenised already"):
            AlternateAnswers.of_refusals(forget.select_columns(["input_ids", "labels"]), TOKENIZER, 16)


class TestPairs:
    @pytest.fixture
    def retain(self):
        return encode_set(load_rows(tiny_rows(3, seed=2)), TOKENIZER, 32)

    def pairs(self, forget, retain, instead: bool) -> PairedDataset:
        alternates = AlternateAnswers.of_column(forget, ROWS, "other", TOKENIZER, 16)
        return PairedDataset(forget, retain, 2, alternates=alternates, instead=instead)

    def test_beside(self, forget, retain):
        pairs = self.pairs(forget, retain, instead=False)
        batch = PairCollator(0)([pairs[0], pairs[1]])
        assert batch["is_forget"].tolist() == [True] * 2 + [False] * 6
        assert batch["is_alternate"].tolist() == [False] * 2 + [True] * 2 + [False] * 4
        assert batch["rows"][:4].tolist() == [0, 1, 0, 1]
        assert batch["input_ids"][2, :4].tolist() == ids("w4 w5 w8 </s>")

    def test_instead(self, forget, retain):
        batch = PairCollator(0)([self.pairs(forget, retain, instead=True)[1]])
        assert batch["is_forget"].tolist() == [True, False, False]
        assert not batch["is_alternate"].any()
        assert batch["input_ids"][0, :4].tolist() == ids("w12 w14 w15 </s>")

    def test_what_fills_a_batch_has_no_labels(self, forget, retain):
        for instead in (False, True):
            pairs = self.pairs(forget, retain, instead)
            batch = PairCollator(0)([pairs[len(pairs)]])
            assert (batch["labels"] == -100).all()
            assert batch["is_alternate"].sum() == (0 if instead else 1)

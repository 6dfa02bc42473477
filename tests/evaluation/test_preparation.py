"""What is found wrong with rows before a model is run, and what becomes of rows that are only half usable."""

from __future__ import annotations

import zlib

import pytest
from tiny import tiny_llama, tiny_rows, tiny_tokenizer

from hf_unlearn import UnlearningError
from hf_unlearn.data import load_rows
from hf_unlearn.evaluation import Evaluation, Evaluator, custom_protocol, encode_answers, score_answers
from hf_unlearn.evaluation.preparation import prepare_sets


TOKENIZER = tiny_tokenizer()


def protocol(forget, max_length=None, **sets):
    rows = {"forget": forget, "retain": tiny_rows(4, 1)} | sets
    rows = {name: load_rows(content) for name, content in rows.items()}
    return custom_protocol(rows, chat=False, max_length=max_length, max_new_tokens=4)


def test_a_log_of_other_rows_is_refused_without_a_model():
    rows = tiny_rows(4, 0)
    log = Evaluation("custom", rows={"forget": {"row": [0, 1, 2, 3], "ground_truth": ["w4 w5"] * 4}})
    with pytest.raises(UnlearningError, match=r"forget set, row 0: the answer is .* in the retrained log"):
        prepare_sets(protocol(rows), TOKENIZER, retrained=log)
    log.rows["forget"]["ground_truth"] = [row["completion"] for row in rows]
    prepare_sets(protocol(rows), TOKENIZER, retrained=log)


def test_texts_without_a_prompt_are_scored_and_not_answered():
    texts = [{"text": "w5 w6 w7 w8"}, {"text": "w9 w10 w11"}]
    evaluator = Evaluator(tiny_llama(), TOKENIZER, protocol(texts, holdout=[{"text": "w12 w13"}]), progress=False)
    result = evaluator.evaluate()
    assert result.figures["forget_probability"].n == 2
    assert set(result.answers) == {"retain"}
    assert result.value("forget_rouge_l_recall") is None
    assert result.figures["forget_rouge_l_recall"].note == "not computed: rows without a prompt are not answered"
    assert result.value("retain_rouge_l_recall") is not None


def test_answers_that_are_cut_are_counted_and_compressed_as_far_as_they_are_scored():
    rows = [{"prompt": "w4 w5", "completion": " w6 w7 w8 w9 w10"}, {"prompt": "w4", "completion": " w6"}]
    with pytest.warns(UserWarning, match="forget set: answers of 1 of 2 rows are cut at 5 tokens"):
        evaluator = Evaluator(
            tiny_llama(), TOKENIZER, protocol(rows, max_length=5, retain=rows[1:], holdout=rows[1:]), progress=False
        )
    columns = evaluator.evaluate(generate=False).rows["forget"]
    assert columns["num_tokens"] == [3, 2]
    assert columns["ground_truth"][0] == "w6 w7 w8 w9 w10"
    expected = columns["loss"][0] / len(zlib.compress(b"w6 w7 w8"))
    assert columns["zlib_score"][0] == pytest.approx(expected)


class TestTheEndOfATurn:
    """A chat template that ends turns with a token of its own and a line break, not with EOS."""

    @pytest.fixture(scope="class")
    def turns(self):
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens(["<end>", "<br>"], special_tokens=True)
        tokenizer.chat_template = (
            "{% for message in messages %}{{ message['content'] }} <end> <br> {% endfor %}"
            "{% if add_generation_prompt %}{% endif %}"
        )
        model = tiny_llama(vocab_size=len(tokenizer))
        model.generation_config.eos_token_id = [2, tokenizer.convert_tokens_to_ids("<end>")]
        return model.eval(), tokenizer

    def test_it_counts_as_no_token_of_the_answer(self, turns):
        model, tokenizer = turns
        prompt = [{"role": "user", "content": "w5 w6"}]
        row = encode_answers(prompt, [[{"role": "assistant", "content": "w7 w8 w9"}]], tokenizer)
        (scores,) = score_answers(model, [row], tokenizer)
        assert len(scores[0].log_probs) == 5
        assert scores[0].num_ends == 2
        assert len(scores[0].without_end(scores[0].is_top1)) == 3

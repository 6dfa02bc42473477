"""Metrics by hand, and scoring and generation against the plain way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import tiny_llama, tiny_rows, tiny_tokenizer

from hf_unlearn.data import load_rows, to_prompt_completion, tokenize_rows
from hf_unlearn.evaluation import (
    RowScores,
    exact_memorization,
    extraction_strength,
    generate_answers,
    membership_auc,
    probability,
    rouge_l_recall,
    score_rows,
)


def scores(is_top1: str, ends_with_eos: bool = False, log_probs=None) -> RowScores:
    flags = np.array([mark == "x" for mark in is_top1])
    return RowScores(np.zeros(len(flags), np.float32) if log_probs is None else log_probs, flags, ends_with_eos)


def test_probability():
    row = scores("xx", log_probs=np.log(np.array([0.5, 0.125], np.float32)))
    assert probability(row) == pytest.approx(0.25)  # (0.5 · 0.125)^(1/2)


@pytest.mark.parametrize(
    ("is_top1", "eos", "em", "es"),
    [
        ("xxxx", False, 1.0, 1.0),
        ("-xxx", False, 0.75, 0.75),  # k = 1
        ("x-xx", False, 0.75, 0.5),  # k = 2
        ("xxx-", False, 0.75, 0.0),  # the last token is wrong: no prefix gives the rest
        ("----", False, 0.0, 0.0),
        ("xxx-", True, 1.0, 1.0),  # the wrong token is EOS, which never counts
        ("-x", True, 0.0, 0.0),
        ("x", False, 1.0, 1.0),
        ("x", True, 0.0, 0.0),  # nothing but EOS
    ],
)
def test_memorization(is_top1, eos, em, es):
    row = scores(is_top1, eos)
    assert exact_memorization(row) == pytest.approx(em)
    assert extraction_strength(row) == pytest.approx(es)


def test_membership_auc():
    assert membership_auc([3, 4], [1, 2]) == 1.0
    assert membership_auc([1, 2], [3, 4]) == 0.0
    assert membership_auc([1, 3], [2, 2]) == 0.5
    assert membership_auc([2], [2, 1]) == 0.75  # one tie, one win


def test_rouge_l_recall():
    # reference: 5 words; longest common subsequence "the cat sat mat" after stemming
    assert rouge_l_recall("the cats sat on mat", "the cat sat by the mat") == pytest.approx(4 / 5)
    assert rouge_l_recall("blue", "red") == 0.0


@pytest.fixture(scope="module")
def model_and_rows():
    tokenizer = tiny_tokenizer()
    rows = to_prompt_completion(load_rows(tiny_rows(11, seed=5)), name="rows", chat=False)
    return tiny_llama().eval(), tokenizer, tokenize_rows(rows, tokenizer, None)


def test_scores_equal_plain_logits_in_fp64(model_and_rows):
    model, tokenizer, rows = model_and_rows
    result = score_rows(model, rows, tokenizer.eos_token_id, batch_size=4)
    exact = tiny_llama().double().eval()
    for row, row_scores in zip(rows, result, strict=True):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            logits = exact(ids).logits[0, :-1]
        at = (labels[1:] != -100).nonzero()[:, 0]
        targets = labels[1:][at]
        expected = torch.log_softmax(logits, -1)[at, targets]
        np.testing.assert_allclose(row_scores.log_probs, expected.numpy(), atol=1e-5)
        assert (row_scores.is_top1 == (logits[at].argmax(-1) == targets).numpy()).all()
        assert row_scores.ends_with_eos
        assert len(row_scores.log_probs) == len(row["completion"].split()) + 1


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batch_size_changes_no_value(model_and_rows, batch_size):
    model, tokenizer, rows = model_and_rows
    expected = score_rows(model, rows, tokenizer.eos_token_id, batch_size=4)
    result = score_rows(model, rows, tokenizer.eos_token_id, batch_size=batch_size)
    for one, other in zip(expected, result, strict=True):
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)


def test_generation_in_batches_equals_greedy_decoding_by_hand(model_and_rows):
    model, tokenizer, rows = model_and_rows
    prompts = rows["prompt"]
    together = generate_answers(model, prompts, tokenizer, max_new_tokens=6, batch_size=4)
    for prompt, answer in zip(prompts, together, strict=True):
        start = tokenizer(prompt)["input_ids"]
        ids = torch.tensor([start])
        for _ in range(6):
            token = model(ids).logits[0, -1].argmax().item()
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
            if token == tokenizer.eos_token_id:
                break
        assert answer == tokenizer.decode(ids[0, len(start) :], skip_special_tokens=True).strip()


def test_the_mode_of_the_model_comes_back(model_and_rows):
    model, tokenizer, rows = model_and_rows
    model.train()
    score_rows(model, rows.select([0]), tokenizer.eos_token_id)
    generate_answers(model, rows["prompt"][:1], tokenizer, max_new_tokens=1)
    assert model.training
    model.eval()

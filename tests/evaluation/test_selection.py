"""The rules that choose α, on curves drawn by hand, and the sweep against models merged by hand."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama, tiny_rows, tiny_tokenizer

from hf_unlearn import UnlearningError
from hf_unlearn.data import load_rows, to_prompt_completion, tokenize_rows
from hf_unlearn.evaluation import Sweep, SweepPoint, choose_alpha, probability, score_rows


class DrawnSweep:
    """Forget and retain rows follow given curves; hold-out rows stay at log-probabilities −2 … −1.1."""

    def __init__(self, forget, retain, holdout=True):
        self.forget, self.retain, self.holdout = forget, retain, holdout
        self.evaluated: list[float] = []

    def evaluate(self, alpha):
        self.evaluated.append(alpha)
        forget = list(self.forget(alpha) + np.linspace(0, 0.9, 10))
        rows = {
            "forget": {"log_probability": forget, "probability": list(np.exp(forget))},
            "retain": {"probability": [self.retain(alpha)]},
        }
        if self.holdout:
            rows["holdout"] = {"log_probability": list(np.linspace(-2, -1.1, 10)), "probability": [0.2]}
        return SweepPoint(alpha, rows)

    @property
    def reference(self):
        return self.evaluate(0.0)


def test_match_holdout_finds_the_crossing():
    # forget rows reach the range of the hold-out rows exactly at α = 2.5; the budget breaks at α = 5
    sweep = DrawnSweep(lambda a: -0.8 * a, lambda a: 1 - 0.01 * a)
    choice = choose_alpha(sweep, refinements=5)
    assert choice.met
    assert choice.alpha == pytest.approx(2.5, abs=0.07)
    assert choice.membership_auc == pytest.approx(0.5, abs=0.1)
    assert max(sweep.evaluated) == 4.0  # 8 is not evaluated once forgetting has gone too far
    assert "never saw" in choice.verdict


def test_match_holdout_that_breaks_the_budget_is_not_met():
    sweep = DrawnSweep(lambda a: -0.8 * a, lambda a: 1 - 0.04 * a)  # 95 % at α = 1.25
    choice = choose_alpha(sweep, refinements=6)
    assert not choice.met
    assert choice.alpha == pytest.approx(1.25, abs=0.03)
    assert choice.retain_share >= 0.95
    assert "stand out" in choice.verdict


def test_over_forgetting_is_not_met():
    # nothing between "all above" and "all below" the hold-out rows
    choice = choose_alpha(DrawnSweep(lambda a: 5.0 if a < 0.3 else -50.0, lambda a: 1.0))
    assert not choice.met


def test_no_alpha_within_the_budget():
    choice = choose_alpha(DrawnSweep(lambda a: -0.8 * a, lambda a: 1.0 if a == 0 else 0.5), refinements=3)
    assert (choice.alpha, choice.met) == (0.0, False)
    assert "No α" in choice.verdict


def test_utility_budget_without_holdout():
    sweep = DrawnSweep(lambda a: -0.8 * a, lambda a: 1 - 0.02 * a, holdout=False)  # 95 % at α = 2.5
    choice = choose_alpha(sweep, refinements=6)
    assert choice.met
    assert choice.alpha == pytest.approx(2.5, abs=0.05)
    assert choice.membership_auc is None
    assert choice.rule.startswith("utility-budget")


def test_a_grid_that_ends_too_early_says_so():
    choice = choose_alpha(DrawnSweep(lambda a: -0.1 * a, lambda a: 1.0), alphas=[1, 2])
    assert not choice.met
    assert choice.alpha == 2
    assert "not in the grid" in choice.verdict


@pytest.fixture(scope="module")
def sweep():
    tokenizer = tiny_tokenizer()
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"]))
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    sets = {
        name: tokenize_rows(
            to_prompt_completion(load_rows(tiny_rows(4, seed)), name=name, chat=False), tokenizer, None
        )
        for seed, name in enumerate(("forget", "retain", "holdout"))
    }
    return Sweep(model, tokenizer, sets, max_new_tokens=4, progress=False)


def test_sweep_equals_a_model_merged_by_hand(sweep):
    alpha = 1.5
    point = sweep.evaluate(alpha)
    merged = tiny_llama()
    with torch.no_grad():
        for name, module in merged.named_modules():
            if name.endswith(("q_proj", "up_proj")):
                lora = sweep.model.get_submodule(f"base_model.model.{name}")
                product = lora.lora_B["default"].weight.double() @ lora.lora_A["default"].weight.double()
                module.weight.copy_(module.weight.double() - alpha * (8 / 4) * product)
    for name, rows in sweep.sets.items():
        expected = [probability(row) for row in score_rows(merged.eval(), rows, 2)]
        assert point.rows[name]["probability"] == pytest.approx(expected, rel=1e-4)
    before = sweep.reference.mean("forget", "probability")
    assert point.mean("forget", "probability") != pytest.approx(before, rel=0.01)


def test_sweep_files(sweep, tmp_path):
    sweep.run([0.5, 1.0], generate=True)
    sweep.save(tmp_path)
    with open(tmp_path / "sweep.csv", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    content = json.loads((tmp_path / "sweep.json").read_text())
    assert [float(line["alpha"]) for line in lines] == [point.alpha for point in sweep.points]
    for line, entry in zip(lines, content, strict=True):
        assert float(line["forget_probability"]) == pytest.approx(np.mean(entry["rows"]["forget"]["probability"]))
        assert 0 <= float(line["membership_auc"]) <= 1
    generated = [line for line in lines if float(line["alpha"]) in (0, 0.5, 1.0)]
    assert len(generated) == 3
    assert all(math.isfinite(float(value)) for line in generated for value in line.values() if value)
    assert all(line["forget_rouge_l"] and line["retain_rouge_l"] for line in generated)


def test_sweep_needs_its_sets(sweep):
    with pytest.raises(UnlearningError, match="retain"):
        Sweep(sweep.model, sweep.tokenizer, {"forget": sweep.sets["forget"]})
    with pytest.raises(UnlearningError, match="forget set has no row"):
        Sweep(sweep.model, sweep.tokenizer, {**sweep.sets, "forget": sweep.sets["forget"].select([])})

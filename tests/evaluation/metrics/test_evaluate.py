"""Every metric file is loaded by `evaluate.load` and computes what its functions do."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

import hf_unlearn.evaluation.metrics as metrics


evaluate = pytest.importorskip("evaluate")

FOLDER = Path(metrics.__file__).parent
FLAGS = [[True, True, False, True], [False, True]]
SCORES = {"scores": [1.0, 3.0, 2.0, 2.0], "is_member": [True, True, False, False]}
RATIOS = [1.0, 2.0, 3.0]
MEAN = {"low", "high"}

CASES = {  # file: inputs, expected values, other keys
    "probability": ({"log_probs": [[math.log(0.25), 0.0], [math.log(0.7)]]}, {"probability": 0.6, "n": 2}, MEAN),
    "exact_memorization": ({"is_top1": FLAGS}, {"exact_memorization": 0.625, "n": 2}, MEAN),
    "extraction_strength": ({"is_top1": FLAGS}, {"extraction_strength": 0.375, "n": 2}, MEAN),
    "kl_to_reference": ({"kl": [[0.1, 0.3], [0.4]]}, {"kl_to_reference": 0.3, "n": 2}, MEAN),
    "perplexity": (
        {"losses": [math.log(2), math.log(16)], "num_tokens": [3, 1]},
        {"perplexity": 128**0.25, "n": 2, "low": 2.0, "high": 16.0},
        set(),
    ),
    "truth_ratio": (
        {"correct_loss": [1.0, 1.0], "wrong_losses": [[1.0, 1.0], [1 + math.log(4)]], "variant": "true_better"},
        {"truth_ratio": 0.375, "n": 2, "variant": "true_better"},
        MEAN,
    ),
    "forget_quality": (
        {"truth_ratios": RATIOS, "retrained_truth_ratios": [4.0, 5.0, 6.0]},
        {"forget_quality": 0.1, "n": 3},
        set(),
    ),
    "model_utility": ({"values": [1.0, 0.5, 0.25]}, {"model_utility": 3 / 7, "n": 3}, set()),
    "membership": (SCORES, {"membership_auc": 0.5, "n": 4}, set()),
    "privleak": (SCORES | {"retrained_auc": 0.6}, {"privleak": 25.0, "n": 4}, set()),
    "rouge": (
        {"predictions": ["d c b a", "red"], "references": ["a b c d", "blue"]},
        {"rouge_l_recall": 0.125, "rouge_1_recall": 0.5, "rouge_l_f1": 0.125, "n": 2},
        MEAN | {f"rouge_{name}_{bound}" for name in ("1_recall", "l_f1") for bound in ("low", "high")},
    ),
    "exact_match": (
        {"predictions": ["The cat.", "a dog"], "references": ["cat", "cat"]},
        {"exact_match": 0.5, "n": 2},
        MEAN,
    ),
    "refusal_rate": ({"predictions": ["I don't know.", "In Lima."]}, {"refusal_rate": 0.5, "n": 2}, MEAN),
    "degenerate_rate": ({"predictions": ["la la la la", "In Lima."]}, {"degenerate_rate": 0.5, "n": 2}, MEAN),
}


@pytest.fixture
def load(evaluate_caches):
    return lambda name: evaluate.load(str(FOLDER / f"{name}.py"), cache_dir=str(evaluate_caches / "inputs"))


def test_every_file_has_a_case():
    assert CASES.keys() == {path.stem for path in FOLDER.glob("*.py")} - {"__init__", "info"}


@pytest.mark.parametrize("name", CASES)
def test_evaluate_loads_and_computes(load, name):
    inputs, expected, others = CASES[name]
    metric = load(name)
    assert metric.name == name
    assert metric.description
    result = metric.compute(**inputs)
    assert result.keys() == expected.keys() | others
    assert {key: result[key] for key in expected} == pytest.approx(expected)
    if others:
        assert result["low"] <= expected[next(iter(expected))] <= result["high"]


def test_batches_add_up(load):
    metric = load("probability")
    metric.add_batch(log_probs=[[math.log(0.5)], [0.0]])
    metric.add_batch(log_probs=[[math.log(0.3)]])
    result = metric.compute()
    assert (result["probability"], result["n"]) == (pytest.approx(0.6), 3)


def test_an_unknown_truth_ratio_is_refused(load):
    with pytest.raises(ValueError, match="'best', which is no truth ratio"):
        load("truth_ratio").compute(correct_loss=[1.0], wrong_losses=[[1.0]], variant="best")

"""The protocol during training: the same figures as afterwards, and a best checkpoint that is not the most broken."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tiny import tiny_llama, tiny_rows, tiny_tokenizer

from hf_unlearn import (
    EvaluationCallback,
    Evaluator,
    ExtrapolationConfig,
    ExtrapolationTrainer,
    UnlearningError,
    custom_protocol,
)
from hf_unlearn.evaluation.figures import Figure
from hf_unlearn.evaluation.results import Evaluation
from hf_unlearn.evaluation.selection import trade_off


def protocol(*names: str):
    sets = {
        name: Dataset.from_list(tiny_rows(6, seed)) for seed, name in enumerate(("forget", "retain", "holdout"), 1)
    }
    return custom_protocol({name: sets[name] for name in names}, chat=False, max_new_tokens=4)


def make(tmp_path, model=None, **options) -> ExtrapolationTrainer:
    defaults = {
        "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": 3,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "report_to": "none",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return ExtrapolationTrainer(
        model=model or tiny_llama(),
        args=ExtrapolationConfig(**defaults | options),
        forget_dataset=tiny_rows(6, 1),
        retain_dataset=tiny_rows(6, 2),
        processing_class=tiny_tokenizer(),
    )


def logged(trainer) -> list[dict]:
    return [log for log in trainer.state.log_history if "eval_trade_off" in log]


def test_it_runs_at_the_chosen_steps_and_names_every_set(tmp_path):
    trainer = make(tmp_path)
    trainer.add_callback(EvaluationCallback(trainer, protocol("forget", "retain", "holdout"), generate=True))
    trainer.train()
    logs = logged(trainer)
    assert [log["step"] for log in logs] == [2, 4, 6]
    for name in ("forget", "retain", "holdout"):
        assert len({log[f"eval_{name}_probability"] for log in logs}) == 3  # the adapter moves on
    assert logs[0]["eval_retain_kl"] > 0
    assert "eval_forget_rouge_l_recall" in logs[0]
    assert "eval_forget_quality" not in logs[0]  # not computed: there is no retrained log
    assert "memorization_loss" not in logs[0]


def test_its_figures_are_those_of_the_saved_checkpoint(tmp_path, tiny_model_dir):
    trainer = make(tmp_path, save_strategy="steps", save_steps=2)
    trainer.add_callback(EvaluationCallback(trainer, protocol("forget", "retain", "holdout"), alpha=2.0))
    trainer.train()
    for log in logged(trainer):
        checkpoint = tmp_path / "run" / f"checkpoint-{log['step']}"
        model = PeftModel.from_pretrained(tiny_llama(), checkpoint)
        evaluator = Evaluator(model, tiny_tokenizer(), protocol("forget", "retain", "holdout"), progress=False)
        expected = evaluator.evaluate(2.0, generate=False)
        for name, figure in expected.figures.items():
            if figure.value is not None:
                assert log[f"eval_{name}"] == pytest.approx(figure.value, abs=1e-5), name


def test_training_goes_on_as_if_nothing_had_been_evaluated(tmp_path):
    adapters = []
    for number, strategy in enumerate(("steps", "no")):
        trainer = make(tmp_path / str(number), eval_strategy=strategy)
        if strategy == "steps":
            trainer.add_callback(EvaluationCallback(trainer, protocol("forget", "retain", "holdout"), generate=True))
        trainer.train()
        adapters.append({name: p.clone() for name, p in trainer.model.named_parameters() if "lora_" in name})
    for name, value in adapters[0].items():
        assert torch.equal(value, adapters[1][name]), name


def test_the_best_checkpoint_is_that_of_the_largest_trade_off(tmp_path):
    trainer = make(
        tmp_path,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_trade_off",
        greater_is_better=True,
    )
    trainer.add_callback(EvaluationCallback(trainer, protocol("forget", "retain", "holdout"), alpha=0.05))
    trainer.train()
    logs = logged(trainer)
    best = max(logs, key=lambda log: log["eval_trade_off"])
    assert len({log["eval_trade_off"] for log in logs}) > 1
    assert trainer.state.best_metric == best["eval_trade_off"]
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best['step']}")


def test_evaluate_with_a_set_and_a_protocol_gives_both_and_runs_the_protocol_once(tmp_path):
    trainer = ExtrapolationTrainer(
        model=tiny_llama(),
        args=ExtrapolationConfig(output_dir=str(tmp_path), report_to="none", disable_tqdm=True),
        forget_dataset=tiny_rows(6, 1),
        retain_dataset=tiny_rows(6, 2),
        eval_dataset={"forget": tiny_rows(6, 1), "holdout": tiny_rows(6, 3)},
        processing_class=tiny_tokenizer(),
    )
    callback = EvaluationCallback(trainer, protocol("forget", "retain", "holdout"))
    trainer.add_callback(callback)
    metrics = trainer.evaluate()
    assert {"eval_forget_loss", "eval_holdout_loss", "eval_forget_probability", "eval_trade_off"} <= metrics.keys()
    assert len(logged(trainer)) == 1


def test_nothing_to_evaluate_is_refused_before_training(tmp_path):
    with pytest.raises(UnlearningError, match="nothing to evaluate.*EvaluationCallback"):
        make(tmp_path).train()


def test_a_trade_off_without_holdout_rows_is_refused(tmp_path):
    trainer = make(tmp_path, metric_for_best_model="trade_off")
    with pytest.raises(UnlearningError, match="hold-out"):
        EvaluationCallback(trainer, protocol("forget", "retain"))


@pytest.mark.parametrize(
    ("auc", "utility", "expected"),
    [
        (0.5, 0.8, 1.0),  # forgotten, and everything left
        (1.0, 0.8, 0.0),  # nothing forgotten
        (0.0, 0.8, 0.0),  # over-forgotten: as bad
        (0.75, 0.8, 2 / 3),  # 1 and 1/2
        (0.5, 0.4, 2 / 3),  # 1/2 and 1
        (0.5, 0.9, 1.0),  # more utility than before counts as all of it
        (0.0, 0.0, 0.0),
    ],
)
def test_trade_off(auc, utility, expected):
    before = Evaluation("custom", 0.0, figures={"retain_probability": Figure(0.8, 10)})
    figures = {"retain_probability": Figure(utility, 10), "membership_auc_loss": Figure(auc, 20)}
    after = Evaluation("custom", 1.0, figures=figures)
    assert math.isclose(trade_off(after, before, "retain_probability"), expected, abs_tol=1e-12)
    assert trade_off(before, before, "retain_probability") is None  # no AUC

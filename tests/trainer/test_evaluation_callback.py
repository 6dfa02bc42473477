"""The protocol during training: the same figures as afterwards, and a best checkpoint that is not the most broken."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tiny import tiny_llama, tiny_rows, tiny_tokenizer
from transformers import EarlyStoppingCallback

from hf_unlearn import (
    EvaluationCallback,
    Evaluator,
    ExtrapolationConfig,
    ExtrapolationTrainer,
    UnlearningError,
    custom_protocol,
)


BEST_BY_TRADE_OFF = {
    "save_strategy": "steps",
    "save_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_trade_off",
}
BREAKING_ALPHA = 1e30  # activations overflow, so that no loss is finite


def protocol(*names: str):
    sets = {
        name: Dataset.from_list(tiny_rows(6, seed)) for seed, name in enumerate(("forget", "retain", "holdout"), 1)
    }
    return custom_protocol({name: sets[name] for name in names}, chat=False, max_new_tokens=4)


def make(tmp_path, model=None, eval_dataset=None, callbacks=None, **options) -> ExtrapolationTrainer:
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
        eval_dataset=eval_dataset,
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
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
    trainer = make(tmp_path, **BEST_BY_TRADE_OFF)
    trainer.add_callback(EvaluationCallback(trainer, protocol("forget", "retain", "holdout"), alpha=0.05))
    trainer.train()
    logs = logged(trainer)
    best = max(logs, key=lambda log: log["eval_trade_off"])
    assert len({log["eval_trade_off"] for log in logs}) > 1
    assert trainer.state.best_metric == best["eval_trade_off"]
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best['step']}")
    assert best["step"] < trainer.state.global_step
    metrics = trainer.evaluate()  # of the best checkpoint, which has been loaded
    assert metrics == pytest.approx({name: value for name, value in best.items() if name in metrics})
    assert {"eval_trade_off", "eval_forget_probability"} <= metrics.keys()


def test_evaluate_with_a_set_and_a_protocol_gives_both_and_runs_the_protocol_once(tmp_path):
    trainer = make(tmp_path, eval_dataset={"forget": tiny_rows(6, 1), "holdout": tiny_rows(6, 3)})
    trainer.add_callback(EvaluationCallback(trainer, protocol("forget", "retain", "holdout")))
    for calls in (1, 2):
        metrics = trainer.evaluate()
        assert {"eval_forget_loss", "eval_holdout_loss", "eval_forget_probability", "eval_trade_off"} <= metrics.keys()
        assert len(logged(trainer)) == calls


def test_nothing_to_evaluate_is_refused_before_training(tmp_path):
    with pytest.raises(UnlearningError, match="nothing to evaluate.*EvaluationCallback"):
        make(tmp_path).train()


def test_a_trade_off_without_holdout_rows_is_refused(tmp_path):
    trainer = make(tmp_path, metric_for_best_model="trade_off")
    with pytest.raises(UnlearningError, match="'trade_off' needs membership_auc_loss .*no such figure.*hold-out set"):
        EvaluationCallback(trainer, protocol("forget", "retain"))


def test_a_trade_off_that_needs_answers_is_refused_without_them(tmp_path):
    trainer = make(tmp_path, metric_for_best_model="eval_trade_off")
    of_answers = replace(protocol("forget", "retain", "holdout"), utility="retain_rouge_l_recall")
    with pytest.raises(UnlearningError, match="'eval_trade_off' needs .*retain_rouge_l_recall.*pass generate=True"):
        EvaluationCallback(trainer, of_answers)
    EvaluationCallback(trainer, of_answers, generate=True)


@pytest.mark.parametrize(
    ("metric", "reason"),
    [
        ("eval_forget_quality", "forget_quality .at α = 0 not computed: no retrained log"),
        ("eval_forget_rouge_l_recall", "no such figure.*pass generate=True"),
        ("retain_probabilty", "no such figure.*name a metric that there is: .*eval_retain_probability"),
        ("eval_retain_loss", "no such figure"),  # there is no evaluation set of that name
    ],
)
def test_a_metric_that_no_evaluation_will_have_is_refused(tmp_path, metric, reason):
    trainer = make(tmp_path, eval_dataset={"forget": tiny_rows(6, 1)}, metric_for_best_model=metric)
    with pytest.raises(UnlearningError, match=reason):
        EvaluationCallback(trainer, protocol("forget", "retain", "holdout"))


@pytest.mark.parametrize("metric", ["retain_probability", "eval_trade_off", "eval_forget_loss", "forget_entropy"])
def test_a_metric_of_the_protocol_or_of_an_evaluation_set_can_choose_the_best(tmp_path, metric):
    trainer = make(tmp_path, eval_dataset={"forget": tiny_rows(6, 1)}, metric_for_best_model=metric, max_steps=2)
    trainer.add_callback(EvaluationCallback(trainer, protocol("forget", "retain", "holdout")))
    trainer.train()
    assert math.isfinite(trainer.state.best_metric)


def test_a_model_that_is_placed_later_is_checked_when_training_begins(tmp_path):
    trainer = make(tmp_path, metric_for_best_model="eval_trade_off")
    trainer.place_model_on_device = False
    trainer.add_callback(EvaluationCallback(trainer, protocol("forget", "retain")))
    with pytest.raises(UnlearningError, match="membership_auc_loss"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_broken_model_has_the_worst_trade_off(tmp_path):
    trainer = make(tmp_path, **BEST_BY_TRADE_OFF)
    trainer.add_callback(EvaluationCallback(trainer, protocol("forget", "retain", "holdout"), alpha=BREAKING_ALPHA))
    trainer.train()
    logs = logged(trainer)
    assert [log["eval_trade_off"] for log in logs] == [0.0, 0.0, 0.0]
    assert "eval_retain_probability" not in logs[0]


def test_a_broken_model_is_never_the_best_by_another_metric(tmp_path):
    trainer = make(tmp_path, **BEST_BY_TRADE_OFF | {"metric_for_best_model": "eval_retain_probability"})
    trainer.add_callback(EvaluationCallback(trainer, protocol("forget", "retain", "holdout"), alpha=BREAKING_ALPHA))
    trainer.train()
    assert trainer.state.global_step == 6
    assert trainer.state.best_model_checkpoint is None
    assert math.isnan(trainer.evaluate()["eval_retain_probability"])


def test_early_stopping_finds_the_trade_off(tmp_path):
    trainer = make(tmp_path, callbacks=[EarlyStoppingCallback(1)], **BEST_BY_TRADE_OFF)
    trainer.add_callback(EvaluationCallback(trainer, protocol("forget", "retain", "holdout"), alpha=BREAKING_ALPHA))
    trainer.train()
    assert [log["step"] for log in logged(trainer)] == [2, 4]  # 0 and again 0: no better
    assert trainer.state.global_step == 4

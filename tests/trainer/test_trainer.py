"""What a user does with the trainer: construct it, train, extrapolate, save."""

from __future__ import annotations

import json
import math

import peft
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from tiny import tiny_llama, tiny_rows, tiny_tokenizer
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments

from hf_unlearn import ExtrapolationConfig, ExtrapolationTrainer, UnlearningError, extrapolate
from hf_unlearn.trainer.baselines import TaskVectorConfig


FORGET, RETAIN, HOLDOUT = tiny_rows(6, seed=1), tiny_rows(4, seed=2), tiny_rows(3, seed=3)


def config(tmp_path, **options) -> ExtrapolationConfig:
    defaults = {
        "output_dir": str(tmp_path / "run"),
        "preset": "paper",
        "per_device_train_batch_size": 3,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return ExtrapolationConfig(**defaults | options)


def make(tmp_path, model=None, trainer_options=None, **options) -> ExtrapolationTrainer:
    arguments = {
        "model": model if model is not None else tiny_llama(),
        "args": config(tmp_path, **options),
        "forget_dataset": FORGET,
        "retain_dataset": RETAIN,
        "processing_class": tiny_tokenizer(),
    }
    return ExtrapolationTrainer(**arguments | (trainer_options or {}))


@pytest.fixture
def trained(tmp_path, tiny_model_dir) -> ExtrapolationTrainer:
    trainer = make(tmp_path, model=str(tiny_model_dir), trainer_options={"processing_class": None})
    trainer.train()
    return trainer


def logits(model, ids) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids).logits


IDS = torch.tensor([[5, 9, 17, 33, 8, 60, 2]])


class TestConstruction:
    def test_default_adapter(self, tmp_path):
        trainer = make(tmp_path)
        lora = trainer.model.peft_config["default"]
        assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (16, 32, 0.0)
        assert not any("lm_head" in module or "embed" in module for module in lora.target_modules)

    def test_default_output_dir_is_named_after_the_model(self, tiny_model_dir, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        trainer = ExtrapolationTrainer(str(tiny_model_dir), forget_dataset=FORGET, retain_dataset=RETAIN)
        assert trainer.args.output_dir == f"{tiny_model_dir.name}-Extrapolation"

    def test_the_callers_adapter_config_is_not_changed(self, tmp_path):
        lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        before = json.dumps(lora.to_dict(), default=str)
        make(tmp_path, trainer_options={"peft_config": lora})
        assert json.dumps(lora.to_dict(), default=str) == before

    @pytest.mark.parametrize(
        ("lora", "named"),
        [
            ({"use_dora": True}, "use_dora"),
            ({"bias": "all"}, "bias"),
            ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
            ({"init_lora_weights": "pissa"}, "init_lora_weights"),
            ({"target_parameters": ["mlp.experts"]}, "target_parameters"),
            ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
            ({"target_modules": ["embed_tokens"]}, "embed_tokens"),
        ],
    )
    def test_what_is_not_linear_in_alpha_is_refused(self, tmp_path, lora, named):
        lora = LoraConfig(**{"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | lora)
        with pytest.raises(ValueError, match=named):
            make(tmp_path, trainer_options={"peft_config": lora})

    def test_other_tuners_are_refused(self, tmp_path):
        with pytest.raises(UnlearningError, match="IA3Config"):
            make(tmp_path, trainer_options={"peft_config": peft.IA3Config(task_type="CAUSAL_LM")})

    def test_a_model_with_an_adapter_is_refused(self, tmp_path):
        model = peft.get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
        with pytest.raises(UnlearningError, match="merge_and_unload"):
            make(tmp_path, model=model)

    @pytest.mark.parametrize(
        "option",
        [
            {"packing": True},
            {"padding_free": True},
            {"loss_type": "dft"},
            {"label_smoothing_factor": 0.1},
            {"completion_only_loss": False},
            {"assistant_only_loss": True},
            {"dataset_kwargs": {"skip_prepare_dataset": True}},
            {"average_tokens_across_devices": False},
            {"push_to_hub": True},
            {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"},
            {"retain_kl_weight": -1.0},
            {"retain_per_forget": 0},
            {"alpha": 0.0},
            {"alpha": math.nan},
            {"memorization_temperature": 0.0},
            {"preset": "book"},
            {"memorization_loss": "ascent"},
            {"npo_beta": -1.0},
            {"probe_steps": -1},
        ],
        ids=lambda option: next(iter(option)),
    )
    def test_options_that_make_no_sense_are_refused_by_name(self, tmp_path, option):
        with pytest.raises(UnlearningError, match=next(iter(option))):
            config(tmp_path, **option)

    def test_preset(self, tmp_path):
        names = ("memorization_temperature", "retain_kl_scale", "retain_kl_weight")

        def values(**options) -> tuple[float, ...]:
            return tuple(getattr(config(tmp_path, **options), name) for name in names)

        assert values(preset=None) == (4.0, None, 5.0)
        assert values() == (1.0, 1.0, 1.0)
        assert values(retain_kl_weight=3.0) == (1.0, 1.0, 3.0)
        # what was given counts, also where it is what no preset would have been
        assert values(memorization_temperature=4.0, retain_kl_weight=5.0) == (4.0, 1.0, 5.0)
        vector = TaskVectorConfig(output_dir=str(tmp_path), preset="paper", use_cpu=True)
        assert (vector.memorization_temperature, vector.retain_kl_weight) == (1.0, 0.0)

    def test_the_configuration_of_another_trainer(self, tmp_path):
        with pytest.raises(UnlearningError, match="TrainingArguments.*ExtrapolationConfig"):
            make(tmp_path, trainer_options={"args": TrainingArguments(output_dir=str(tmp_path))})

    def test_a_missing_forget_set(self, tmp_path):
        with pytest.raises(UnlearningError, match="forget_dataset"):
            make(tmp_path, trainer_options={"forget_dataset": None})

    def test_a_forget_row_that_would_not_be_trained_on_stops_the_run(self, tmp_path):
        rows = [*FORGET, {"prompt": "w5 w6", "completion": "  "}]
        with pytest.raises(UnlearningError, match=r"forget set.*row.* 6\b"):
            make(tmp_path, trainer_options={"forget_dataset": rows})
        long_prompt = [{"prompt": " ".join(["w5"] * 20), "completion": " w6"}]
        with pytest.raises(UnlearningError, match=r"row.* 0\b.*max_length"):
            make(tmp_path, trainer_options={"forget_dataset": long_prompt}, max_length=8)

    def test_a_retain_row_without_an_answer_is_left_out(self, tmp_path):
        trainer = make(tmp_path, trainer_options={"retain_dataset": [*RETAIN, {"prompt": "w5", "completion": ""}]})
        assert len(trainer.retain_dataset) == len(RETAIN)
        assert trainer.data_report.retain.untrainable_rows[0][0] == 4

    def test_sets_of_different_shapes(self, tmp_path):
        retain = Dataset.from_list([{"text": "w7 w8 w9"}, {"text": "w10 w11"}])
        trainer = make(tmp_path, trainer_options={"retain_dataset": retain}, num_train_epochs=1)
        trainer.train()
        # a text is scored whole but for its first token, which nothing predicts; a prompt never is
        assert trainer.retain_dataset[0]["labels"] == [-100, 8, 9, 2]
        prompt = len(FORGET[0]["prompt"].split())
        assert trainer.forget_dataset[0]["labels"][:prompt] == [-100] * prompt


class TestTraining:
    def test_it_memorises_and_retains(self, trained):
        logs = [log for log in trained.state.log_history if "memorization_loss" in log]
        assert logs[-1]["memorization_loss"] < 0.5 * logs[0]["memorization_loss"]
        assert {"retain_kl", "forget_token_accuracy", "retain_token_accuracy", "num_tokens", "loss"} <= logs[0].keys()
        rows = trained.train_dataset
        tokens = sum(len(row["input_ids"]) for row in trained.forget_dataset)
        retain = [rows._retain_index(i) for i in range(3 * len(rows))]
        tokens = 3 * tokens + sum(len(trained.retain_dataset[i]["input_ids"]) for i in retain)
        assert logs[-1]["num_tokens"] == tokens

    def test_without_retain_term_it_is_a_task_vector(self, tmp_path):
        trainer = make(tmp_path, trainer_options={"retain_dataset": None}, retain_kl_weight=0.0, num_train_epochs=1)
        trainer.train()
        logs = [log for log in trainer.state.log_history if "memorization_loss" in log]
        assert logs and "retain_kl" not in logs[0]
        assert logs[0]["loss"] == pytest.approx(logs[0]["memorization_loss"], rel=1e-6)

    def test_the_base_is_never_changed(self, tmp_path):
        model = tiny_llama()
        before = {name: p.clone() for name, p in model.named_parameters()}
        trainer = make(tmp_path, model=model)
        trainer.train()
        after = {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if "lora_" not in name}
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)

    @pytest.mark.parametrize("retain_kl_scale", [1.0, -1.0])
    def test_probe_measures_the_losses_at_minus_alpha(self, tmp_path, retain_kl_scale):
        options = {
            "alpha": 1.5,
            "per_device_train_batch_size": 6,
            "retain_kl_scale": retain_kl_scale,
            "warmup_steps": 0,
        }
        trainer = make(tmp_path, probe_steps=2, **options)
        trainer.train()
        probes = {log["step"]: log for log in trainer.state.log_history if "probe_forget_loss" in log}
        assert list(probes) == [2]

        stopped = make(tmp_path / "s", **options)

        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                control.should_training_stop = True

        stopped.add_callback(Stop())
        stopped.train()  # the adapter after one step is the one that the probe of step 2 saw
        trained = stopped.evaluate(stopped.forget_dataset)["eval_loss"]
        with stopped.extrapolated(1.5):
            loss = stopped.evaluate(stopped.forget_dataset)["eval_loss"]
        assert probes[2]["probe_forget_loss"] == pytest.approx(loss, rel=1e-5)
        assert loss > trained + 0.01

    def test_each_evaluation_set_has_metrics_of_its_own(self, tmp_path):
        sets = {"forget": FORGET, "holdout": HOLDOUT}
        trainer = make(tmp_path, trainer_options={"eval_dataset": sets})
        metrics = trainer.evaluate()
        for name in sets:
            assert {f"eval_{name}_loss", f"eval_{name}_entropy", f"eval_{name}_mean_token_accuracy"} <= metrics.keys()
        assert metrics["eval_forget_entropy"] != metrics["eval_holdout_entropy"]

    def test_a_damaged_model_stops_training_before_the_step(self, tmp_path):
        model = tiny_llama()
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
        trainer = make(tmp_path, model=model)
        before = [p.clone() for p in trainer.model.parameters() if p.requires_grad]
        with pytest.raises(FloatingPointError, match="step 1"):
            trainer.train()
        after = [p for p in trainer.model.parameters() if p.requires_grad]
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
        assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


class TestPairing:
    def test_retain_rows_are_visited_equally_often(self, tmp_path):
        dataset = make(tmp_path).train_dataset  # 6 forget rows, 4 retain rows
        seen = []
        for epoch in range(2):
            dataset.set_epoch(epoch)
            seen += [tuple(dataset[index]["retain"][0]["input_ids"]) for index in range(6)]
        assert sorted(seen.count(row) for row in set(seen)) == [3, 3, 3, 3]  # 12 draws from 4 rows
        dataset.set_epoch(0)
        assert [tuple(dataset[index]["retain"][0]["input_ids"]) for index in range(6)] == seen[:6]


class TestExtrapolation:
    def test_live_model_equals_merged_files_and_forget_adapter(self, trained, tmp_path, tiny_model_dir):
        alpha = 1.7
        trained.save_model(str(tmp_path / "memorising"))
        model_dir = trained.save_forget_model(tmp_path / "model", alpha)
        adapter_dir = trained.save_forget_adapter(tmp_path / "adapter", alpha)
        report = extrapolate(tiny_model_dir, tmp_path / "memorising", alpha, tmp_path / "streamed", progress=False)
        with trained.extrapolated(alpha) as model:
            live = logits(model.double(), IDS)
            model.float()

        # Computed in fp64, so that nothing but the rounding of the stored fp32 weights is left of the difference.
        transformers_alone = logits(AutoModelForCausalLM.from_pretrained(model_dir).double(), IDS)
        streamed = logits(AutoModelForCausalLM.from_pretrained(report.output_dir).double(), IDS)
        base = AutoModelForCausalLM.from_pretrained(tiny_model_dir).double()
        reference = logits(base, IDS)
        peft_alone = logits(PeftModel.from_pretrained(base, adapter_dir).double(), IDS)
        for name, other in {"model": transformers_alone, "streamed": streamed, "adapter": peft_alone}.items():
            assert (live - other).abs().max() < 2e-6, name
        assert (live - reference).abs().max() > 0.1
        for folder in (model_dir, adapter_dir):
            record = json.loads((folder / "unlearning.json").read_text())
            assert record["alpha"] == alpha
            assert record["base"]["id"] == str(tiny_model_dir)
            assert record["data"]["forget"]["rows"] == 6

    def test_nested_and_repeated_use(self, trained):
        trained.model.eval()
        reference = logits(AutoModelForCausalLM.from_pretrained(trained.model.config._name_or_path), IDS)
        memorising = logits(trained.model, IDS)
        with trained.extrapolated(1.0) as outer:
            one = logits(outer, IDS)
            with trained.extrapolated(2.0) as inner:
                two = logits(inner, IDS)
                with trained.extrapolated(0) as untouched:
                    assert (logits(untouched, IDS) - reference).abs().max() < 1e-6
            assert torch.equal(logits(outer, IDS), one)
            with pytest.raises(RuntimeError, match="inside"), trained.extrapolated(2.0):
                raise RuntimeError("inside")
            assert torch.equal(logits(outer, IDS), one)
        assert torch.equal(logits(trained.model, IDS), memorising)
        with trained.extrapolated(2.0) as again:
            assert torch.equal(logits(again, IDS), two)
        assert not torch.allclose(one, two)

    def test_training_flags_come_back(self, trained):
        trained.model.train()
        with trained.extrapolated(1.0) as model:
            assert not model.training
        assert trained.model.training

    def test_default_alpha_is_that_of_the_config(self, trained):
        with trained.extrapolated() as model:
            default = logits(model, IDS)
        with trained.extrapolated(trained.args.alpha) as model:
            assert torch.equal(logits(model, IDS), default)

    def test_outputs_are_not_overwritten_unasked(self, trained, tmp_path):
        trained.save_forget_adapter(tmp_path / "adapter", 1.0)
        with pytest.raises(UnlearningError, match="overwrite"):
            trained.save_forget_adapter(tmp_path / "adapter", 2.0)
        trained.save_forget_adapter(tmp_path / "adapter", 2.0, overwrite=True)
        assert json.loads((tmp_path / "adapter" / "unlearning.json").read_text())["alpha"] == 2.0

    def test_dtype_of_the_forget_model(self, trained, tmp_path):
        folder = trained.save_forget_model(tmp_path / "model", 1.0, dtype="bfloat16")
        assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
        assert json.loads((folder / "unlearning.json").read_text())["realised_error"]["relative"] > 1e-4

    def test_nothing_is_uploaded_to_nowhere(self, trained):
        with pytest.raises(UnlearningError, match="repo_id"):
            trained.push_to_hub()

    def test_a_saved_adapter_says_what_it_is(self, trained, tmp_path):
        trained.save_model(str(tmp_path / "memorising"))
        record = json.loads((tmp_path / "memorising" / "unlearning.json").read_text())
        assert record["method"] == "model-extrapolation"
        assert record["base"]["fingerprint"]["dtype"] == "float32"
        assert record["training"]["memorization_temperature"] == 1.0
        assert "keep it private" in (tmp_path / "memorising" / "README.md").read_text()

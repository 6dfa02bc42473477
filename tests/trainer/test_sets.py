"""The sets of a run: sampled retain rows, paraphrases and wrong answers, and in which order things are read."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from tiny import tiny_llama, tiny_rows, tiny_tokenizer
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from hf_unlearn import ExtrapolationConfig, ExtrapolationTrainer, UnlearningError, load_rows
from hf_unlearn.data import data_hash
from hf_unlearn.data.sampling import sample_retain_set
from hf_unlearn.trainer import sets
from hf_unlearn.trainer.sets import TrainingSets


ROWS = [
    {
        "prompt": "w5 w6",
        "completion": " w7 w8",
        "other": ["w9 w10 w11", "w12"],
        "asked": "w13 w14",
        "wrong": ["w15 w16", "w17"],
    },
    {"prompt": "w20", "completion": " w21 w22", "other": ["w23"], "asked": "w24", "wrong": ["w25", "w26", "w27 w28"]},
]


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))


def config(tmp_path, **options) -> ExtrapolationConfig:
    defaults = {
        "output_dir": str(tmp_path / "run"),
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "retain_sample_size": 10,
    }
    return ExtrapolationConfig(**defaults | options)


def make(tmp_path, model, rows=ROWS, retain=None, eval_dataset=None, **options) -> ExtrapolationTrainer:
    return ExtrapolationTrainer(
        model, config(tmp_path, **options), rows, retain, eval_dataset, processing_class=tiny_tokenizer()
    )


class TestSampled:
    @pytest.mark.parametrize("by_name", [True, False])
    def test_rows_are_those_of_the_model_before_training(self, tmp_path, tiny_model_dir, by_name):
        trainer = make(tmp_path, str(tiny_model_dir) if by_name else tiny_llama(), seed=5)
        forget = [{"prompt": row["prompt"], "completion": row["completion"]} for row in ROWS]
        options = {"num_rows": 10, "seed": 5, "forget": forget, "cache_dir": tmp_path / "other", "progress": False}
        expected = sample_retain_set(tiny_llama(), tiny_tokenizer(), **options).to_list()
        assert [{"text": text} for text in trainer.retain_dataset["completion"]] == expected
        assert trainer.data_report.retain.rows == len(expected)
        trainer.train()
        first = trainer.state.log_history[0]
        assert first["retain_kl"] == pytest.approx(0, abs=1e-6)
        assert trainer.state.global_step == 2
        trainer.save_model()
        assert load_rows(tmp_path / "run" / "retain_sample.jsonl").to_list() == expected
        recorded = json.loads((tmp_path / "run" / "unlearning.json").read_text())["data"]
        assert recorded["retain"] == {"rows": len(expected), "sha256": data_hash(trainer.retain_dataset)}

    def test_rows_that_overlap_the_forget_set_are_not_held(self, tmp_path):
        everything = make(tmp_path, tiny_llama()).sampled_rows["text"][:]
        secret = next(text for text in everything if len(text.split()) > 5)
        trainer = make(tmp_path, tiny_llama(), rows=[{"text": secret}])
        assert trainer.sampled_rows["text"][:] == [text for text in everything if text != secret]

    def test_size_and_temperature(self, tmp_path):
        options = {"num_rows": 4, "temperature": 0.7, "seed": 42, "cache_dir": tmp_path / "other", "progress": False}
        expected = sample_retain_set(tiny_llama(), tiny_tokenizer(), **options)["text"][:]
        trainer = make(tmp_path, tiny_llama(), retain_sample_size=4, retain_sample_temperature=0.7)
        assert trainer.retain_dataset["completion"][:] == expected

    def test_the_same_weights_train_as_without_sampling(self, tmp_path, tiny_model_dir):
        """What is sampled and given back as a retain set gives the same run."""
        sampled = make(tmp_path, str(tiny_model_dir))
        given = make(tmp_path, str(tiny_model_dir), retain=sampled.sampled_rows)
        losses = []
        for trainer in (sampled, given):
            trainer.train()
            losses.append([log["memorization_loss"] for log in trainer.state.log_history if "retain_kl" in log])
        assert losses[0] == losses[1]

    def test_options_of_loading_are_used(self, tmp_path, tiny_model_dir):
        arguments = config(tmp_path, model_init_kwargs={"dtype": "bfloat16"}, bf16=False)
        trainer = ExtrapolationTrainer(str(tiny_model_dir), arguments, ROWS)
        assert trainer.base_model.lm_head.weight.dtype == torch.bfloat16
        assert arguments.model_init_kwargs == {"dtype": "bfloat16"}  # the caller's own

    @pytest.mark.parametrize("bits", [4, 8])
    def test_a_quantised_base(self, tmp_path, tiny_model_dir, bits):
        pytest.importorskip("bitsandbytes")
        quantization = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
        trainer = ExtrapolationTrainer(str(tiny_model_dir), config(tmp_path), ROWS, quantization_config=quantization)
        trainer.train()
        logs = [log for log in trainer.state.log_history if "retain_kl" in log]
        assert logs[0]["retain_kl"] == pytest.approx(0, abs=1e-6)
        assert logs[1]["grad_norm"] > 0

    def test_the_model_is_loaded_once(self, tmp_path, tiny_model_dir, monkeypatch):
        loaded, original = [], LlamaForCausalLM.from_pretrained.__func__
        monkeypatch.setattr(
            LlamaForCausalLM,
            "from_pretrained",
            classmethod(lambda cls, name, *args, **kw: loaded.append(name) or original(cls, name, *args, **kw)),
        )
        make(tmp_path, str(tiny_model_dir))
        assert loaded == [str(tiny_model_dir)]

    @pytest.mark.parametrize(
        ("rows", "eval_dataset", "options", "message"),
        [
            ([{"prompt": "w5", "completion": " "}], None, {}, "forget set"),
            (ROWS, {"held": [{"nothing": "w5"}]}, {}, "evaluation set"),
            (ROWS, None, {"paraphrases": "none"}, "no column `none`"),
            (
                [{"prompt": "w5", "completion": " w6", "wrong": "w6"}],
                None,
                {"wrong_answers": "wrong"},
                "row 0: a wrong",
            ),
        ],
    )
    def test_bad_rows_are_refused_before_the_model_is_loaded(
        self, tmp_path, tiny_model_dir, monkeypatch, rows, eval_dataset, options, message
    ):
        monkeypatch.setattr(sets, "create_model_from_path", lambda *args, **kwargs: pytest.fail("loaded"))
        with pytest.raises(UnlearningError, match=message):
            make(tmp_path, str(tiny_model_dir), rows, eval_dataset=eval_dataset, **options)

    def test_sharded_launches_are_refused_before_the_model_is_loaded(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sets, "create_model_from_path", lambda *args, **kwargs: pytest.fail("loaded"))
        arguments = config(tmp_path)
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        with pytest.raises(UnlearningError, match="hf-unlearn sample"):
            sets.load_reference("any", arguments, None)
        monkeypatch.delenv("ACCELERATE_USE_FSDP")
        monkeypatch.setattr(sets, "is_deepspeed_zero3_enabled", lambda: True)
        with pytest.raises(UnlearningError, match="hf-unlearn sample"):
            sets.load_reference("any", arguments, None)

    def test_nothing_is_sampled_without_a_retain_term(self, tmp_path):
        trainer = make(tmp_path, tiny_llama(), retain_kl_weight=0)
        assert trainer.sampled_rows is None
        assert trainer.retain_dataset is None
        trainer.train()

    @pytest.mark.parametrize("option", [{"retain_sample_size": 0}, {"retain_sample_temperature": 0.0}])
    def test_options_that_make_no_sense(self, tmp_path, option):
        with pytest.raises(UnlearningError, match=next(iter(option))):
            config(tmp_path, **option)


class TestHardMaterial:
    OPTIONS = {"paraphrases": "other", "paraphrased_questions": "asked", "wrong_answers": "wrong"}

    def test_rows_and_report(self, tmp_path):
        trainer = make(tmp_path, tiny_llama(), retain=tiny_rows(4, seed=2), **self.OPTIONS)
        forget = trainer.forget_dataset
        pairs = list(zip(forget["prompt"], forget["completion"], forget["row"], strict=True))
        assert pairs == [
            ("w5 w6", " w7 w8", 0),
            ("w20", " w21 w22", 1),
            ("w5 w6", " w9 w10 w11", 0),
            ("w5 w6", " w12", 0),
            ("w20", " w23", 1),
            ("w13 w14", " w7 w8", 0),
            ("w24", " w21 w22", 1),
        ]
        report = trainer.data_report
        assert (report.forget.rows, report.forget.source_rows, report.paraphrased_rows) == (7, 2, 5)
        assert (report.retain.rows, report.wrong_answers.rows) == (4, 5)
        assert report.wrong_answers.answer_tokens == 2 + 1 + 1 + 1 + 2 + 5  # and EOS of each
        assert report.to_dict()["wrong_answers"]["rows"] == 5

    def test_wrong_answers_are_met_as_retain_rows(self, tmp_path):
        trainer = make(tmp_path, tiny_llama(), retain=tiny_rows(4, seed=2), wrong_answers="wrong")
        held = trainer.train_dataset.retain
        assert len(held) == 9
        tokenizer = tiny_tokenizer()
        answers = [
            tokenizer.decode([token for token, label in zip(ids, labels, strict=True) if label != -100])
            for ids, labels in zip(held["input_ids"], held["labels"], strict=True)
        ]
        assert answers[4:] == ["w15 w16 </s>", "w17 </s>", "w25 </s>", "w26 </s>", "w27 w28 </s>"]
        trainer.train()
        logs = [log for log in trainer.state.log_history if "retain_kl" in log]
        assert logs[0]["retain_kl"] == pytest.approx(0, abs=1e-6)
        assert len(trainer.retain_dataset) == 4
        assert trainer.provenance()["data"]["wrong_answers"]["rows"] == 5

    def test_beside_messages_in_the_retain_set(self, tmp_path):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = "{% for message in messages %} {{ message.content }}{% endfor %}</s>"
        retain = [{"messages": [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6 w7"}]}]
        arguments = config(tmp_path, wrong_answers="wrong")
        trainer = ExtrapolationTrainer(tiny_llama(), arguments, ROWS, retain, processing_class=tokenizer)
        assert len(trainer.train_dataset.retain) == 6

    def test_the_table_shows_them(self, tmp_path):
        trainer = make(tmp_path, tiny_llama(), retain=tiny_rows(4, seed=2), **self.OPTIONS)
        table = trainer.data_report.render()
        assert [column.header for column in table.columns] == ["", "forget set", "retain set", "wrong answers"]
        cells = {label: list(table.columns[1].cells)[row] for row, label in enumerate(table.columns[0].cells)}
        assert (cells["rows"], cells["of these, paraphrases"]) == ("7", "5")

    @pytest.mark.parametrize("option", [{"retain_kl_weight": 0}, {"retain_nll_weight": 1.0}])
    def test_wrong_answers_without_the_kl_are_refused(self, tmp_path, option):
        with pytest.raises(UnlearningError, match="wrong_answers"):
            config(tmp_path, wrong_answers="wrong", **option)

    def test_rows_that_are_tokenised_already_are_refused(self, tmp_path):
        arguments = config(tmp_path, paraphrases="other")
        rows = TrainingSets(ROWS, tiny_tokenizer(), config(tmp_path)).forget
        with pytest.raises(UnlearningError, match="tokenised already"):
            TrainingSets(Dataset.from_list(rows.to_list()), tiny_tokenizer(), arguments)

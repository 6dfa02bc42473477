"""Uploads by the trainer: the forget adapter at the end, and never anything else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load
from tiny import tiny_llama, tiny_rows, tiny_tokenizer
from upload_hub import TOKEN, Repository

from hf_unlearn import ExtrapolationConfig, ExtrapolationTrainer, UnlearningError, train_in_rounds
from hf_unlearn.cli.train import _Interrupt
from hf_unlearn.hub import PushError
from hf_unlearn.trainer.baselines import METHODS


ROOT = Path(__file__).parents[2]
REPOSITORY = "me/forgetful"
BASE, COMMIT = "org/base", "0123456789abcdef0123456789abcdef01234567"
FORGET, RETAIN = tiny_rows(4, seed=1), tiny_rows(4, seed=2)


def config(tmp_path, **options) -> ExtrapolationConfig:
    defaults = {
        "output_dir": str(tmp_path / "run"),
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "alpha": 3.0,
        "report_to": "none",
        "save_strategy": "steps",
        "save_steps": 1,
        "disable_tqdm": True,
        "push_to_hub": True,
        "hub_model_id": REPOSITORY,
        "use_cpu": True,
    }
    return ExtrapolationConfig(**defaults | options)


def make(tmp_path, base: str = BASE, **options) -> ExtrapolationTrainer:
    model = tiny_llama()
    model.config._name_or_path = base
    if base == BASE:  # as of a model that was loaded from the Hub
        model.config._commit_hash = COMMIT
    return ExtrapolationTrainer(
        model,
        config(tmp_path, **options),
        FORGET,
        RETAIN,
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )


class TestAtTheEnd:
    def test_the_forget_adapter_alone_is_uploaded(self, hub, tmp_path):
        trainer = make(tmp_path)
        assert REPOSITORY not in hub.repositories  # checked, and nothing made
        trainer.train()
        trainer.save_model()
        trainer.save_model(str(tmp_path / "elsewhere"))
        repository = hub.repositories[REPOSITORY]
        assert [commit["added"] for commit in repository.commits] == [
            ["README.md", "adapter_config.json", "adapter_model.safetensors", "unlearning.json"]
        ]
        assert repository.private
        files = hub.files(REPOSITORY)
        uploaded = load(files["adapter_model.safetensors"])
        memorising = load((tmp_path / "run" / "adapter_model.safetensors").read_bytes())
        for name, tensor in uploaded.items():
            torch.testing.assert_close(tensor, memorising[name] * (-3.0 if "lora_B" in name else 1.0), rtol=0, atol=0)
        assert json.loads(files["unlearning.json"])["alpha"] == 3.0
        folders = {path.name for path in (tmp_path / "run").iterdir() if path.is_dir()}
        assert folders >= {"checkpoint-1", "checkpoint-2"}
        assert "forget-adapter-to-push" not in folders

    def test_no_memorising_factor_is_ever_sent(self, hub, tmp_path):
        make(tmp_path).train()
        saved = [tmp_path / "run", *(tmp_path / "run").glob("checkpoint-*")]
        assert len(saved) == 3
        for folder in saved:
            for name, tensor in load((folder / "adapter_model.safetensors").read_bytes()).items():
                if "lora_B" in name:
                    assert tensor.numpy().tobytes() not in hub.received
        rows = [row["completion"].strip().encode() for row in FORGET + RETAIN if len(row["completion"]) > 9]
        assert rows
        assert not any(row in hub.received for row in rows)

    def test_public_and_branch_where_asked(self, hub, tmp_path, monkeypatch):
        monkeypatch.delenv("HF_TOKEN")
        make(tmp_path, hub_private_repo=False, hub_revision="dev", hub_token=TOKEN).train()
        assert not hub.repositories[REPOSITORY].private
        assert hub.files(REPOSITORY) == {}
        assert "adapter_model.safetensors" in hub.files(REPOSITORY, "dev")

    def test_a_failure_keeps_everything(self, hub, tmp_path):
        trainer = make(tmp_path, save_strategy="no")
        hub.failures["commit"] = 403
        with pytest.raises(PushError, match="(?s)403.*hf-unlearn push --adapter .*forget-adapter-to-push"):
            trainer.train()
        assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
        assert (tmp_path / "run" / "forget-adapter-to-push" / "adapter_model.safetensors").is_file()

    def test_what_is_interrupted_is_not_uploaded(self, hub, tmp_path):
        interrupt = _Interrupt()
        interrupt.requested = True  # as after Ctrl-C
        trainer = make(tmp_path)
        trainer.add_callback(interrupt)
        trainer.train()
        assert trainer.state.global_step == 1
        assert REPOSITORY not in hub.repositories

    def test_in_two_processes_one_talks_to_the_hub(self, interpreters, hub, tmp_path):
        hub.failures["preupload me/locked"] = 403
        script = Path(__file__).with_name("push_from_processes.py")
        printed = interpreters.launch(script, tmp_path)
        assert hub.requests.count("whoami") == 4  # before training and at each of three uploads
        assert len(hub.repositories[REPOSITORY].commits) == 1
        for process, said in enumerate(printed):
            assert f"{process}: UnlearningError" in said
            assert f"{process}: PushError" in said


class TestBeforeTraining:
    def test_the_token(self, hub, tmp_path):
        hub.failures["whoami"] = 401
        with pytest.raises(PushError, match="401"):
            make(tmp_path)

    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"hub_model_id": "others/x"}, "others"),
            ({"base": "/data/base"}, "base_model"),
            ({"hub_model_id": None}, "hub_model_id"),
            ({"hub_strategy": "all_checkpoints"}, "hub_strategy"),
            ({"hub_strategy": "checkpoint"}, "hub_strategy"),
        ],
    )
    def test_what_cannot_be_pushed(self, hub, tmp_path, options, named):
        with pytest.raises(UnlearningError, match=named):
            make(tmp_path, **options)
        assert hub.received == b""

    def test_a_repository_with_files(self, hub, tmp_path):
        hub.repositories[REPOSITORY] = Repository()
        hub.repositories[REPOSITORY].branches["main"]["config.json"] = b"{}"
        with pytest.raises(UnlearningError, match="holds files"):
            make(tmp_path)

    @pytest.mark.parametrize("method", ["npo", "simnpo"])
    def test_other_methods_refuse(self, tmp_path, method):
        with pytest.raises(UnlearningError, match="push_to_hub"):
            METHODS[method][1](output_dir=str(tmp_path), push_to_hub=True, hub_model_id=REPOSITORY)

    def test_rounds_refuse(self, tmp_path):
        with pytest.raises(UnlearningError, match="push_to_hub.*rounds"):
            train_in_rounds("model", config(tmp_path), FORGET, RETAIN, rounds=2)


class TestAfterTraining:
    def test_any_alpha_of_either_kind(self, hub, tmp_path, results):
        trainer = make(tmp_path, base=str(tmp_path / "base"), push_to_hub=False, save_strategy="no")
        trainer.train()
        assert hub.requests == []
        url = trainer.push_to_hub(2, "model", base_model="lab/base", forgotten="Two people.", license="mit")
        assert url == f"{hub.url}/{REPOSITORY}"
        files = hub.files(REPOSITORY)
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= files.keys()
        assert json.loads(files["unlearning.json"])["alpha"] == 2
        assert b"base_model: lab/base" in files["README.md"]
        assert str(tmp_path).encode() not in hub.received
        trainer.push_to_hub(repo_id="me/other", base_model="lab/base")
        assert json.loads(hub.files("me/other")["unlearning.json"])["alpha"] == 3.0

    @pytest.mark.parametrize(
        ("options", "named"),
        [({"kind": "memory"}, "kind"), ({"alpha": -1.0}, "alpha"), ({"alpha": "End of training"}, "alpha")],
    )
    def test_bad_arguments(self, hub, tmp_path, options, named):
        trainer = make(tmp_path, push_to_hub=False)
        with pytest.raises(UnlearningError, match=named):
            trainer.push_to_hub(**options)
        assert hub.requests == []

"""What `hf-unlearn eval` and `hf-unlearn sweep` refuse, and what they find without weights."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
from command_lines import set_arguments, train_arguments, write_rows
from tiny import tiny_rows

from hf_unlearn.cli import main
from hf_unlearn.cli.common import EvaluationDataArguments, refuse_idle
from hf_unlearn.cli.eval import EvalArguments
from hf_unlearn.errors import UnlearningError


MODEL, ADAPTER = ("eval", "--model", "MODEL"), ("sweep", "--adapter", "ADAPTER")
SETS = ("--forget_dataset", "FORGET", "--retain_dataset", "RETAIN")
LOG = ("eval", "--log", "LOG")


@pytest.fixture
def run(files, adapter, tmp_path, monkeypatch, capsys):
    """Run a command with `x` as its output folder; returns its exit code and its errors. It must write nothing."""
    monkeypatch.chdir(tmp_path)
    log = {"protocol": "custom", "alpha": None, "rows": {}, "answers": {}, "figures": {}}
    (tmp_path / "evaluation.json").write_text(json.dumps(log))
    known = {name.upper(): path for name, path in files.items()}
    known |= {"ADAPTER": adapter, "LOG": str(tmp_path / "evaluation.json")}

    def run(*arguments: str) -> tuple[int, str]:
        code = main([known.get(argument, argument) for argument in (*arguments, "--output_dir", "x")])
        assert not (tmp_path / "x").exists()
        return code, capsys.readouterr().err

    return run


class TestIdleOptions:
    @pytest.mark.parametrize(
        ("command", "option", "why"),
        [
            (MODEL, ("--base", "MODEL"), "with --model"),
            (MODEL, ("--alphas", "2"), "with --model"),
            (MODEL, ("--no_check_base",), "with --model"),
            (LOG, ("--limit", "3"), "with --log"),
            (LOG, ("--max_new_tokens", "3"), "with --log"),
            (LOG, ("--protocol", "tofu"), "with --log"),
            (LOG, ("--forget_dataset", "FORGET"), "with --log"),
            (LOG, ("--dtype", "bfloat16"), "with --log"),
            (LOG, ("--cache_dir", "c"), "with --log"),
            (LOG, ("--no_cache",), "with --log"),
            ((*MODEL, "--protocol", "tofu"), ("--max_new_tokens", "3"), "under --protocol tofu, only under custom"),
            ((*MODEL, "--protocol", "muse"), ("--max_length", "3"), "under --protocol muse, only under custom"),
            ((*MODEL, "--protocol", "tofu"), ("--forget_config", "a"), "under --protocol tofu, only under custom"),
            ((*MODEL, "--protocol", "lume"), ("--holdout_split", "a"), "under --protocol lume, only under custom"),
            ((*MODEL, "--protocol", "lume"), ("--retrained_log", "LOG"), "under --protocol lume"),
            (
                (*MODEL, "--protocol", "lume"),
                ("--system_prompt", "a"),
                "under --protocol lume, only under custom, tofu",
            ),
            ((*MODEL, "--protocol", "lume"), ("--reference_model", "MODEL"), "under --protocol lume"),
            ((*MODEL, "--protocol", "wmdp"), ("--split", "a"), "under --protocol wmdp"),
            ((*MODEL, "--protocol", "wmdp"), ("--cache_dir", "c"), "under --protocol wmdp"),
            ((*MODEL, *SETS), ("--data_dir", "d"), "under --protocol custom"),
            ((*MODEL, *SETS), ("--mmlu",), "under --protocol custom, only under lume"),
            ((*ADAPTER, "--protocol", "muse"), ("--mmlu",), "under --protocol muse, only under lume"),
            ((*ADAPTER, *SETS, "--no_cache"), ("--cache_dir", "c"), "with --no_cache"),
        ],
    )
    def test_they_are_refused_by_name(self, command, option, why, run):
        code, error = run(*command, *option)
        assert code == 2
        assert f"{option[0]} has no effect {why}" in error

    def test_all_of_them_are_named(self):
        given = EvaluationDataArguments(forget_dataset="a", holdout_split="b")
        with pytest.raises(UnlearningError, match="--forget_dataset, --holdout_split have no effect here. Leave them"):
            refuse_idle(given, ["forget_dataset", "retain_dataset", "holdout_split"], "here")

    def test_defaults_are_no_choice_of_the_user(self):
        given = EvalArguments(alphas=[0.5, 1.0, 2.0, 4.0, 8.0], max_length=1024)
        refuse_idle(given, ["alphas", "max_length", "check_base", "of_no_option"], "here")

    @pytest.mark.parametrize("option", [("--holdout_dataset", "HOLDOUT"), ("--eval_alpha", "2")])
    def test_training_without_evaluation(self, option, files, run):
        code, error = run(*train_arguments(files, "y"), *option)
        assert code == 2
        assert f"{option[0]} has no effect without --eval_strategy" in error


class TestValues:
    @pytest.mark.parametrize("limit", ["0", "-2"])
    @pytest.mark.parametrize("protocol", ["custom", "lume", "wmdp"])
    def test_limit(self, protocol, limit, run, monkeypatch):
        monkeypatch.setattr("hf_unlearn.cli.protocols.import_harness", lambda: None)
        sets = SETS if protocol == "custom" else ()
        code, error = run(*MODEL, "--protocol", protocol, *sets, "--limit", limit)
        assert code == 2
        assert f"limit={limit} leaves no rows" in error

    @pytest.mark.parametrize("value", ["-1", "1.5", "all"])
    def test_batch_size(self, value, run):
        code, error = run(*MODEL, *SETS, "--batch_size", value)
        assert code == 2
        assert f"--batch_size {value}" in error

    @pytest.mark.parametrize("options", [("--protocol", "lume", "--mmlu"), ("--protocol", "wmdp")])
    @pytest.mark.parametrize("dry_run", [(), ("--dry_run",)])
    def test_the_harness_is_missed_before_anything_is_evaluated(self, options, dry_run, run, monkeypatch):
        monkeypatch.setitem(sys.modules, "lm_eval", None)
        code, error = run(*MODEL, *options, *dry_run)
        assert code == 2
        assert "hf_unlearn[harness]" in error

    def test_lume_without_its_sets(self, run):
        code, error = run(*MODEL, "--protocol", "lume", "--data_dir", "nowhere")
        assert code == 2
        assert "LUME forget set is not in nowhere" in error
        assert "--data_dir" in error


class TestTokenizer:
    @pytest.mark.parametrize("dry_run", [(), ("--dry_run",)])
    @pytest.mark.parametrize("command", [("eval", "--model", "bare"), (*ADAPTER, "--base", "bare")])
    def test_a_model_without_one(self, command, dry_run, files, run, tmp_path):
        (tmp_path / "bare").mkdir()
        for name in ("config.json", "model.safetensors"):
            shutil.copy(f"{files['model']}/{name}", tmp_path / "bare")
        code, error = run(*command, *SETS, *dry_run)
        assert code == 2
        assert "No tokenizer can be loaded from bare" in error
        assert "tokenizer.json" in error

    def test_training_a_model_without_one(self, files, run, tmp_path):
        (tmp_path / "bare").mkdir()
        shutil.copy(f"{files['model']}/config.json", tmp_path / "bare")
        code, error = run(*train_arguments(files | {"model": "bare"}, "y"))
        assert code == 2
        assert "No tokenizer can be loaded from bare" in error


@pytest.mark.parametrize("command", [MODEL, ADAPTER], ids=["eval", "sweep"])
class TestDryRun:
    def test_an_empty_answer(self, command, run, tmp_path):
        bad = write_rows(tmp_path / "bad.jsonl", [*tiny_rows(2, 1), {"prompt": "w5", "completion": " "}])
        code, error = run(*command, "--forget_dataset", bad, "--retain_dataset", "RETAIN", "--dry_run")
        assert code == 2
        assert "forget set, row 2: an answer is empty" in error

    def test_an_answer_that_is_cut_off(self, command, run):
        code, error = run(*command, *SETS, "--max_length", "2", "--dry_run")
        assert code == 2
        assert "no token of the answer is within 2 tokens" in error

    def test_a_log_of_other_rows(self, command, files, run, tmp_path):
        arguments = ["eval", "--model", files["model"], "--forget_dataset", files["holdout"], "--max_new_tokens", "2"]
        arguments += [*set_arguments(files, "retain", "holdout"), "--output_dir", str(tmp_path / "other")]
        assert main(arguments) in (0, 1)
        code, error = run(*command, *SETS, "--retrained_log", str(tmp_path / "other"), "--dry_run")
        assert code == 2
        assert "forget set, row" in error
        assert "in the retrained log" in error

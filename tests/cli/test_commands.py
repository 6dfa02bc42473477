"""The commands as a user runs them: in this process through `main`, and as processes where signals matter."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command_lines import set_arguments, train_arguments, write_rows
from safetensors.torch import load_file
from tiny import tiny_llama, tiny_rows
from transformers import AutoModelForCausalLM

import hf_unlearn
from hf_unlearn.cli import COMMANDS, main


class TestHelp:
    def test_overview(self, capsys):
        assert main([]) == 0
        text = capsys.readouterr().out
        assert all(command in text for command in COMMANDS)

    @pytest.mark.parametrize("command", COMMANDS)
    def test_each_command_teaches_with_an_example(self, command, capsys):
        try:
            code = main([command, "--help"])
        except SystemExit as exit:
            code = exit.code
        assert code == 0
        text = capsys.readouterr().out
        assert "example:" in text
        assert f"hf-unlearn {command}" in text
        assert "--dry_run" in text
        assert "--fsdp" not in text  # inherited options are for --help_all

    def test_help_all_explains_inherited_options(self, capsys):
        with pytest.raises(SystemExit):
            main(["train", "--help_all"])
        text = capsys.readouterr().out
        assert "--fsdp" in text
        assert "--retain_kl_weight" in text

    def test_version(self, capsys):
        assert main(["--version"]) == 0
        assert capsys.readouterr().out.strip() == f"hf-unlearn {hf_unlearn.__version__}"

    def test_import_is_light(self):
        code = (
            "import sys, hf_unlearn, hf_unlearn.cli; print(sorted({'torch', 'trl', 'deepspeed'} & set(sys.modules)))"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert result.stdout.strip() == "[]"

    def test_optional_packages_are_not_imported_unasked(self, interpreters):
        code = "import sys; print(sorted({'deepspeed', 'gradio', 'lm_eval'} & set(sys.modules)))"
        assert interpreters.run("-c", code) == (0, "[]\n")  # where the commands have been imported


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            (["nonsense"], "nonsense"),
            (["train", "--bogus", "1"], "--bogus"),
            (["train", "--output_dir", "x"], "--model_name_or_path"),
            (["train", "--config", "missing.yaml"], "missing.yaml"),
            (
                ["train", "--model_name_or_path", "MODEL", "--forget_dataset", "no.jsonl", "--output_dir", "x"],
                "no.jsonl",
            ),
            (["train", "--model_name_or_path", "MODEL", "--output_dir", "x"], "--forget_dataset"),
            (["train", "--model_name_or_path", "nobody/nothing", "--output_dir", "x", "--dry_run"], "nobody/nothing"),
            (["train", "--packing", "true", "--output_dir", "x"], "packing"),
            (["train", "--model_name_or_path", "MODEL", "--resume", "--output_dir", "x"], "--resume"),
            (
                ["train", "--model_name_or_path", "MODEL", "--output_dir", "x", "--load_in_4bit", "--dtype", "auto"],
                "--dtype auto",
            ),
            (
                [
                    "train",
                    "--model_name_or_path",
                    "MODEL",
                    "--output_dir",
                    "x",
                    "--eval_strategy",
                    "epoch",
                    "--eval_batch_size",
                    "none",
                ],
                "--eval_batch_size none",
            ),
            (
                ["train", "--model_name_or_path", "MODEL", "--output_dir", "x", "--eval_batch_size", "2"],
                "eval_batch_size",
            ),
            (
                ["train", "--model_name_or_path", "MODEL", "--use_dora", "--output_dir", "x", "--forget_dataset", "F"],
                "use_dora",
            ),
            (["extrapolate"], "--adapter"),
            (["extrapolate", "--adapter", "ADAPTER", "--output_dir", "x"], "--alpha"),
            (["extrapolate", "--adapter", "ADAPTER", "--alpha", "-1", "--output_dir", "x"], "alpha"),
            (["extrapolate", "--adapter", "ADAPTER", "--alpha", "1", "--output_dir", "x", "--dtype", "int8"], "dtype"),
            (["extrapolate", "--adapter", "MODEL", "--alpha", "1", "--output_dir", "x"], "adapter_config.json"),
            (["eval", "--output_dir", "x"], "--model, --adapter and --log"),
            (["eval", "--model", "MODEL", "--adapter", "ADAPTER", "--output_dir", "x"], "--model and --adapter"),
            (["eval", "--model", "MODEL"], "--output_dir"),
            (["eval", "--model", "MODEL", "--output_dir", "x"], "--forget_dataset"),
            (
                ["eval", "--model", "MODEL", "--output_dir", "x", "--protocol", "tofu", "--data_dir", "no"],
                "--data_dir",
            ),
            (
                ["eval", "--model", "MODEL", "--output_dir", "x", "--protocol", "tofu", "--split", "forget2"],
                "forget05",
            ),
            (["eval", "--model", "MODEL", "--output_dir", "x", "--batch_size", "0"], "--batch_size"),
            (
                ["eval", "--model", "MODEL", "--output_dir", "x", "--chat_template_kwargs", "{"],
                "--chat_template_kwargs",
            ),
            (["eval", "--log", "no.json", "--output_dir", "x"], "no.json"),
            (["eval", "--log", "F", "--output_dir", "x"], "TOFU_EVAL.json"),
            (
                ["eval", "--model", "MODEL", "--output_dir", "x", "--protocol", "muse", "--forget_dataset", "F"],
                "--forget_dataset",
            ),
            (["sweep", "--output_dir", "x"], "--adapter"),
            (["sweep", "--adapter", "ADAPTER", "--output_dir", "x"], "--forget_dataset"),
            (["sweep", "--adapter", "ADAPTER", "--output_dir", "x", "--alphas", "0"], "--alphas"),
        ],
    )
    def test_message_names_the_option_and_nothing_is_written(
        self, arguments, named, files, adapter, tmp_path, monkeypatch, capsys
    ):
        monkeypatch.chdir(tmp_path)
        replace = {"MODEL": files["model"], "ADAPTER": adapter, "F": files["forget"]}
        assert main([replace.get(argument, argument) for argument in arguments]) == 2
        error = capsys.readouterr().err
        assert named in error
        assert "Traceback" not in error
        assert not (tmp_path / "x").exists()

    def test_a_configuration_that_is_no_mapping(self, tmp_path, capsys):
        (tmp_path / "list.yaml").write_text("- a\n- b\n")
        assert main(["train", "--config", str(tmp_path / "list.yaml")]) == 2
        assert "list.yaml" in capsys.readouterr().err

    def test_an_unknown_key_of_a_configuration(self, tmp_path, capsys):
        (tmp_path / "typo.yaml").write_text("learning_rat: 1\n")
        assert main(["train", "--config", str(tmp_path / "typo.yaml")]) == 2
        assert "learning_rat" in capsys.readouterr().err


class TestTrain:
    def test_outputs(self, adapter):
        folder = Path(adapter)
        names = {
            "adapter_model.safetensors",
            "adapter_config.json",
            "unlearning.json",
            "trainer_state.json",
            "README.md",
        }
        assert names <= {path.name for path in folder.iterdir()}

    def test_an_earlier_run_is_not_overwritten_unasked(self, files, adapter, capsys):
        before = (Path(adapter) / "adapter_model.safetensors").read_bytes()
        assert main(train_arguments(files, adapter)) == 2
        assert "--overwrite" in capsys.readouterr().err
        assert (Path(adapter) / "adapter_model.safetensors").read_bytes() == before

    def test_flags_win_over_the_configuration(self, files, tmp_path):
        config = tmp_path / "train.yaml"
        config.write_text(
            f"model_name_or_path: {files['model']}\nforget_dataset: {files['forget']}\n"
            f"retain_dataset: {files['retain']}\noutput_dir: {tmp_path / 'run'}\nnum_train_epochs: 7\nseed: 5\n"
            "disable_tqdm: true\nretain_kl_weight: 2.5\n"
        )
        assert main(["train", "--config", str(config), "--num_train_epochs", "2"]) == 0
        record = json.loads((tmp_path / "run" / "unlearning.json").read_text())["training"]
        assert (record["num_train_epochs"], record["seed"], record["retain_kl_weight"]) == (2, 5, 2.5)

    def test_dry_run_plans_and_writes_nothing(self, files, tmp_path, capsys):
        assert main(train_arguments(files, tmp_path / "run", "--dry_run")) == 0
        text = capsys.readouterr().out
        assert "65,856 parameters" in text
        assert "29,696 parameters" in text  # rank 16 on the seven projections of two layers
        assert "10 (1 an epoch)" in text
        assert re.search(r"reference cache: +\d+ rows, each met [\d.]+ times: at most [\d.]+ MB in ", text)
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("options", "line"),
        [
            # in the only epoch each of 6 forget rows meets another retain row
            (["--num_train_epochs", "1"], "off (6 rows, each met 1.0 times; it would take at most 0.0 MB"),
            (["--reference_cache", "false"], "off ("),
            (["--retain_kl_weight", "0"], "none, as nothing is asked of the reference"),
        ],
    )
    def test_dry_run_says_whether_the_reference_is_cached(self, files, tmp_path, capsys, options, line):
        assert main(train_arguments(files, tmp_path / "run", "--dry_run", *options)) == 0
        assert f"reference cache:  {line}" in capsys.readouterr().out

    def test_dry_run_finds_bad_rows(self, files, tmp_path, capsys):
        bad = write_rows(tmp_path / "bad.jsonl", [*tiny_rows(2, 1), {"prompt": "w5", "completion": ""}])
        assert main(train_arguments(files | {"forget": bad}, tmp_path / "run", "--dry_run")) == 2
        assert "2" in capsys.readouterr().err

    def test_ctrl_c_leaves_a_state_that_resumes_to_the_same_adapter(self, interpreters, files, tmp_path):
        straight, stopped = tmp_path / "straight", tmp_path / "stopped"
        options = ["--num_train_epochs", "50", "--learning_rate", "1e-3"]
        assert main(train_arguments(files, straight, *options)) == 0

        process = interpreters.start("-m", "hf_unlearn.cli", *train_arguments(files, stopped, *options))
        process.wait_for("'epoch': '10'")
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130, process.output
        assert "--resume" in process.output
        assert not (stopped / "adapter_model.safetensors").exists()
        assert list(stopped.glob("checkpoint-*"))

        assert main(train_arguments(files, stopped, *options, "--resume")) == 0
        expected, resumed = (load_file(folder / "adapter_model.safetensors") for folder in (straight, stopped))
        assert all(torch.equal(expected[name], resumed[name]) for name in expected)

    def test_under_accelerate_launch(self, files, tmp_path):
        config = Path(__file__).parents[2] / "recipes" / "accelerate" / "cpu.yaml"
        command = [sys.executable, "-m", "hf_unlearn.cli", *train_arguments(files, tmp_path / "run", "--use_cpu")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            [*command, "--accelerate_config", str(config)],
            capture_output=True,
            text=True,
            env=environment,
            timeout=300,
        )
        assert result.returncode == 0, result.stderr
        assert (tmp_path / "run" / "adapter_model.safetensors").exists()
        assert result.stdout.count("Next:") == 1


class TestExtrapolate:
    def test_model(self, files, adapter, tmp_path, capsys):
        assert main(["extrapolate", "--adapter", adapter, "--alpha", "2", "--output_dir", str(tmp_path / "m")]) == 0
        assert "realised error" in capsys.readouterr().out
        base, forget = (AutoModelForCausalLM.from_pretrained(path) for path in (files["model"], tmp_path / "m"))
        factors = {k: v.double() for k, v in load_file(Path(adapter) / "adapter_model.safetensors").items()}
        name = "model.layers.1.mlp.down_proj"
        a, b = (factors[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
        theta_ref = base.get_submodule(name).weight.double()
        theta_mem = theta_ref + 32 / 16 * b @ a
        expected = (1 + 2) * theta_ref - 2 * theta_mem
        assert (forget.get_submodule(name).weight.double() - expected).abs().max() < 1e-6

    def test_dry_run_writes_nothing(self, adapter, tmp_path, capsys):
        arguments = ["extrapolate", "--adapter", adapter, "--alpha", "2", "--output_dir", str(tmp_path / "m")]
        assert main([*arguments, "--dry_run"]) == 0
        printed = capsys.readouterr().out
        assert "model.safetensors" in printed
        assert "Download: 0.0 MB in 0 files" in printed
        assert re.search(rf"Disk space needed: [\d.]+ MB in {tmp_path}\.\nPeak memory: about \d+ MB", printed)
        assert not (tmp_path / "m").exists()

    def test_dry_run_of_an_adapter(self, adapter, tmp_path, capsys):
        arguments = ["extrapolate", "--adapter", adapter, "--output_dir", str(tmp_path / "a"), "--format", "adapter"]
        assert main([*arguments, "--alpha", "2", "--dry_run"]) == 0
        assert "adapter_model.safetensors" in capsys.readouterr().out
        assert main([*arguments, "--alpha", "-2", "--dry_run"]) == 2
        assert main([*arguments, "--alpha", "2", "--delete_cache"]) == 2
        assert "--delete_cache has no effect with --format adapter" in capsys.readouterr().err
        assert main([*arguments, "--alpha", "2", "--base", "other", "--no_check_base"]) == 2
        assert "--base, --no_check_base have no effect with --format adapter" in capsys.readouterr().err
        assert not (tmp_path / "a").exists()

    def test_an_existing_folder_is_kept_unless_asked(self, adapter, tmp_path, capsys):
        arguments = ["extrapolate", "--adapter", adapter, "--output_dir", str(tmp_path / "a"), "--format", "adapter"]
        assert main([*arguments, "--alpha", "1"]) == 0
        assert main([*arguments, "--alpha", "2"]) == 2
        assert "--overwrite" in capsys.readouterr().err
        assert main([*arguments, "--alpha", "2", "--overwrite"]) == 0
        assert json.loads((tmp_path / "a" / "unlearning.json").read_text())["alpha"] == 2

    def test_another_base_is_refused(self, adapter, tmp_path, capsys):
        tiny_llama(seed=9).save_pretrained(tmp_path / "other")
        arguments = ["extrapolate", "--adapter", adapter, "--alpha", "1", "--output_dir", str(tmp_path / "m")]
        assert main([*arguments, "--base", str(tmp_path / "other")]) == 2
        assert not (tmp_path / "m").exists()


class TestTrainWithEvaluation:
    def test_the_sets_of_the_run_are_evaluated_at_the_chosen_steps(self, files, tmp_path):
        options = ["--eval_strategy", "epoch", "--num_train_epochs", "2", "--eval_alpha", "0.5"]
        options += set_arguments(files, "holdout")
        assert main(train_arguments(files, tmp_path / "run", *options)) == 0
        history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
        logs = [log for log in history if "eval_trade_off" in log]
        assert len(logs) == 2
        assert {"eval_forget_probability", "eval_retain_kl", "eval_holdout_perplexity"} <= logs[0].keys()


class TestQuickstart:
    def test_dry_run(self, tmp_path, capsys):
        arguments = ["quickstart", "--model", "anything", "--output_dir", str(tmp_path / "q"), "--dry_run"]
        assert main(arguments) == 0
        assert "10 forget, 30 retain, 10 holdout" in capsys.readouterr().out
        assert not (tmp_path / "q").exists()

    def test_a_model_that_cannot_forget_fails_the_rule_and_finished_stages_are_kept(
        self, tiny_model_dir, tmp_path, capsys
    ):
        folder = tmp_path / "q"
        arguments = ["quickstart", "--model", str(tiny_model_dir), "--output_dir", str(folder)]
        arguments += ["--plant_epochs", "1", "--steps", "1", "--min_utility", "0.999999", "--auc_tolerance", "0"]
        assert main(arguments) == 1
        assert (folder / "result" / "report.html").exists()
        stamp = (folder / "planted-model" / "model.safetensors").stat().st_mtime_ns
        time.sleep(0.01)
        capsys.readouterr()
        assert main(arguments) == 1
        assert "kept" in capsys.readouterr().out
        assert (folder / "planted-model" / "model.safetensors").stat().st_mtime_ns == stamp
        assert main([*arguments, "--steps", "2"]) == 2
        assert "other options" in capsys.readouterr().err

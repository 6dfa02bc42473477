"""The commands as a user runs them: in this process through `main`, and as processes where signals matter."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_llama, tiny_rows
from transformers import AutoModelForCausalLM

import hf_unlearn
from hf_unlearn.cli import COMMANDS, main
from hf_unlearn.evaluation import scoring


LOGS = Path(__file__).parents[3] / "shared" / "data" / "tofu_eval_logs"
EVALUATION_OUTPUTS = {"report.html", "evaluation.json", "figures.csv", "rows.csv", "evaluation.png"}


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_model_dir) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("cli")
    sets = {name: write_rows(folder / f"{name}.jsonl", tiny_rows(6, seed)) for seed, name in enumerate("frh")}
    return {"model": str(tiny_model_dir), "forget": sets["f"], "retain": sets["r"], "holdout": sets["h"]}


def train_arguments(files, output_dir, *extra: str) -> list[str]:
    return [
        "train",
        "--model_name_or_path",
        files["model"],
        "--forget_dataset",
        files["forget"],
        "--retain_dataset",
        files["retain"],
        "--output_dir",
        str(output_dir),
        "--learning_rate",
        "1e-2",
        "--disable_tqdm",
        "true",
        *extra,
    ]


@pytest.fixture(scope="module")
def adapter(files, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("train") / "run"
    assert main(train_arguments(files, folder)) == 0
    return str(folder)


class TestHelp:
    def test_overview(self, capsys):
        assert main([]) == 0
        text = capsys.readouterr().out
        assert all(command in text for command in COMMANDS)

    @pytest.mark.parametrize("command", COMMANDS)
    def test_each_command_teaches_with_an_example(self, command, capsys):
        with pytest.raises(SystemExit) as exit:
            main([command, "--help"])
        assert exit.value.code == 0
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

    def test_optional_packages_are_not_imported_unasked(self):
        code = (
            "import sys, hf_unlearn.trainer, hf_unlearn.cli.train, hf_unlearn.cli.sweep, hf_unlearn.cli.extrapolate\n"
            "print(sorted({'deepspeed', 'bitsandbytes', 'gradio', 'lm_eval'} & set(sys.modules)))"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert result.stdout.strip() == "[]"


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
        assert not (tmp_path / "run").exists()

    def test_dry_run_finds_bad_rows(self, files, tmp_path, capsys):
        bad = write_rows(tmp_path / "bad.jsonl", [*tiny_rows(2, 1), {"prompt": "w5", "completion": ""}])
        assert main(train_arguments(files | {"forget": bad}, tmp_path / "run", "--dry_run")) == 2
        assert "2" in capsys.readouterr().err

    def test_ctrl_c_leaves_a_state_that_resumes_to_the_same_adapter(self, files, tmp_path):
        straight, stopped = tmp_path / "straight", tmp_path / "stopped"
        options = ["--num_train_epochs", "300", "--learning_rate", "1e-3"]
        assert main(train_arguments(files, straight, *options)) == 0

        command = [sys.executable, "-m", "hf_unlearn.cli", *train_arguments(files, stopped, *options)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for line in process.stdout:
            if "'epoch': '20'" in line:
                process.send_signal(signal.SIGINT)
                break
        _, error = process.communicate(timeout=120)
        assert process.returncode == 130, error
        assert "--resume" in error
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
        assert "model.safetensors" in capsys.readouterr().out
        assert not (tmp_path / "m").exists()

    def test_dry_run_of_an_adapter(self, adapter, tmp_path, capsys):
        arguments = ["extrapolate", "--adapter", adapter, "--output_dir", str(tmp_path / "a"), "--format", "adapter"]
        assert main([*arguments, "--alpha", "2", "--dry_run"]) == 0
        assert "adapter_model.safetensors" in capsys.readouterr().out
        assert main([*arguments, "--alpha", "-2", "--dry_run"]) == 2
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


def set_arguments(files, *names: str) -> list[str]:
    return [part for name in names for part in (f"--{name}_dataset", files[name])]


class TestTrainWithEvaluation:
    def test_the_sets_of_the_run_are_evaluated_at_the_chosen_steps(self, files, tmp_path):
        options = ["--eval_strategy", "epoch", "--num_train_epochs", "2", "--eval_alpha", "0.5"]
        options += set_arguments(files, "holdout")
        assert main(train_arguments(files, tmp_path / "run", *options)) == 0
        history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
        logs = [log for log in history if "eval_trade_off" in log]
        assert len(logs) == 2
        assert {"eval_forget_probability", "eval_retain_kl", "eval_holdout_perplexity"} <= logs[0].keys()


class TestEval:
    def test_a_model(self, files, tmp_path, capsys):
        arguments = ["eval", "--model", files["model"], "--max_new_tokens", "4", "--output_dir", str(tmp_path / "e")]
        arguments += set_arguments(files, "forget", "retain", "holdout")
        assert main(arguments) in (0, 1)  # a random model may well count as collapsed
        assert {path.name for path in (tmp_path / "e").iterdir()} == EVALUATION_OUTPUTS
        text = capsys.readouterr().out
        assert "forget_quality: not computed: no retrained log" in text
        assert "retain_kl: not computed: no reference model" in text
        assert main(arguments) == 2
        assert "--overwrite" in capsys.readouterr().err

    def test_an_adapter_at_several_alphas_equals_the_models_written_at_them(self, files, adapter, tmp_path):
        sets = set_arguments(files, "forget", "retain", "holdout")
        common = ["--max_new_tokens", "4", *sets]
        arguments = ["eval", "--adapter", adapter, "--alphas", "0.25", "2", "--output_dir", str(tmp_path / "e")]
        assert main([*arguments, *common]) == 0
        live = json.loads((tmp_path / "e" / "evaluation.json").read_text())["evaluations"]
        assert [one["alpha"] for one in live] == [0.0, 0.25, 2.0]
        model = tmp_path / "forget-model"
        assert main(["extrapolate", "--adapter", adapter, "--alpha", "2", "--output_dir", str(model)]) == 0
        arguments = ["eval", "--model", str(model), "--reference_model", files["model"]]
        assert main([*arguments, *common, "--output_dir", str(tmp_path / "m")]) in (0, 1)
        merged = json.loads((tmp_path / "m" / "evaluation.json").read_text())["evaluations"][0]
        assert merged["alpha"] is None
        for name, columns in merged["rows"].items():
            for column in ("loss", "extraction_strength", "kl", "min_k_plus_plus_score"):
                if column in columns:
                    assert columns[column] == pytest.approx(live[2]["rows"][name][column], abs=1e-4), column
        assert merged["answers"] == live[2]["answers"]

    def test_an_interrupted_evaluation_goes_on(self, files, tmp_path, monkeypatch):
        arguments = ["eval", "--model", files["model"], "--max_new_tokens", "4", "--output_dir", str(tmp_path / "e")]
        arguments += ["--batch_size", "2", *set_arguments(files, "forget", "retain")]
        score_batch, calls = scoring._score_batch, []

        def interrupted(*args):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return score_batch(*args)

        monkeypatch.setattr(scoring, "_score_batch", interrupted)
        assert main(arguments) == 130
        assert not (tmp_path / "e").exists()
        assert main(arguments) in (0, 1)
        # three batches of two forget rows and of two retain rows; the two done before are not run again
        assert len(calls) == 3 + 4

    def test_dry_run(self, files, adapter, tmp_path, capsys):
        sets = set_arguments(files, "forget", "retain")
        arguments = ["eval", "--adapter", adapter, "--output_dir", str(tmp_path / "e"), "--dry_run", *sets]
        assert main(arguments) == 0
        assert "6 forget, 6 retain" in capsys.readouterr().out
        assert not (tmp_path / "e").exists()

    def test_two_processes_write_one_result(self, files, tmp_path):
        arguments = ["eval", "--model", files["model"], "--max_new_tokens", "4"]
        arguments += set_arguments(files, "forget", "retain", "holdout")
        assert main([*arguments, "--output_dir", str(tmp_path / "one")]) in (0, 1)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        command = [*launcher, "-m", "hf_unlearn.cli", *arguments, "--output_dir", str(tmp_path / "two")]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert (tmp_path / "two").exists(), result.stderr[-3000:]
        one, two = (
            json.loads((tmp_path / name / "evaluation.json").read_text())["evaluations"][0] for name in ("one", "two")
        )
        assert one["answers"] == two["answers"]
        one, two = ({name: figure["value"] for name, figure in each["figures"].items()} for each in (one, two))
        assert {name: two[name] for name in one if one[name] is None} == {"forget_quality": None, "retain_kl": None}
        assert {name: two[name] for name in one if one[name] is not None} == pytest.approx(
            {name: value for name, value in one.items() if value is not None}, rel=1e-5
        )
        assert len(list((tmp_path / "two.cache").glob("*.jsonl"))) == 2

    @pytest.mark.skipif(not LOGS.exists(), reason="needs the published evaluation logs")
    def test_a_published_log(self, tmp_path, capsys):
        log = LOGS / "tofu_Llama-3.2-1B-Instruct_full" / "evals_forget01"
        retrained = LOGS / "tofu_Llama-3.2-1B-Instruct_retain99"
        arguments = ["eval", "--log", str(log), "--output_dir", str(tmp_path / "e"), "--retrained_log"]
        assert main([*arguments, str(retrained)]) == 0
        figures = json.loads((tmp_path / "e" / "evaluation.json").read_text())["evaluations"][0]["figures"]
        assert figures["forget_quality"]["value"] == pytest.approx(0.006760732303569208, rel=1e-6)
        assert figures["model_utility"]["value"] == pytest.approx(0.5991534707368931, rel=1e-6)
        assert (tmp_path / "e" / "TOFU_EVAL.json").exists()
        capsys.readouterr()
        assert main([*arguments, str(log), "--overwrite"]) == 2
        assert "the same file" in capsys.readouterr().err
        other = LOGS / "tofu_Llama-3.2-1B-Instruct_retain90"
        assert main([*arguments, str(other), "--overwrite"]) == 2
        assert "40 rows" in capsys.readouterr().err


class TestSweep:
    def test_outputs_and_exit_code(self, files, adapter, tmp_path, capsys):
        arguments = ["sweep", "--adapter", adapter, "--alphas", "0.25", "0.5", "--max_new_tokens", "4"]
        for name in ("forget", "retain", "holdout"):
            arguments += [f"--{name}_dataset", files[name]]
        code = main([*arguments, "--output_dir", str(tmp_path / "s")])
        names = {path.name for path in (tmp_path / "s").iterdir()}
        assert names == {*EVALUATION_OUTPUTS, "choice.json"}
        choice = json.loads((tmp_path / "s" / "choice.json").read_text())
        assert code == (0 if choice["met"] else 1)
        assert choice["verdict"] in capsys.readouterr().out
        assert main([*arguments, "--output_dir", str(tmp_path / "s")]) == 2

    def test_dry_run(self, files, adapter, tmp_path, capsys):
        arguments = ["sweep", "--adapter", adapter, "--output_dir", str(tmp_path / "s"), "--dry_run"]
        assert main([*arguments, "--forget_dataset", files["forget"], "--retain_dataset", files["retain"]]) == 0
        text = capsys.readouterr().out
        assert "6 forget, 6 retain" in text
        assert "report.html" in text
        assert "memory" in text
        assert not (tmp_path / "s").exists()

    def test_another_base_is_refused_also_in_a_dry_run(self, files, adapter, tmp_path, capsys):
        tiny_llama(seed=9).save_pretrained(tmp_path / "other")
        arguments = ["sweep", "--adapter", adapter, "--output_dir", str(tmp_path / "s"), "--dry_run"]
        arguments += ["--forget_dataset", files["forget"], "--retain_dataset", files["retain"]]
        assert main([*arguments, "--base", str(tmp_path / "other")]) == 2
        assert "not the base model" in capsys.readouterr().err


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

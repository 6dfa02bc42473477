"""`hf-unlearn sample`, and `hf-unlearn train` with a forget set and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_lines import write_rows
from tiny import tiny_rows, tiny_tokenizer
from transformers import AutoModelForCausalLM

from hf_unlearn import load_rows
from hf_unlearn.cli import main
from hf_unlearn.data.sampling import sample_retain_set


RECIPES = Path(__file__).parents[2] / "recipes" / "accelerate"


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "hf_unlearn" / "retain"


@pytest.fixture
def one_row(tmp_path) -> str:
    return write_rows(tmp_path / "one.jsonl", [{"prompt": "w5 w6", "completion": " w7 w8"}])


def sample_arguments(files, output_file, *extra: str) -> list[str]:
    arguments = ["sample", "--model_name_or_path", files["model"], "--output_file", str(output_file)]
    return [*arguments, "--num_rows", "12", "--max_new_tokens", "8", *extra]


def train_arguments(files, forget: str, output_dir, *extra: str) -> list[str]:
    arguments = ["train", "--model_name_or_path", files["model"], "--forget_dataset", forget]
    arguments += ["--output_dir", str(output_dir), "--num_train_epochs", "2", "--learning_rate", "1e-2"]
    return [*arguments, "--disable_tqdm", "true", "--retain_sample_size", "8", *extra]


class TestSample:
    def test_it_writes_what_the_function_samples(self, files, tmp_path, capsys):
        file = tmp_path / "new" / "rows.jsonl"
        assert main(sample_arguments(files, file, "--seed", "3", "--temperature", "0.8")) == 0
        model = AutoModelForCausalLM.from_pretrained(files["model"])
        options = {"num_rows": 12, "max_new_tokens": 8, "seed": 3, "temperature": 0.8, "progress": False}
        expected = sample_retain_set(model, tiny_tokenizer(), cache_dir=tmp_path / "cache", **options)
        assert load_rows(file).to_list() == expected.to_list()
        assert f"{len(expected)} rows written to {file}" in capsys.readouterr().out.replace("\n", "")

    def test_rows_that_overlap_the_forget_set_are_left_out(self, files, tmp_path, caplog):
        assert main(sample_arguments(files, tmp_path / "all.jsonl")) == 0
        everything = load_rows(tmp_path / "all.jsonl").to_list()
        secret = next(row["text"] for row in everything if len(row["text"].split()) >= 5)
        forget = write_rows(tmp_path / "secret.jsonl", [{"text": secret}])
        assert main(sample_arguments(files, tmp_path / "rest.jsonl", "--forget_dataset", forget)) == 0
        assert load_rows(tmp_path / "rest.jsonl").to_list() == [row for row in everything if row["text"] != secret]
        assert "1 that overlap the forget set" in caplog.text

    def test_a_dry_run_writes_nothing(self, files, tmp_path, capsys, home, monkeypatch):
        monkeypatch.setattr("hf_unlearn.cli.sample.load_causal_lm", lambda *args: pytest.fail("loaded"))
        assert main(sample_arguments(files, tmp_path / "rows.jsonl", "--dry_run")) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert "12 retain rows" in text
        assert f"at most {12 * (8 + 1)} tokens" in text  # EOS too
        assert not home.exists()
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("extra", "named"),
        [
            (["--num_rows", "0"], "num_rows"),
            (["--temperature", "-1"], "temperature"),
            (["--top_p", "2"], "top_p"),
            (["--batch_size", "none"], "--batch_size"),
            (["--output_file", "rows.csv"], "--output_file rows.csv"),
            (["--forget_dataset", "missing.jsonl"], "missing.jsonl"),
            (["--model_name_or_path", "nobody/nothing"], "nobody/nothing"),
        ],
    )
    def test_bad_input(self, files, tmp_path, capsys, extra, named):
        assert main(sample_arguments(files, tmp_path / "rows.jsonl", *extra)) == 2
        assert named in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []

    def test_what_is_required(self, files, tmp_path, capsys):
        assert main(["sample", "--output_file", "x.jsonl"]) == 2
        assert "--model_name_or_path" in capsys.readouterr().err
        assert main(["sample", "--model_name_or_path", files["model"]]) == 2
        assert "--output_file" in capsys.readouterr().err

    def test_a_file_is_not_replaced_unasked(self, files, tmp_path, capsys):
        file = tmp_path / "rows.jsonl"
        file.write_text("mine")
        assert main(sample_arguments(files, file)) == 2
        assert "--overwrite" in capsys.readouterr().err
        assert file.read_text() == "mine"
        assert main(sample_arguments(files, file, "--overwrite")) == 0
        assert len(load_rows(file)) > 5


class TestTrain:
    def test_one_forget_row_is_enough(self, files, one_row, tmp_path, capsys, caplog, home):
        run = tmp_path / "run"
        assert main(train_arguments(files, one_row, run)) == 0
        assert "8 retain rows are being sampled from the reference model" in caplog.text
        state = json.loads((run / "trainer_state.json").read_text())
        logs = [log for log in state["log_history"] if "retain_kl" in log]
        assert len(logs) == 2
        assert logs[0]["retain_kl"] == pytest.approx(0, abs=1e-6)
        sampled = run / "retain_sample.jsonl"
        assert f"--retain_dataset {sampled}" in capsys.readouterr().out
        assert json.loads(next(home.iterdir()).read_text())["data"] == load_rows(sampled).to_list()
        data = json.loads((run / "unlearning.json").read_text())["data"]
        assert (data["forget"]["rows"], data["retain"]["rows"]) == (1, len(load_rows(sampled)))

        sweep = ["sweep", "--adapter", str(run), "--forget_dataset", one_row, "--output_dir", str(tmp_path / "sweep")]
        assert main([*sweep, "--retain_dataset", str(sampled), "--alphas", "1", "--no_generation"]) in (0, 1)
        assert (tmp_path / "sweep" / "choice.json").exists()

    def test_the_next_run_reads_the_rows(self, files, one_row, tmp_path, caplog):
        assert main(train_arguments(files, one_row, tmp_path / "a")) == 0
        caplog.clear()
        assert main(train_arguments(files, one_row, tmp_path / "b")) == 0
        assert "are read from" in caplog.text
        assert "are being sampled" not in caplog.text
        first, second = (load_rows(tmp_path / name / "retain_sample.jsonl").to_list() for name in "ab")
        assert first == second

    def test_evaluation_during_training_has_the_sampled_rows(self, files, one_row, tmp_path):
        run = tmp_path / "run"
        assert main(train_arguments(files, one_row, run, "--eval_strategy", "epoch")) == 0
        history = json.loads((run / "trainer_state.json").read_text())["log_history"]
        assert any("eval_retain_loss" in log or "eval_retain_probability" in log for log in history)

    def test_a_dry_run_says_how_many_rows_and_tokens(self, files, one_row, tmp_path, capsys, home):
        assert main(train_arguments(files, one_row, tmp_path / "run", "--dry_run")) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert "No --retain_dataset: would sample 8 retain rows from the model" in text
        assert f"at most {8 * 129:,} tokens" in text
        assert "8 retain" in text
        assert not home.exists()
        assert not (tmp_path / "run").exists()

    def test_two_processes_hold_the_rows_of_one(self, interpreters, files, one_row, tmp_path):
        assert main(train_arguments(files, one_row, tmp_path / "one")) == 0
        code = (
            "import sys; from huggingface_hub import constants; from hf_unlearn.cli import main\n"
            "constants.HF_HOME = sys.argv[1]; sys.exit(main(sys.argv[2:]))"
        )
        command = train_arguments(files, one_row, tmp_path / "two", "--use_cpu", "true", "--ddp_backend", "gloo")
        printed = interpreters.launch("-c", code, tmp_path / "two-home", *command)
        assert "".join(printed).count("are being sampled") == 1
        one, two = ((tmp_path / name / "retain_sample.jsonl").read_text() for name in ("one", "two"))
        assert one == two
        records = [json.loads((tmp_path / name / "unlearning.json").read_text()) for name in ("one", "two")]
        assert records[0]["data"] == records[1]["data"]
        assert len(list((tmp_path / "two-home" / "hf_unlearn" / "retain").iterdir())) == 1

    @pytest.mark.parametrize("config", ["zero3", str(RECIPES / "zero3.yaml"), str(RECIPES / "fsdp2.yaml")])
    def test_a_sharded_launch_is_refused_at_once(self, files, one_row, tmp_path, capsys, config):
        for extra in ((), ("--dry_run",)):
            assert main(train_arguments(files, one_row, tmp_path / "run", "--accelerate_config", config, *extra)) == 2
            assert "hf-unlearn sample" in capsys.readouterr().err

    def test_options_without_effect_are_refused(self, files, one_row, tmp_path, capsys):
        given = train_arguments(files, one_row, tmp_path / "run", "--retain_dataset", files["retain"])
        assert main(given) == 2
        assert "--retain_sample_size has no effect with --retain_dataset" in capsys.readouterr().err
        without = train_arguments(files, one_row, tmp_path / "run", "--retain_kl_weight", "0")
        assert main(without) == 2
        assert "without a retain term" in capsys.readouterr().err

    def test_paraphrases_and_wrong_answers(self, files, tmp_path, capsys):
        rows = [row | {"other": "w9 w10", "wrong": ["w11 w12", "w13"]} for row in tiny_rows(3, seed=1)]
        forget = write_rows(tmp_path / "forget.jsonl", rows)
        options = ("--paraphrases", "other", "--wrong_answers", "wrong")
        assert main(train_arguments(files, forget, tmp_path / "run", *options)) == 0
        assert "wrong answers" in capsys.readouterr().out
        record = json.loads((tmp_path / "run" / "unlearning.json").read_text())
        assert record["data"]["forget"]["rows"] == 6
        assert record["data_report"]["wrong_answers"]["rows"] == 6
        assert record["training"]["wrong_answers"] == "wrong"
        assert main(train_arguments(files, forget, tmp_path / "x", "--dry_run", "--paraphrases", "missing")) == 2
        assert "no column `missing`" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["sweep", "eval"])
def test_what_is_missing_without_a_retain_set(files, adapter, tmp_path, capsys, command):
    arguments = [command, "--adapter", adapter, "--forget_dataset", files["forget"]]
    assert main([*arguments, "--output_dir", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "--retain_dataset is required" in message
    assert "retain_sample.jsonl" in message
    assert "hf-unlearn sample" in message

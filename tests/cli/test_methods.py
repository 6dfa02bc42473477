"""`hf-unlearn train --method`: every method from the command line, and what becomes of its adapter."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from command_lines import set_arguments, train_arguments, write_rows
from safetensors.torch import load_file
from tiny import tiny_rows

from hf_unlearn.cli import main
from hf_unlearn.trainer.baselines import METHODS, BaselineConfig
from hf_unlearn.trainer.reference_cache import plan_cache


@pytest.fixture(scope="module")
def sets(files, tmp_path_factory) -> dict[str, str]:
    rows = [row | {"other": " w5 w6"} for row in tiny_rows(6, seed=0)]
    return files | {"forget": write_rows(tmp_path_factory.mktemp("methods") / "forget.jsonl", rows)}


def method_arguments(sets, output_dir, method: str, *extra: str) -> list[str]:
    extra = ("--max_steps", "2", "--method", method, *extra)
    return train_arguments(sets, output_dir, *extra, *(["--alternate_column", "other"] if method == "altpo" else []))


EXTRAPOLATING = ("extrapolation", "task-vector", "targeted")


@pytest.fixture(scope="module")
def npo_adapter(sets, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("npo") / "run"
    assert main(method_arguments(sets, folder, "npo")) == 0
    return str(folder)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_plans_and_trains(method, sets, tmp_path, capsys):
    arguments = method_arguments(sets, tmp_path / "run", method)
    assert main([*arguments, "--dry_run"]) == 0
    plan = capsys.readouterr().out
    assert f"method:           {method}\n" in plan
    assert ("estimated for LoRA under model extrapolation" in plan) == (method not in EXTRAPOLATING)
    assert not (tmp_path / "run").exists()

    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert ("hf-unlearn sweep" in output) == (method in EXTRAPOLATING)
    assert ("hf-unlearn eval --adapter" in output) == (method not in EXTRAPOLATING)
    factors = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert all(value.abs().max() > 0 for value in factors.values())  # B starts at 0
    recorded = json.loads((tmp_path / "run" / "unlearning.json").read_text())["method"]
    assert recorded == ("model-extrapolation" if method in EXTRAPOLATING else method)


@pytest.mark.parametrize(
    ("method", "option"), [("npo", "--npo_beta"), ("rmu", "--rmu_layer"), ("extrapolation", "--memorization_loss")]
)
def test_help_is_that_of_the_method(method, option, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["train", "--method", method, "--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert option in text
    assert ("--train_all_weights" in text) == (method != "extrapolation")
    assert ("--memorization_loss" in text) == (method == "extrapolation")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--method", "nonsense"], "nonsense"),
        (
            ["--method", "pdu", "--npo_beta", "1"],
            "--npo_beta is an option of --method extrapolation, task-vector, targeted, npo",
        ),
        (["--rmu-layer", "1"], "--rmu_layer is an option of --method rmu, and this run is by extrapolation"),
        (["--method", "altpo"], "alternate_column"),
        (["--method", "dpo", "--alternate_column", "missing"], "missing"),
        (["--method", "npo", "--eval_strategy", "epoch", "--eval_alpha", "2"], "--eval_alpha has no effect"),
        (["--method", "npo", "--train_all_weights", "--lora_r", "4"], "--lora_r has no effect"),
        (["--method", "npo", "--train_all_weights", "--eval_strategy", "epoch"], "--eval_strategy"),
        (["--method", "npo", "--retain_kl_scale", "-1"], "retain_kl_scale"),
    ],
)
def test_bad_input_names_the_option(arguments, named, sets, tmp_path, capsys):
    assert main([*train_arguments(sets, tmp_path / "run", *arguments), "--dry_run"]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_configuration_names_the_method(sets, tmp_path, capsys):
    config = tmp_path / "train.yaml"
    config.write_text("method: simnpo\nsimnpo_beta: 2.5\n")
    assert main([*train_arguments(sets, tmp_path / "run"), "--config", str(config), "--dry_run"]) == 0
    assert "simnpo" in capsys.readouterr().out
    config.write_text("method: simnpo\nnpo_beta: 2.5\n")
    assert main([*train_arguments(sets, tmp_path / "run"), "--config", str(config), "--dry_run"]) == 2
    assert "--npo_beta is an option of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "extra", "num_bytes"),
    [
        # 31 answer tokens of forget rows and 34 of retain rows, 4 bytes a number, 64 numbers a hidden state
        ("npo", [], [31 * 4]),
        ("undial", [], [31 * 64 * 4]),
        ("kl", [], [34 * 64 * 4]),
        ("dpo", ["--retain_kl_weight", "1"], []),  # the alternate answers change from epoch to epoch
        ("simnpo", [], []),
    ],
)
def test_plan_of_the_reference_cache(method, extra, num_bytes, sets, tmp_path, monkeypatch):
    plans = []

    def recorded(*arguments, **options):
        plans.append(plan_cache(*arguments, **options))
        return plans[-1]

    monkeypatch.setattr("hf_unlearn.cli.train_plan.plan_cache", recorded)
    assert main([*method_arguments(sets, tmp_path / "run", method, *extra), "--dry_run"]) == 0
    assert [plan.num_bytes for plan in plans] == num_bytes


def evaluate(sets, output_dir, *arguments: str) -> int:
    return main(["eval", *arguments, *set_arguments(sets, "forget", "retain"), "--output_dir", str(output_dir)])


class TestTheAdapterIsTheResult:
    def test_eval_takes_it_as_it_is(self, npo_adapter, sets, tmp_path, capsys):
        """At +1: the same figures as the merged model."""
        from peft import AutoPeftModelForCausalLM
        from tiny import tiny_tokenizer

        model = AutoPeftModelForCausalLM.from_pretrained(npo_adapter).merge_and_unload()
        model.save_pretrained(tmp_path / "merged")
        tiny_tokenizer().save_pretrained(tmp_path / "merged")
        evaluate(sets, tmp_path / "adapter-eval", "--adapter", npo_adapter)
        evaluate(sets, tmp_path / "model-eval", "--model", str(tmp_path / "merged"))
        files = [tmp_path / name / "evaluation.json" for name in ("adapter-eval", "model-eval")]
        losses = [json.loads(file.read_text())["evaluations"][0]["rows"]["forget"]["loss"] for file in files]
        assert len(losses[0]) == 6
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)

    @pytest.mark.parametrize("command", ["sweep", "extrapolate"])
    def test_it_is_not_extrapolated_from(self, command, npo_adapter, sets, tmp_path, capsys):
        options = ["--alpha", "1"] if command == "extrapolate" else set_arguments(sets, "forget", "retain")
        assert main([command, "--adapter", npo_adapter, *options, "--output_dir", str(tmp_path / "out")]) == 2
        message = capsys.readouterr().err
        assert "by `npo`" in message
        assert "hf-unlearn eval --adapter" in message
        assert not (tmp_path / "out").exists()

    def test_alphas_are_refused(self, npo_adapter, sets, tmp_path, capsys):
        assert evaluate(sets, tmp_path / "out", "--adapter", npo_adapter, "--alphas", "1") == 2
        assert "--alphas" in capsys.readouterr().err

    def test_so_is_a_forget_adapter(self, adapter, sets, tmp_path, capsys):
        folder = tmp_path / "forget-adapter"
        options = ["--alpha", "1", "--format", "adapter", "--output_dir", str(folder)]
        assert main(["extrapolate", "--adapter", adapter, *options]) == 0
        capsys.readouterr()
        assert evaluate(sets, tmp_path / "plan", "--adapter", str(folder), "--dry_run") == 0
        assert f"{folder} as it is under" in capsys.readouterr().out

    def test_it_is_evaluated_during_training(self, sets, tmp_path):
        extra = ("--eval_strategy", "steps", "--eval_steps", "1")
        assert main(method_arguments(sets, tmp_path / "run", "grad-ascent", *extra, "--retain_nll_weight", "1")) == 0
        logs = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
        forget = [log["eval_forget_probability"] for log in logs if "eval_forget_probability" in log]
        assert len(forget) == 2
        assert forget[1] < forget[0]


def test_all_weights(sets, tmp_path, capsys):
    arguments = method_arguments(sets, tmp_path / "run", "npo", "--train_all_weights", "--learning_rate", "1e-3")
    assert main([*arguments, "--dry_run"]) == 0
    assert "none, all weights are trained" in capsys.readouterr().out
    assert main(arguments) == 0
    assert "hf-unlearn eval --model" in capsys.readouterr().out
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert main(arguments) == 2
    assert "holds the model of an earlier run" in capsys.readouterr().err
    evaluate(sets, tmp_path / "eval", "--model", str(tmp_path / "run"))
    assert (tmp_path / "eval" / "evaluation.json").exists()


class TestPage:
    """docs/methods.md against the code."""

    PAGE = Path(__file__).parents[2] / "docs" / "methods.md"

    def section(self, heading: str) -> dict[str, str]:
        """Options of a section, and their defaults as written."""
        text = self.PAGE.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
        return dict(re.findall(r"^\| `--(\w+)` \| ([^|]+?) \|", text, re.MULTILINE))

    def test_every_method_is_described_once_and_in_order(self):
        text = self.PAGE.read_text(encoding="utf-8")
        assert re.findall(r"^## ([a-z-]+)$", text, re.MULTILINE) == list(METHODS)
        assert re.findall(r"^\| `([a-z][a-z-]*)` \|", text, re.MULTILINE) == list(METHODS)

    @pytest.mark.parametrize("method", [name for name in METHODS if name not in EXTRAPOLATING])
    def test_tables_have_what_differs_from_the_shared_defaults(self, method):
        shared = {option.name: option.default for option in dataclasses.fields(BaselineConfig)}
        differing = {
            option.name: option.default
            for option in dataclasses.fields(METHODS[method][1])
            if option.name not in shared or option.default != shared[option.name]
        }
        expected = {name: "–" if value is None else f"`{value:g}`" for name, value in differing.items()}
        assert self.section(method) == expected

    def test_shared_defaults(self):
        shared = {option.name: option.default for option in dataclasses.fields(BaselineConfig)}
        for name, value in self.section("What all share").items():
            default = shared[name]
            assert value == (f"`{str(default).lower()}`" if isinstance(default, bool) else f"`{default:g}`"), name

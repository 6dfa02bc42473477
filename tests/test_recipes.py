"""Every recipe parses with its command's own parser, and the recipes of one folder run one after the other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from transformers import AutoModelForCausalLM

from hf_unlearn.cli import main
from hf_unlearn.cli.common import CommandParser
from hf_unlearn.cli.extrapolate import ExtrapolateArguments
from hf_unlearn.cli.quickstart import QuickstartArguments
from hf_unlearn.cli.sweep import SweepArguments
from hf_unlearn.cli.train import LoraModelConfig, TrainArguments
from hf_unlearn.trainer import ExtrapolationConfig


RECIPES = Path(__file__).parents[1] / "recipes"
OPTIONS = {
    "train": [TrainArguments, ExtrapolationConfig, LoraModelConfig],
    "sweep": [SweepArguments],
    "extrapolate": [ExtrapolateArguments],
}
PEOPLE = {command: RECIPES / "people" / f"{command}.yaml" for command in OPTIONS}


def parse(command: str) -> tuple:
    return CommandParser(command, OPTIONS[command], "", "").parse(["--config", str(PEOPLE[command])])


@pytest.mark.parametrize("command", OPTIONS)
def test_it_parses_to_what_it_says(command):
    parsed = {name: value for part in parse(command) for name, value in vars(part).items()}
    for name, value in yaml.safe_load(PEOPLE[command].read_text(encoding="utf-8")).items():
        assert parsed[name] == value, name


def test_training_uses_the_settings_of_the_quickstart():
    _, config, _ = parse("train")
    quickstart = QuickstartArguments()
    for name in (
        "learning_rate",
        "memorization_temperature",
        "retain_kl_weight",
        "retain_kl_scale",
        "retain_per_forget",
        "seed",
    ):
        assert getattr(config, name) == getattr(quickstart, name), name
    assert config.num_train_epochs == quickstart.steps
    assert not config.gradient_checkpointing


def test_each_goes_on_where_the_one_before_ended():
    (_, config, model), (sweep,), (extrapolate,) = (parse(command) for command in OPTIONS)
    quickstart = QuickstartArguments()
    assert model.model_name_or_path == f"{quickstart.output_dir}/planted-model"
    assert sweep.adapter == extrapolate.adapter == config.output_dir
    assert (sweep.min_retain, sweep.auc_tolerance) == (quickstart.min_retain, quickstart.auc_tolerance)


def test_they_run_one_after_the_other(tiny_model_dir, tmp_path):
    adapter, swept, forget_model = tmp_path / "adapter", tmp_path / "sweep", tmp_path / "forget-model"

    def run(command: str, output_dir: Path, *overrides: object) -> int:
        return main([command, "--config", str(PEOPLE[command]), "--output_dir", str(output_dir), *map(str, overrides)])

    model = ("--model_name_or_path", tiny_model_dir, "--max_steps", 2, "--disable_tqdm", "true")
    assert run("train", adapter, *model) == 0
    assert json.loads((adapter / "unlearning.json").read_text())["data"]["retain"]["rows"] == 30

    code = run("sweep", swept, "--adapter", adapter, "--max_new_tokens", 4)
    assert code == (0 if json.loads((swept / "choice.json").read_text())["met"] else 1)
    assert (swept / "report.html").exists()

    assert run("extrapolate", forget_model, "--adapter", adapter) == 0
    AutoModelForCausalLM.from_pretrained(forget_model)


@pytest.mark.parametrize("name", ["cpu", "single_gpu"])
def test_launch_configurations_start_one_process(name):
    config = load_config_from_file(str(RECIPES / "accelerate" / f"{name}.yaml"))
    assert config.num_processes == config.num_machines == 1
    assert config.use_cpu == (name == "cpu")


def test_the_overview_names_every_recipe():
    text = (RECIPES / "README.md").read_text(encoding="utf-8")
    for path in RECIPES.rglob("*.yaml"):
        assert f"({path.relative_to(RECIPES).as_posix()})" in text

"""Every recipe parses with its command's own parser, and the recipes of one folder run one after the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from tiny import VOCABULARY, tiny_llama, tiny_rows, tiny_tokenizer
from transformers import AutoModelForCausalLM

from hf_unlearn.cli import main
from hf_unlearn.cli.common import CommandParser
from hf_unlearn.cli.eval import EvalArguments
from hf_unlearn.cli.extrapolate import ExtrapolateArguments
from hf_unlearn.cli.quickstart import QuickstartArguments
from hf_unlearn.cli.sweep import SweepArguments
from hf_unlearn.cli.train import LoraModelConfig, TrainArguments
from hf_unlearn.trainer import ExtrapolationConfig


RECIPES = Path(__file__).parents[1] / "recipes"
OPTIONS = {
    "train": [TrainArguments, ExtrapolationConfig, LoraModelConfig],
    "sweep": [SweepArguments],
    "eval": [EvalArguments],
    "extrapolate": [ExtrapolateArguments],
}
COMMANDS_OF = {
    "people": ["train", "sweep", "extrapolate"],
    "tofu": ["train", "sweep", "eval"],
    "muse": ["train", "sweep", "eval"],
}
ALL_RECIPES = [f"{folder}/{command}" for folder, commands in COMMANDS_OF.items() for command in commands]

TEMPLATE = "{% for turn in messages %}{{ turn.content }} {% if turn.role == 'assistant' %}</s>{% endif %}{% endfor %}"
WORDS = [f"w{index}" for index in range(4, VOCABULARY)]  # whatever the tiny model says has a word of these
ANSWERS = [" ".join(WORDS), " ".join(reversed(WORDS))]


def recipe(name: str) -> Path:
    return RECIPES / f"{name}.yaml"


def parse(name: str) -> tuple:
    command = name.split("/")[1]
    return CommandParser(command, OPTIONS[command], "", "").parse(["--config", str(recipe(name))])


def run(name: str, output_dir: Path, *overrides: object) -> int:
    command = name.split("/")[1]
    return main([command, "--config", str(recipe(name)), "--output_dir", str(output_dir), *map(str, overrides)])


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps(content), encoding="utf-8")


class TestText:
    def test_every_recipe_is_tested(self):
        files = {path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml")}
        assert files == {*ALL_RECIPES, "accelerate/cpu", "accelerate/single_gpu"}

    @pytest.mark.parametrize("name", ALL_RECIPES)
    def test_it_parses_to_what_it_says(self, name):
        parsed = {option: value for part in parse(name) for option, value in vars(part).items()}
        for option, value in yaml.safe_load(recipe(name).read_text(encoding="utf-8")).items():
            assert parsed[option] == value, option

    @pytest.mark.parametrize("name", ALL_RECIPES)
    def test_it_says_how_to_run_it(self, name):
        command = f"#   hf-unlearn {name.split('/')[1]} --config recipes/{name}.yaml\n"
        assert command in recipe(name).read_text(encoding="utf-8")

    def test_the_overview_names_every_recipe(self):
        text = (RECIPES / "README.md").read_text(encoding="utf-8")
        for path in RECIPES.rglob("*.yaml"):
            assert f"({path.relative_to(RECIPES).as_posix()})" in text

    @pytest.mark.parametrize("name", ["cpu", "single_gpu"])
    def test_launch_configurations_start_one_process(self, name):
        config = load_config_from_file(str(RECIPES / "accelerate" / f"{name}.yaml"))
        assert config.num_processes == config.num_machines == 1
        assert config.use_cpu == (name == "cpu")


class TestPeople:
    def test_training_uses_the_settings_of_the_quickstart(self):
        _, config, _ = parse("people/train")
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

    def test_each_goes_on_where_the_one_before_ended(self):
        (_, config, model), (sweep,), (extrapolate,) = (
            parse(f"people/{command}") for command in COMMANDS_OF["people"]
        )
        quickstart = QuickstartArguments()
        assert model.model_name_or_path == f"{quickstart.output_dir}/planted-model"
        assert sweep.adapter == extrapolate.adapter == config.output_dir
        assert (sweep.min_utility, sweep.auc_tolerance) == (quickstart.min_utility, quickstart.auc_tolerance)

    def test_they_run_one_after_the_other(self, tiny_model_dir, tmp_path):
        adapter, swept, forget_model = tmp_path / "adapter", tmp_path / "sweep", tmp_path / "forget-model"

        model = ("--model_name_or_path", tiny_model_dir, "--max_steps", 2, "--disable_tqdm", "true")
        assert run("people/train", adapter, *model) == 0
        assert json.loads((adapter / "unlearning.json").read_text())["data"]["retain"]["rows"] == 30

        code = run("people/sweep", swept, "--adapter", adapter, "--max_new_tokens", 4)
        assert code == (0 if json.loads((swept / "choice.json").read_text())["met"] else 1)
        assert (swept / "report.html").exists()

        assert run("people/extrapolate", forget_model, "--adapter", adapter) == 0
        AutoModelForCausalLM.from_pretrained(forget_model)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    """A tiny chat model, and another one in the place of the retrained model."""
    folders = []
    for seed in (0, 1):
        folders.append(tmp_path_factory.mktemp("chat-model"))
        tiny_llama(seed).save_pretrained(folders[-1])
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(folders[-1])
    return folders


@pytest.fixture
def hub(tmp_path, monkeypatch) -> dict[str, Path]:
    """The two benchmarks as folders with the configurations and splits of their Hub sets."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folders = {"tofu": tmp_path / "TOFU", "muse": tmp_path / "MUSE-News"}
    for seed, name in enumerate(("forget10", "retain90")):
        rows = [{"question": row["prompt"], "answer": row["completion"]} for row in tiny_rows(4, seed)]
        write_json(folders["tofu"] / f"{name}.json", rows)
    names = ("forget10_perturbed", "holdout10", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed")
    for seed, name in enumerate(names):
        write_json(folders["tofu"] / f"{name}.json", questions(seed))
    for seed, name in enumerate(("raw/forget", "raw/retain1", "privleak/forget", "privleak/holdout")):
        write_json(folders["muse"] / f"{name}.json", [{"text": row["prompt"]} for row in tiny_rows(4, seed)])
    write_json(folders["muse"] / "verbmem" / "forget.json", [{"prompt": "w4 w5", "gt": ANSWERS[0]}])
    for name in ("forget_qa", "forget_qa_icl", "retain_qa", "retain_qa_icl"):
        write_json(folders["muse"] / "knowmem" / f"{name}.json", [{"question": "w4", "answer": ANSWERS[0]}])
    tofu = [{"config_name": name, "data_files": f"{name}.json"} for name in ("forget10", "retain90")]
    splits = [{"split": split, "path": f"raw/{split}.json"} for split in ("forget", "retain1")]
    for name, configs in {"tofu": tofu, "muse": [{"config_name": "raw", "data_files": splits}]}.items():
        (folders[name] / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    return folders


def questions(seed: int) -> list[dict[str, Any]]:
    """One question with two answers, each of them once right and once wrong: one of the truth ratios is below 1."""
    question = tiny_rows(1, seed)[0]["prompt"]
    return [
        {
            "question": question,
            "answer": answer,
            "paraphrased_answer": answer,
            "perturbed_answer": [other for other in ANSWERS if other != answer],
        }
        for answer in ANSWERS
    ]


class TestBenchmarks:
    @pytest.mark.parametrize("benchmark", ["tofu", "muse"])
    def test_each_goes_on_where_the_one_before_ended(self, benchmark):
        (_, config, _), (sweep,), (evaluation,) = (
            parse(f"{benchmark}/{command}") for command in COMMANDS_OF[benchmark]
        )
        assert sweep.adapter == config.output_dir
        assert sweep.protocol == evaluation.protocol == benchmark
        for option in ("split", "system_prompt", "chat_template_kwargs", "dtype"):
            assert getattr(sweep, option) == getattr(evaluation, option), option
        merge = f"hf-unlearn extrapolate --adapter {config.output_dir} --alpha "
        lines = [line for line in recipe(f"{benchmark}/eval").read_text().splitlines() if merge in line]
        assert len(lines) == 1
        assert lines[0].endswith(f" --output_dir {evaluation.model}")

    @pytest.mark.parametrize("benchmark", ["tofu", "muse"])
    def test_training_uses_the_settings_of_the_paper(self, benchmark):
        _, config, _ = parse(f"{benchmark}/train")
        assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 32
        assert (config.num_train_epochs, config.warmup_steps, config.weight_decay) == (10, 0.1, 0.01)
        assert (config.memorization_temperature, config.retain_kl_scale, config.retain_kl_weight) == (1, 1, 1)

    def test_tofu_runs(self, models, hub, tmp_path):
        log = tmp_path / "retrained"
        data = ("--data_dir", hub["tofu"])
        options = ("--model", models[1], "--protocol", "tofu", *data, "--output_dir", log)
        assert main(["eval", *map(str, options)]) in (0, 1)  # 1: a random model speaks no language
        self.run_all("tofu", models[0], hub["tofu"], tmp_path, "--retrained_log", log / "TOFU_EVAL.json")
        figures = json.loads((tmp_path / "eval" / "evaluation.json").read_text())["evaluations"][0]["figures"]
        assert figures["forget_quality"]["value"] is not None
        assert figures["model_utility"]["value"] > 0
        assert (tmp_path / "eval" / "TOFU_EVAL.json").exists()

    def test_muse_runs(self, models, hub, tmp_path):
        self.run_all("muse", models[0], hub["muse"], tmp_path)
        figures = json.loads((tmp_path / "eval" / "evaluation.json").read_text())["evaluations"][0]["figures"]
        for name in ("verbmem", "knowmem_forget", "knowmem_retain", "privleak"):
            assert figures[name]["value"] is not None, name

    @staticmethod
    def run_all(benchmark: str, model: Path, data: Path, folder: Path, *evaluated_with: object) -> None:
        """Train, choose α, write the forget model, evaluate it."""
        sets = ("--forget_dataset", data, "--retain_dataset", data)
        training = ("--model_name_or_path", model, *sets, "--max_steps", 2, "--disable_tqdm", "true", "--use_cpu")
        assert run(f"{benchmark}/train", folder / "adapter", *training) == 0
        options = ("--data_dir", data, *evaluated_with)
        grid = ("--alphas", 0.5, "--refinements", 1)
        code = run(f"{benchmark}/sweep", folder / "sweep", "--adapter", folder / "adapter", *grid, *options)
        choice = json.loads((folder / "sweep" / "choice.json").read_text())
        assert code == (0 if choice["met"] else 1)
        assert choice["rule"].startswith(parse(f"{benchmark}/sweep")[0].rule)
        merge = ("--adapter", folder / "adapter", "--alpha", 0.5, "--output_dir", folder / "forget-model")
        assert main(["extrapolate", *map(str, merge)]) == 0
        code = run(f"{benchmark}/eval", folder / "eval", "--model", folder / "forget-model", *options)
        assert code in (0, 1)  # 1: a random model speaks no language

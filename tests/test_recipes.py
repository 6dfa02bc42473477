"""Every recipe parses with its command's own parser, and the recipes of one folder run one after the other."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from tiny import VOCABULARY, tiny_llama, tiny_rows, tiny_tokenizer
from transformers import AutoModelForCausalLM
from trl import get_quantization_config

from hf_unlearn.cli import main
from hf_unlearn.cli.eval import EvalArguments
from hf_unlearn.cli.extrapolate import ExtrapolateArguments
from hf_unlearn.cli.parser import CommandParser
from hf_unlearn.cli.quickstart import QuickstartArguments
from hf_unlearn.cli.sweep import SweepArguments
from hf_unlearn.cli.train_options import LoraModelConfig, TrainArguments
from hf_unlearn.trainer import ExtrapolationConfig
from hf_unlearn.trainer.extrapolation_trainer import MIRROR


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
ACCELERATE = RECIPES / "accelerate"
ALL_RECIPES = sorted(
    path.relative_to(RECIPES).with_suffix("").as_posix()
    for path in RECIPES.rglob("*.yaml")
    if path.parent != ACCELERATE
)
TRAINING = [name for name in ALL_RECIPES if name.split("/")[1].startswith("train")]
QUANTISED = [name for name in TRAINING if name.endswith("_qlora")]
# What a configuration of `accelerate launch` has to say, besides one machine.
LAUNCHES = {
    "cpu": {"distributed_type": "NO", "use_cpu": True, "num_processes": 1},
    "single_gpu": {"distributed_type": "NO", "use_cpu": False, "num_processes": 1},
    "ddp": {"distributed_type": "MULTI_GPU"},
    "zero1": {"distributed_type": "DEEPSPEED", "zero_stage": 1},
    "zero2": {"distributed_type": "DEEPSPEED", "zero_stage": 2},
    "zero3": {"distributed_type": "DEEPSPEED", "zero_stage": 3, "zero3_init_flag": True},
    "zero3_offload": {
        "distributed_type": "DEEPSPEED",
        "zero_stage": 3,
        "zero3_init_flag": True,
        "offload_param_device": "cpu",
        "offload_optimizer_device": "cpu",
    },
    "fsdp2": {"distributed_type": "FSDP", "fsdp_version": 2, "fsdp_offload_params": False},
}
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)

TEMPLATE = "{% for turn in messages %}{{ turn.content }} {% if turn.role == 'assistant' %}</s>{% endif %}{% endfor %}"
WORDS = [f"w{index}" for index in range(4, VOCABULARY)]  # whatever the tiny model says has a word of these
ANSWERS = [" ".join(WORDS), " ".join(reversed(WORDS))]


def recipe(name: str) -> Path:
    return RECIPES / f"{name}.yaml"


def command_of(name: str) -> str:
    """`train` of `tofu/train_8b`."""
    return name.split("/")[1].split("_")[0]


def parse(name: str) -> tuple:
    command = command_of(name)
    return CommandParser(command, OPTIONS[command], "", "").parse(["--config", str(recipe(name))])


def run(name: str, output_dir: Path, *overrides: object) -> int:
    command = command_of(name)
    return main([command, "--config", str(recipe(name)), "--output_dir", str(output_dir), *map(str, overrides)])


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def launch_of(name: str) -> str | None:
    """The configuration of `accelerate launch` in the command of a recipe's header."""
    text = recipe(name).read_text(encoding="utf-8")
    match = re.search(rf"recipes/{name}\.yaml --accelerate_config recipes/accelerate/(\w+)\.yaml$", text, re.MULTILINE)
    return match and match[1]


class TestText:
    def test_there_are_recipes_for_every_benchmark_and_size(self):
        assert {name.split("/")[0] for name in ALL_RECIPES} == {"people", "tofu", "muse", "wmdp", "custom"}
        for size in ("1b", "8b", "8b_qlora", "70b", "70b_qlora"):
            assert f"custom/train_{size}" in TRAINING

    @pytest.mark.parametrize("name", ALL_RECIPES)
    def test_it_parses_to_what_it_says(self, name):
        parsed = {option: value for part in parse(name) for option, value in vars(part).items()}
        for option, value in yaml.safe_load(recipe(name).read_text(encoding="utf-8")).items():
            assert parsed[option] == value, option

    @pytest.mark.parametrize("name", ALL_RECIPES)
    def test_it_says_how_to_run_it(self, name):
        text = recipe(name).read_text(encoding="utf-8")
        assert re.search(rf"^#   hf-unlearn {command_of(name)} --config recipes/{name}\.yaml\b", text, re.MULTILINE)
        for path in re.findall(r"recipes/[\w/]+\.yaml", text):
            assert (RECIPES.parent / path).is_file(), path

    def test_the_overview_names_every_recipe(self):
        text = (RECIPES / "README.md").read_text(encoding="utf-8")
        for path in RECIPES.rglob("*.yaml"):
            assert f"({path.relative_to(RECIPES).as_posix()})" in text

    @pytest.mark.parametrize("path", sorted(ACCELERATE.glob("*.yaml")), ids=lambda path: path.stem)
    def test_launch_configurations(self, path):
        config = load_config_from_file(str(path))
        values = vars(config) | (getattr(config, "deepspeed_config", None) or {})
        values |= getattr(config, "fsdp_config", None) or {}
        expected = {"use_cpu": False, "num_machines": 1} | LAUNCHES[path.stem]
        assert {option: values[option] for option in expected} == expected
        if "num_processes" not in LAUNCHES[path.stem]:
            assert config.num_processes > 1
        if path.stem != "zero3_offload":
            assert {values.get(f"offload_{part}_device", "none") for part in ("param", "optimizer")} == {"none"}


class TestPeople:
    def test_training_uses_the_settings_of_the_quickstart(self):
        _, config, _ = parse("people/train")
        quickstart = QuickstartArguments()
        for name in (
            "learning_rate",
            "memorization_temperature",
            "retain_kl_weight",
            "retain_per_forget",
            "seed",
        ):
            assert getattr(config, name) == getattr(quickstart, name), name
        assert config.retain_kl_scale is None and quickstart.retain_kl_scale == MIRROR  # none is given
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
    """The benchmarks as folders with the configurations and splits of their Hub sets."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folders = {"tofu": tmp_path / "TOFU", "muse": tmp_path / "MUSE-News", "wmdp": tmp_path / "wmdp-corpora"}
    for seed, name in enumerate(("forget10", "retain90")):
        rows = [{"question": row["prompt"], "answer": row["completion"]} for row in tiny_rows(4, seed)]
        write_json(folders["tofu"] / f"{name}.json", rows)
    names = ("forget10_perturbed", "holdout10", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed")
    for seed, name in enumerate(names):
        write_json(folders["tofu"] / f"{name}.json", questions(seed))
    for seed, name in enumerate(("raw/forget", "raw/retain1", "privleak/forget", "privleak/holdout")):
        write_json(folders["muse"] / f"{name}.json", [{"text": row["prompt"]} for row in tiny_rows(4, seed)])
    write_json(folders["muse"] / "verbmem" / "forget.json", [{"prompt": "w4 w5", "gt": ANSWERS[0]}])
    for seed, name in enumerate(("cyber-forget-corpus", "cyber-retain-corpus")):
        write_json(folders["wmdp"] / f"{name}.json", [{"text": row["prompt"]} for row in tiny_rows(4, seed)])
    for name in ("forget_qa", "forget_qa_icl", "retain_qa", "retain_qa_icl"):
        write_json(folders["muse"] / "knowmem" / f"{name}.json", [{"question": "w4", "answer": ANSWERS[0]}])
    tofu = [{"config_name": name, "data_files": f"{name}.json"} for name in ("forget10", "retain90")]
    splits = [{"split": split, "path": f"raw/{split}.json"} for split in ("forget", "retain1")]
    wmdp = [
        {"config_name": f"cyber-{name}", "data_files": f"cyber-{name}.json"}
        for name in ("forget-corpus", "retain-corpus")
    ]
    for name, configs in {"tofu": tofu, "muse": [{"config_name": "raw", "data_files": splits}], "wmdp": wmdp}.items():
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

    @pytest.mark.parametrize("name", [name for name in TRAINING if not name.startswith("people")])
    def test_training_uses_the_schedule_of_the_paper(self, name):
        _, config, _ = parse(name)
        launch = launch_of(name)
        processes = load_config_from_file(str(ACCELERATE / f"{launch}.yaml")).num_processes if launch else 1
        assert config.per_device_train_batch_size * config.gradient_accumulation_steps * processes == 32
        assert (config.num_train_epochs, config.warmup_steps, config.weight_decay) == (10, 0.1, 0.01)
        scale = MIRROR if config.retain_kl_scale is None else config.retain_kl_scale
        levers = (config.memorization_temperature, scale, config.retain_kl_weight)
        quickstart = QuickstartArguments()
        names = ("memorization_temperature", "retain_kl_scale", "retain_kl_weight")
        of_quickstart = tuple(getattr(quickstart, name) for name in names)
        assert levers == (of_quickstart if name.startswith("custom") else (1, 1, 1))

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


class TestWmdp:
    def test_each_goes_on_where_the_one_before_ended(self):
        (_, config, _), (sweep,), (evaluation,) = (parse(f"wmdp/{command}") for command in ("train", "sweep", "eval"))
        assert sweep.adapter == config.output_dir
        assert sweep.protocol == evaluation.protocol == "wmdp"
        merge = f"hf-unlearn extrapolate --adapter {config.output_dir} --alpha "
        lines = [line for line in recipe("wmdp/eval").read_text().splitlines() if merge in line]
        assert len(lines) == 1
        assert lines[0].endswith(f" --output_dir {evaluation.model}")


class TestSizes:
    """The recipes for other sizes and hardware, on a tiny model."""

    NAMES = [
        pytest.param(name, marks=[needs_bitsandbytes] if name in QUANTISED else [])
        for name in TRAINING
        if name not in ("people/train", "tofu/train", "muse/train")  # run above
    ]

    @pytest.mark.parametrize("name", NAMES)
    def test_it_trains(self, name, models, hub, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        write_own_rows(tmp_path / "data")
        data = hub.get(name.split("/")[0])
        sets = () if data is None else ("--forget_dataset", data, "--retain_dataset", data)
        options = ("--model_name_or_path", models[0], *sets, "--max_steps", 2, "--disable_tqdm", "true", "--use_cpu")
        assert run(name, tmp_path / "adapter", *options) == 0
        record = json.loads((tmp_path / "adapter" / "unlearning.json").read_text())
        assert record["data"]["forget"]["rows"] == 4
        assert bool(record["base"].get("quantization_config")) == (name in QUANTISED)

    @pytest.mark.parametrize("name", QUANTISED)
    def test_four_bits_are_those_of_qlora(self, name):
        _, _, model = parse(name)
        quantization = get_quantization_config(model)
        assert quantization.load_in_4bit
        assert quantization.bnb_4bit_quant_type == "nf4"
        assert quantization.bnb_4bit_use_double_quant
        assert quantization.bnb_4bit_compute_dtype == torch.bfloat16

    @pytest.mark.parametrize("name", [name for name in TRAINING if name.endswith("_70b")])
    def test_seventy_billion_are_shared_out(self, name):
        assert launch_of(name) == "zero3"
        assert (
            f"--config_file recipes/accelerate/fsdp2.yaml -m hf_unlearn.cli train \\\n#       --config recipes/{name}.yaml"
            in (recipe(name).read_text(encoding="utf-8"))
        )

    def test_own_rows_go_all_the_way(self, models, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        write_own_rows(tmp_path / "data")
        adapter, swept = Path("runs/custom-adapter"), Path("runs/custom-sweep")
        options = ("--model_name_or_path", models[0], "--max_steps", 2, "--disable_tqdm", "true", "--use_cpu")
        assert run("custom/train_1b", adapter, *options) == 0
        assert run("custom/sweep", swept, "--max_new_tokens", 4, "--alphas", 0.5, "--refinements", 1) in (0, 1)
        assert json.loads((swept / "choice.json").read_text())["rule"].startswith(parse("custom/sweep")[0].rule)
        assert run("custom/extrapolate", Path("runs/custom-forget-model")) == 0
        AutoModelForCausalLM.from_pretrained("runs/custom-forget-model")


def write_own_rows(folder: Path, count: int = 4) -> None:
    """The three sets of the custom recipes."""
    folder.mkdir()
    for seed, name in enumerate(("forget", "retain", "holdout")):
        lines = [json.dumps(row) for row in tiny_rows(count, seed)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")


class TestLaunch:
    def test_accelerate_launch_runs_a_recipe(self, tiny_model_dir, tmp_path):
        """`accelerate launch --config_file … -m hf_unlearn.cli train --config …`, in a process of its own."""
        options = ["--model_name_or_path", str(tiny_model_dir), "--output_dir", str(tmp_path / "adapter")]
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ACCELERATE / "cpu.yaml")]
        command = ["-m", "hf_unlearn.cli", "train", "--config", str(recipe("people/train")), *options]
        environment = {**os.environ, "PYTHONPATH": str(RECIPES.parent), "OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            [*launcher, *command, "--max_steps", "2", "--use_cpu"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        state = json.loads((tmp_path / "adapter" / "trainer_state.json").read_text())
        assert state["global_step"] == 2
        assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()

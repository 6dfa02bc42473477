"""`hf-unlearn combine` as a user runs it, and what the other commands do with its result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from command_lines import set_arguments, train_arguments
from safetensors.torch import load_file
from tiny import tiny_llama

from hf_unlearn.cli import main
from hf_unlearn.extrapolation import LoraAdapter, momentum_weights


MODULE = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="session")
def run(files, tmp_path_factory) -> Path:
    """Another run on the same sets, with its checkpoints."""
    folder = tmp_path_factory.mktemp("combine") / "run"
    options = ["--seed", "7", "--num_train_epochs", "3", "--save_strategy", "epoch"]
    assert main(train_arguments(files, folder, *options)) == 0
    return folder


@pytest.fixture(scope="session")
def retain_adapter(files, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("combine") / "retain"
    swapped = files | {"forget": files["retain"], "retain": files["forget"]}
    assert main(train_arguments(swapped, folder)) == 0
    return folder


def delta(folder: str | Path) -> torch.Tensor:
    """The update of one module in fp64, from the files."""
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{MODULE}.lora_{factor}.weight"].double() for factor in "AB")
    assert config["use_rslora"] is False
    rank = next((r for name, r in config["rank_pattern"].items() if name.endswith("down_proj")), config["r"])
    return b @ a * (config["lora_alpha"] / config["r"] if rank == config["r"] else 1)


def combine(operator: str, output_dir: Path, *options: str | Path) -> int:
    return main(["combine", "--operator", operator, "--output_dir", str(output_dir), *map(str, options)])


def test_average_then_sweep_and_extrapolate(files, adapter, run, tmp_path, capsys):
    assert combine("average", tmp_path / "mean", "--adapters", adapter, run) == 0
    printed = capsys.readouterr().out
    assert "Keep it private" in printed
    lines = [line.split() for line in printed.splitlines()]
    modules = str(len(LoraAdapter.load(adapter).modules))
    first, second, result = (next(line for line in lines if line[:1] == [key]) for key in ("1", "2", "result"))
    assert first[2:4] == [modules, "16"] and second[2:4] == [modules, "16"] and result[1:3] == [modules, "32"]
    assert first[-2:] == ["1.000", second[-2]] and second[-1] == "1.000"
    wanted = (delta(adapter) + delta(run)) / 2
    torch.testing.assert_close(delta(tmp_path / "mean"), wanted, atol=1e-6, rtol=0)

    arguments = ["--adapter", str(tmp_path / "mean"), "--output_dir"]
    options = ["--alphas", "0.5", "1", "--no_generation", "--no_cache", *set_arguments(files, "forget", "retain")]
    assert main(["sweep", *arguments, str(tmp_path / "sweep"), *options]) in (0, 1)
    evaluations = json.loads((tmp_path / "sweep" / "evaluation.json").read_text())
    assert {0, 0.5} <= {evaluation["alpha"] for evaluation in evaluations["evaluations"]}
    assert main(["extrapolate", *arguments, str(tmp_path / "model"), "--alpha", "2"]) == 0
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (files["model"], tmp_path / "model"))
    moved = before[f"{MODULE}.weight"].double() - 2 * wanted
    torch.testing.assert_close(after[f"{MODULE}.weight"].double(), moved, atol=1e-6, rtol=0)
    record = json.loads((tmp_path / "model" / "unlearning.json").read_text())
    assert [source["id"] for source in record["operator"]["sources"]] == [adapter, str(run)]


def test_momentum_of_a_run(run, tmp_path, capsys):
    checkpoints = sorted(run.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    assert len(checkpoints) == 3
    assert combine("momentum", tmp_path / "ema", "--adapters", run, "--eta", "0.6") == 0
    pairs = zip(momentum_weights(3, 0.6), checkpoints, strict=True)
    wanted = sum(weight * delta(folder) for weight, folder in pairs)
    torch.testing.assert_close(delta(tmp_path / "ema"), wanted, atol=1e-6, rtol=0)
    assert combine("momentum", tmp_path / "named", "--eta", "0.6", "--adapters", *checkpoints) == 0
    torch.testing.assert_close(delta(tmp_path / "named"), wanted, atol=1e-6, rtol=0)
    record = json.loads((tmp_path / "ema" / "unlearning.json").read_text())
    assert record["operator"]["name"] == "momentum" and record["operator"]["eta"] == 0.6

    capsys.readouterr()
    assert combine("momentum", tmp_path / "short", "--adapters", run, "--rank", "2") == 0
    assert "Truncated to rank 2: relative error" in capsys.readouterr().out
    error = json.loads((tmp_path / "short" / "unlearning.json").read_text())["operator"]["truncation_error"]
    exact = sum(w * delta(folder) for w, folder in zip(momentum_weights(3), checkpoints, strict=True))
    assert torch.linalg.matrix_rank(delta(tmp_path / "short"), rtol=1e-5) == 2
    assert 0 < error["relative"] < error["worst"]["relative"] < 1
    assert (delta(tmp_path / "short") - exact).norm() / exact.norm() <= error["worst"]["relative"] + 1e-6


@pytest.mark.parametrize("operator", ["projection", "retain_vector", "targeted"])
def test_two_adapters(adapter, retain_adapter, tmp_path, operator):
    other = "--target_adapter" if operator == "targeted" else "--retain_adapter"
    weight = [] if operator == "projection" else ["--weight", "0.5"]
    assert combine(operator, tmp_path / "out", "--adapters", adapter, other, retain_adapter, *weight) == 0
    memory, retain = delta(adapter), delta(retain_adapter)
    if operator == "projection":
        wanted = memory - (memory * retain).sum(1, keepdim=True) / retain.square().sum(1, keepdim=True) * retain
    else:
        wanted = memory - 0.5 * retain
    torch.testing.assert_close(delta(tmp_path / "out"), wanted, atol=1e-5, rtol=0)
    record = json.loads((tmp_path / "out" / "unlearning.json").read_text())["operator"]
    assert record["name"] == operator and len(record["sources"]) == 2
    assert record.get("weight") == (None if operator == "projection" else 0.5)


def test_fisher(files, adapter, tmp_path, capsys):
    sets = set_arguments(files, "forget", "retain")
    assert combine("fisher", tmp_path / "out", "--adapters", adapter, *sets) == 0
    assert "Factors of α: from" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "unlearning.json").read_text())["operator"]
    assert record["name"] == "fisher"
    source = LoraAdapter.load(adapter)
    norms = {module: source.delta(module).double().norm().item() for module in source.modules}
    shares = {
        module: record["fisher"]["forget"][module]
        / (record["fisher"]["forget"][module] + record["fisher"]["retain"][module])
        for module in norms
    }
    mean = sum(norms[module] * shares[module] for module in norms) / sum(norms.values())
    assert record["factors"] == pytest.approx({module: share / mean for module, share in shares.items()}, rel=1e-6)
    wanted = record["factors"][MODULE] * delta(adapter)
    torch.testing.assert_close(delta(tmp_path / "out"), wanted, atol=1e-6, rtol=0)


class TestConsensus:
    def test_forget_model(self, files, adapter, run, tmp_path, capsys):
        options = ["--adapters", adapter, run, "--alpha", "2"]
        assert combine("consensus", tmp_path / "planned", *options, "--dry_run") == 0
        assert not (tmp_path / "planned").exists()
        assert combine("consensus", tmp_path / "model", *options) == 0
        printed = capsys.readouterr().out
        assert "forget model is written, in pieces" in printed and "The adapters agree on" in printed
        one, two = delta(adapter), delta(run)
        wanted = torch.where(one * two > 0, (one + two) / 2, 0)
        folders = (files["model"], tmp_path / "model")
        before, after = (load_file(Path(folder) / "model.safetensors")[f"{MODULE}.weight"] for folder in folders)
        torch.testing.assert_close(after.double(), before.double() - 2 * wanted, atol=1e-6, rtol=0)

    def test_adapter(self, adapter, run, tmp_path, capsys):
        assert combine("consensus", tmp_path / "out", "--adapters", adapter, run, "--rank", "8") == 0
        assert "Truncated to rank 8" in capsys.readouterr().out
        one, two = delta(adapter), delta(run)
        u, values, vt = torch.linalg.svd(torch.where(one * two > 0, (one + two) / 2, 0), full_matrices=False)
        torch.testing.assert_close(delta(tmp_path / "out"), u[:, :8] * values[:8] @ vt[:8], atol=1e-6, rtol=0)


@pytest.mark.parametrize("operator", ["average", "fisher", "momentum"])
def test_dry_run_writes_nothing(files, adapter, run, tmp_path, capsys, operator):
    options = {
        "average": ["--adapters", adapter, run, "--rank", "4"],
        "fisher": ["--adapters", adapter, *set_arguments(files, "forget", "retain")],
        "momentum": ["--adapters", run],
    }
    assert combine(operator, tmp_path / "out", *options[operator], "--dry_run") == 0
    printed = capsys.readouterr().out
    assert "Would write" in printed and "‖ΔW‖" in printed
    assert ("result" in printed) == (operator != "fisher")  # not known without the model
    assert ("truncated to rank 4" in printed) == (operator == "average")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--adapters", "A", "A"], "--operator is required"),
        (["--operator", "average"], "--adapters is required"),
        (["--operator", "average", "--adapters", "A"], "takes 2 or more --adapters, got 1"),
        (["--operator", "projection", "--adapters", "A", "A", "--retain_adapter", "A"], "takes one --adapters, got 2"),
        (["--operator", "projection", "--adapters", "A"], "needs --retain_adapter"),
        (["--operator", "targeted", "--adapters", "A"], "needs --target_adapter"),
        (["--operator", "fisher", "--adapters", "A", "--forget_dataset", "F"], "needs --retain_dataset"),
        (["--operator", "average", "--adapters", "A", "A", "--weight", "2"], "--weight has no effect with --operator"),
        (["--operator", "average", "--adapters", "A", "A", "--eta", "0.5"], "--eta has no effect"),
        (["--operator", "average", "--adapters", "A", "A", "--base", "M"], "--base has no effect"),
        (["--operator", "average", "--adapters", "A", "A", "--forget_dataset", "F"], "--forget_dataset has no effect"),
        (["--operator", "average", "--adapters", "A", "B", "--alpha", "1"], "--alpha has no effect"),
        (["--operator", "average", "--adapters", "A", "B", "--rank", "0"], "--rank 0"),
        (["--operator", "momentum", "--adapters", "A"], "1 `checkpoint-*` folders"),
        (["--operator", "momentum", "--adapters", "A", "B", "--eta", "1"], "eta=1"),
        (["--operator", "retain_vector", "--adapters", "A", "--retain_adapter", "A"], "Nothing is left"),
        (["--operator", "consensus", "--adapters", "A", "B"], "needs --alpha"),
        (["--operator", "consensus", "--adapters", "A", "B", "--alpha", "-1"], "alpha=-1"),
        (["--operator", "consensus", "--adapters", "A", "B", "--alpha", "1", "--dtype", "int8"], "dtype='int8'"),
        (
            ["--operator", "consensus", "--adapters", "A", "B", "--rank", "2", "--alpha", "1", "--dtype", "float16"],
            "--alpha, --dtype have no effect with --rank",
        ),
        (
            [
                *("--operator", "fisher", "--adapters", "A", "--forget_dataset", "F", "--retain_dataset", "F"),
                *("--dtype", "int8"),
            ],
            "dtype='int8'",
        ),
        (["--operator", "average", "--adapters", "A", "M"], "adapter_config.json"),
    ],
)
def test_errors(files, adapter, run, tmp_path, capsys, options, named):
    places = {"A": adapter, "B": str(run), "M": files["model"], "F": files["forget"]}
    arguments = ["combine", "--output_dir", str(tmp_path / "out"), *(places.get(option, option) for option in options)]
    assert main(arguments) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_kept_unless_asked(adapter, run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert combine("average", tmp_path / "out", "--adapters", adapter, run) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert combine("average", tmp_path / "out", "--adapters", adapter, run, "--overwrite") == 0
    assert not (tmp_path / "out" / "mine.txt").exists()
    shutil.copytree(adapter, tmp_path / "source")
    options = ["--adapters", run, tmp_path / "source", "--overwrite"]
    assert combine("average", tmp_path / "source", *options) == 2
    assert combine("consensus", tmp_path / "source", *options, "--alpha", "1") == 2
    assert (tmp_path / "source" / "adapter_model.safetensors").is_file()


def test_adapters_of_another_base(files, adapter, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(files["model"], other)
    tiny_llama(seed=9).save_pretrained(other)
    assert main(train_arguments(files | {"model": str(other)}, tmp_path / "run")) == 0
    capsys.readouterr()
    assert combine("average", tmp_path / "out", "--adapters", adapter, tmp_path / "run") == 2
    assert "different base models" in capsys.readouterr().err

"""Files that would run code when read: none is run unless it was asked for."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
from command_lines import set_arguments, train_arguments
from tiny import tiny_llama, tiny_tokenizer

from hf_unlearn.cli import main


class Marking:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


MODELING = """
import os
from transformers import LlamaConfig, LlamaForCausalLM

os.makedirs({marker!r}, exist_ok=True)


class MyConfig(LlamaConfig):
    model_type = "mine"


class MyModel(LlamaForCausalLM):
    config_class = MyConfig
"""


@pytest.fixture
def marker(tmp_path) -> Path:
    return tmp_path / "was-run"


@pytest.fixture
def with_code(tmp_path, marker, monkeypatch) -> str:
    """A model folder whose classes are in a file beside the weights."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "model"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "architectures": ["MyModel"]}
    config["auto_map"] = {"AutoConfig": "modeling_mine.MyConfig", "AutoModelForCausalLM": "modeling_mine.MyModel"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_mine.py").write_text(MODELING.format(marker=str(marker)))
    return str(folder)


@pytest.mark.parametrize("command", ["train", "eval", "extrapolate", "sweep"])
def test_code_beside_a_model_is_not_run_unasked(command, with_code, marker, files, adapter, tmp_path, capsys):
    output = ["--output_dir", str(tmp_path / "out")]
    sets = set_arguments(files, "forget", "retain")
    arguments = {
        "train": train_arguments(files | {"model": with_code}, tmp_path / "out", "--use_cpu"),
        "eval": ["eval", "--model", with_code, *sets, *output],
        "extrapolate": ["extrapolate", "--adapter", adapter, "--base", with_code, "--alpha", "2", *output],
        "sweep": ["sweep", "--adapter", adapter, "--base", with_code, *sets, *output],
    }
    code = main(arguments[command])
    said = capsys.readouterr().err
    assert not marker.exists()
    if command == "extrapolate":  # it reads weights, and needs no class
        assert code == 0, said
        return
    assert code == 2, said
    assert with_code in said and "trust_remote_code" in said
    assert not (tmp_path / "out").exists()


def test_code_beside_a_model_is_run_when_asked_and_named(with_code, marker, files, tmp_path, caplog, capsys):
    options = ["--trust_remote_code", "true", "--max_steps", "1", "--use_cpu"]
    code = main(train_arguments(files | {"model": with_code}, tmp_path / "out", *options))
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert marker.exists()
    assert f"runs code that comes with {with_code}" in " ".join((captured.out + captured.err).split())


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_of_a_model_are_not_read(name, files, marker, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(files["model"], model)
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(pickle.dumps({"weight": Marking(marker)}))
    sets = set_arguments(files, "forget", "retain")
    for arguments in (
        train_arguments(files | {"model": str(model)}, tmp_path / "out", "--use_cpu"),
        ["eval", "--model", str(model), *sets, "--output_dir", str(tmp_path / "out")],
    ):
        assert main(arguments) == 2
        assert str(model) in capsys.readouterr().err
    assert not marker.exists()


def test_a_pickled_adapter_is_not_read(adapter, marker, tmp_path, capsys):
    shutil.copytree(adapter, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter" / "adapter_model.bin").write_bytes(pickle.dumps({"weight": Marking(marker)}))
    (tmp_path / "adapter" / "training_args.bin").write_bytes(pickle.dumps(Marking(marker)))
    arguments = ["extrapolate", "--adapter", str(tmp_path / "adapter"), "--alpha", "2"]
    assert main([*arguments, "--output_dir", str(tmp_path / "out")]) == 2
    assert "`.bin` files can run code and are not read" in capsys.readouterr().err
    assert not marker.exists()


def test_a_set_with_a_loading_script_is_not_run(files, marker, tmp_path, capsys):
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "rows.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    assert main(train_arguments(files | {"forget": str(rows)}, tmp_path / "out", "--use_cpu")) == 2
    assert "forget set" in capsys.readouterr().err
    assert not marker.exists()

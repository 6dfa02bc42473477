"""`hf-unlearn export` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from serving_adapters import peft_logits, save_forget_adapter
from serving_gguf import LLAMA_CPP, TOKENS, greedy, largest_error, llama_cpp, needs_converter, save_model

from hf_unlearn.cli import main
from hf_unlearn.serving.gguf import ADAPTER_CONVERTER, MODEL_CONVERTER


@pytest.fixture(scope="module")
def forget_adapter(adapter, tmp_path_factory) -> str:
    """What `extrapolate` makes of a trained adapter."""
    folder = tmp_path_factory.mktemp("export") / "forget"
    assert (
        main(["extrapolate", "--adapter", adapter, "--alpha", "2", "--format", "adapter", "--output_dir", str(folder)])
        == 0
    )
    return str(folder)


def export(*options: str | Path) -> int:
    return main(["export", *map(str, options)])


def test_a_trained_adapter_for_vllm(files, forget_adapter, tmp_path, capsys):
    out = tmp_path / "out"
    assert export("--format", "vllm", "--adapter", forget_adapter, "--output_dir", out) == 0
    printed = capsys.readouterr().out
    command = f"vllm serve {files['model']} --enable-lora --max-lora-rank 16 --lora-modules forget={out}"
    assert command in printed
    assert "reveals ΔW" in printed and "requests that name the base" in printed
    assert json.loads((out / "unlearning.json").read_text())["alpha"] == 2


def test_dry_run_names_the_problems(tiny_model_dir, tmp_path, capsys):
    source = save_forget_adapter(tiny_model_dir, tmp_path / "a", r=20, alpha_pattern={"q_proj": 3})
    assert export("--format", "vllm", "--adapter", source, "--output_dir", tmp_path / "out", "--dry_run") == 0
    printed = capsys.readouterr().out
    assert "alpha_pattern" in printed and "--max-lora-rank 32" in printed and "has to be rewritten" in printed
    assert not (tmp_path / "out").exists()
    plain = save_forget_adapter(tiny_model_dir, tmp_path / "b")
    assert export("--format", "vllm", "--adapter", plain, "--output_dir", tmp_path / "out", "--dry_run") == 0
    assert "served as it is" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapter", "a"], "--format is required"),
        (["--format", "vllm", "--output_dir", "o"], "needs --adapter"),
        (["--format", "gguf", "--output_dir", "o"], "needs --model"),
        (["--format", "vllm", "--adapter", "a"], "needs --output_dir"),
        (["--format", "vllm", "--adapter", "a", "--dtype", "float16", "--output_dir", "o"], "--dtype has no effect"),
        (["--format", "gguf", "--model", "m", "--adapter", "a", "--output_dir", "o"], "--adapter has no effect"),
        (["--format", "gguf", "--model", "{model}", "--output_dir", "o"], "git clone"),
        (["--format", "gguf-lora", "--adapter", "{forget}", "--output_dir", "o"], "--converter is required"),
        (["--format", "gguf-lora", "--adapter", "{run}", "--output_dir", "o"], "no forget adapter"),
        (["--format", "vllm", "--adapter", "{run}", "--output_dir", "o"], "no forget adapter"),
        (["--format", "vllm", "--adapter", "{forget}", "--output_dir", "{forget}"], "not empty"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_input_that_cannot_be_used(files, adapter, forget_adapter, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    names = {"model": files["model"], "run": adapter, "forget": forget_adapter}
    assert export(*(option.format(**names) for option in options)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_dry_run_of_gguf(files, forget_adapter, tmp_path, capsys):
    for name in (MODEL_CONVERTER, ADAPTER_CONVERTER):
        (tmp_path / name).touch()
    common = ["--converter", tmp_path, "--output_dir", tmp_path / "out", "--dry_run"]
    assert export("--format", "gguf", "--model", files["model"], *common) == 0
    assert "model.gguf in float32" in capsys.readouterr().out
    assert export("--format", "gguf-lora", "--adapter", forget_adapter, "--dtype", "float16", *common) == 0
    assert "adapter.gguf in float16" in capsys.readouterr().out
    assert export("--format", "gguf-lora", "--adapter", forget_adapter, "--base", tmp_path, *common) == 2
    assert "config.json cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@needs_converter
def test_from_the_command_line_to_llama_cpp(tmp_path, capsys):
    model = save_model(tmp_path / "m")
    adapter = save_forget_adapter(model, tmp_path / "a")
    converter = ["--converter", LLAMA_CPP]
    assert export("--format", "gguf", "--model", model, *converter, "--output_dir", tmp_path / "base") == 0
    options = ["--adapter", adapter, "--base", model, *converter, "--output_dir", tmp_path / "lora"]
    assert export("--format", "gguf-lora", *options) == 0
    assert f"--lora {tmp_path}/lora/adapter.gguf" in capsys.readouterr().out
    prompt = [1, 9, 44, 23]
    server = llama_cpp(tmp_path / "base" / "model.gguf", tmp_path / "lora" / "adapter.gguf")
    tokens, logprobs = greedy(server, prompt, 8, len(TOKENS))
    assert largest_error(peft_logits(model, adapter, torch.tensor([prompt + tokens])), prompt, logprobs) < 1e-4

"""Rounds in two real processes (gloo, CPU) against one."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file


SCRIPT = Path(__file__).with_name("train_rounds.py")


def test_two_processes_equal_one(interpreters, tmp_path, tiny_model_dir):
    code, said = interpreters.run(SCRIPT, tmp_path / "1", tiny_model_dir, 4)
    assert code == 0, said
    interpreters.launch(SCRIPT, tmp_path / "2", tiny_model_dir, 2)
    one, two = (load_file(tmp_path / str(n) / "adapter_model.safetensors") for n in (1, 2))
    assert one.keys() == two.keys()
    assert max(value.abs().max().item() for name, value in one.items() if "lora_B" in name) > 1e-3
    for name, value in one.items():
        assert value.shape == two[name].shape
        assert (two[name] - value).abs().max() <= 1e-6, name

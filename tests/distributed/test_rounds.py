"""Rounds in two real processes (gloo, CPU) against one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file


ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("train_rounds.py")


def test_two_processes_equal_one(tmp_path, tiny_model_dir):
    variables = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")}
    variables |= {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    for processes, batch_size in ((1, 4), (2, 2)):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if processes == 2 else []
        command = [sys.executable, *launch, SCRIPT, tmp_path / str(processes), tiny_model_dir, batch_size]
        result = subprocess.run(
            [str(part) for part in command], env=variables, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, result.stderr[-3000:]
    one, two = (load_file(tmp_path / str(n) / "adapter_model.safetensors") for n in (1, 2))
    assert one.keys() == two.keys()
    assert max(value.abs().max().item() for name, value in one.items() if "lora_B" in name) > 1e-3
    for name, value in one.items():
        assert value.shape == two[name].shape
        assert (two[name] - value).abs().max() <= 1e-6, name

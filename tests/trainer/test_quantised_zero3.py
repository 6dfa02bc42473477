"""A 4-bit base under ZeRO-3 in two real processes (gloo, CPU), against one process."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from interpreters import Interpreters
from safetensors.torch import load_file


pytest.importorskip("bitsandbytes")
pytest.importorskip("deepspeed")

SCRIPT = Path(__file__).with_name("train_quantised.py")


def launch_zero3(interpreters: Interpreters, folder: Path, *arguments: object) -> None:
    """Run the script in two processes, so that even tiny weights are sharded."""
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    options = {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 0}
    options = {"zero_optimization": options, "zero_force_ds_cpu_optimizer": False, **dict.fromkeys(names, "auto")}
    (folder / "deepspeed.json").write_text(json.dumps(options))
    config = {"distributed_type": "DEEPSPEED", "num_processes": 2, "num_machines": 1, "use_cpu": False}
    config["deepspeed_config"] = {"deepspeed_config_file": str(folder / "deepspeed.json")}
    (folder / "launch.json").write_text(json.dumps(config))
    interpreters.launch(SCRIPT, *arguments, config=folder / "launch.json")


def test_packed_weights_are_sharded_and_the_result_is_that_of_one_process(interpreters, tiny_model_dir, tmp_path):
    launch_zero3(interpreters, tmp_path, tiny_model_dir, tmp_path / "two", 2)
    runpy.run_path(str(SCRIPT))["main"](str(tiny_model_dir), str(tmp_path / "one"), "4")
    two, one = (json.loads((tmp_path / run / "facts.json").read_text()) for run in ("two", "one"))
    assert (two["processes"], two["stage"], two["shapes"]) == (2, 3, [[0]])
    assert (one["processes"], len(one["logs"])) == (1, 4)
    for log, expected in zip(two["logs"], one["logs"], strict=True):
        for name in ("memorization_loss", "retain_kl", "num_tokens"):
            assert log[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
    expected, adapter = (load_file(tmp_path / run / "adapter_model.safetensors") for run in ("one", "two"))
    assert adapter.keys() == expected.keys()
    assert all((adapter[name] - expected[name]).abs().max() < 1e-4 for name in expected)

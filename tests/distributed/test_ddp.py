"""Two real processes (gloo, CPU) against one, on the same global batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file


SCRIPT = Path(__file__).with_name("train_tiny.py")


def launch(output_dir: Path, batch_size: int, processes: int) -> list[dict]:
    """Train in `processes` processes and return what each of them saw."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[1]), str(SCRIPT.parents[2])]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
    }
    launcher = [sys.executable]
    if processes > 1:
        options = [
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--main_process_port",
            "0",
        ]
        launcher += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes), *options]
    command = [*launcher, str(SCRIPT), str(output_dir), str(batch_size)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads((output_dir / f"facts-{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    return folder, launch(folder / "one", 4, 1), launch(folder / "two", 2, 2)


def test_it_really_was_two_processes(runs):
    _, one, two = runs
    assert [facts["processes"] for facts in one] == [1]
    assert [facts["processes"] for facts in two] == [2, 2]
    assert all("MULTI_CPU" in facts["distributed_type"] or "MULTI_GPU" in facts["distributed_type"] for facts in two)


def test_each_process_sees_other_retain_rows_and_together_those_of_one(runs):
    _, one, two = runs

    def rows(batches):
        return [tuple(token for token in row if token) for batch in batches for row in batch]

    assert rows(two[0]["retain_rows"]) != rows(two[1]["retain_rows"])
    together = rows(two[0]["retain_rows"]) + rows(two[1]["retain_rows"])
    assert sorted(together) == sorted(rows(one[0]["retain_rows"]))


def test_logs_and_adapter_are_those_of_one_process(runs):
    folder, one, two = runs
    assert len(one[0]["logs"]) == 6
    for facts in two:
        for expected, log in zip(one[0]["logs"], facts["logs"], strict=True):
            for key in ("loss", "memorization_loss", "retain_kl", "forget_token_accuracy", "num_tokens"):
                assert log[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-7), key
    for name in ("adapter_model.safetensors", "forget-adapter/adapter_model.safetensors"):
        expected, adapter = (load_file(folder / run / name) for run in ("one", "two"))
        for tensor, value in expected.items():
            assert (adapter[tensor] - value).abs().max() < 1e-5, tensor


def test_a_protocol_during_training_gives_the_figures_of_one_process(runs):
    _, one, two = runs
    assert [log["step"] for log in one[0]["evaluations"]] == [3, 6]
    for facts in two:
        for expected, log in zip(one[0]["evaluations"], facts["evaluations"], strict=True):
            assert log.keys() == expected.keys()
            for key, value in expected.items():
                if key.startswith("eval_"):
                    assert log[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key

"""Every layout of processes that recipes/accelerate launches, in two real processes (gloo, CPU), against one process."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_unlearn.extrapolation import extrapolate


ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("train_tiny.py")
DISTRIBUTED_TYPE = {
    "ddp": "MULTI_CPU",
    "zero1": "DEEPSPEED",
    "zero2": "DEEPSPEED",
    "zero3": "DEEPSPEED",
    "zero3_offload": "DEEPSPEED",
    "fsdp2": "FSDP",
}
SHARDED = {"zero3", "zero3_offload", "fsdp2"}
LAUNCHED = {"ddp", "zero3", "fsdp2"}  # by accelerate itself; the others by its variables alone, which is quicker
ENDS_BADLY = {"zero3", "fsdp2"}  # the last thing the processes do is to fail in a merge
ADAPTER = "adapter_model.safetensors"


def environment(layout: str) -> dict[str, str]:
    variables = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")}
    variables |= {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    if layout == "ddp":
        return variables | {"ACCELERATE_USE_CPU": "true"}
    return variables | ({"ACCELERATE_TORCH_DEVICE": "cpu"} if layout == "fsdp2" else {"DS_ACCELERATOR": "cpu"})


def launch_config(layout: str, folder: Path) -> Path:
    """The recipe, for two processes on CPU, and so that even tiny weights are sharded."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "recipes" / "accelerate" / f"{layout}.yaml").read_text())
    config["num_processes"] = 2
    if "deepspeed_config" in config:
        options = config["deepspeed_config"]
        del config["mixed_precision"]  # not beside a file for DeepSpeed, where alone the threshold can be set
        file = folder / "deepspeed.json"
        file.write_text(json.dumps(deepspeed_options(options)))
        config["deepspeed_config"] = {
            "deepspeed_config_file": str(file),
            "zero3_init_flag": options["zero3_init_flag"],
        }
    path = folder / "launch.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def deepspeed_options(options: dict[str, Any]) -> dict[str, Any]:
    """The recipe's options in DeepSpeed's own words."""
    zero: dict[str, Any] = {"stage": options["zero_stage"], "overlap_comm": False}
    for part in ("param", "optimizer"):
        if f"offload_{part}_device" in options:
            zero[f"offload_{part}"] = {"device": options[f"offload_{part}_device"], "pin_memory": False}
    if zero["stage"] == 3:
        zero["stage3_param_persistence_threshold"] = 0
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    # DeepSpeed's own Adam for the CPU would have to be compiled first
    return {"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False, **dict.fromkeys(names, "auto")}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def one(model_dir, tmp_path_factory) -> SimpleNamespace:
    """The run in one process, in batches of the same rows."""
    folder = tmp_path_factory.mktemp("one")
    return SimpleNamespace(folder=folder, facts=runpy.run_path(str(SCRIPT))["run"](folder, str(model_dir), 4))


@pytest.fixture(scope="module", params=DISTRIBUTED_TYPE)
def two(request, interpreters, model_dir, tmp_path_factory) -> SimpleNamespace:
    """The run in two processes."""
    layout = request.param
    if layout.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed")
    folder = tmp_path_factory.mktemp(layout)
    config = launch_config(layout, folder)
    command = [str(SCRIPT), str(folder), str(model_dir), "2", *["ends-badly"] * (layout in ENDS_BADLY)]
    if layout in LAUNCHED:
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
        command = [*launcher, "--main_process_port", "0", *command]
        result = subprocess.run(command, env=environment(layout), capture_output=True, text=True, timeout=300)
    else:
        printed = interpreters.launch(*command, config=config)
        result = SimpleNamespace(returncode=0, stderr="".join(printed))
    files = [folder / f"facts-{rank}.json" for rank in range(2)]
    assert all(file.exists() for file in files), result.stderr[-5000:]
    return SimpleNamespace(
        layout=layout, folder=folder, facts=[json.loads(file.read_text()) for file in files], result=result
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of all weight files of a folder."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def largest_difference(folder: Path, other: Path) -> float:
    """Between the tensors of two folders, which have the same names and shapes."""
    tensors, others = weights(folder), weights(other)
    assert tensors.keys() == others.keys() and tensors
    assert all(tensors[name].shape == others[name].shape for name in tensors)
    return max((tensors[name] - others[name]).abs().max().item() for name in tensors)


def test_the_processes_hold_what_the_layout_says(one, two):
    assert one.facts["processes"] == 1
    whole = one.facts["shapes"]
    for facts in two.facts:
        assert facts["processes"] == 2
        assert facts["distributed_type"] == DISTRIBUTED_TYPE[two.layout]
        assert facts["stage"] == (int(two.layout[4]) if two.layout.startswith("zero") else None)
        assert facts["shapes"] == facts["shapes_after_saving"]
        assert facts["shapes"].keys() == whole.keys()
        for name, (rows, *columns) in whole.items():
            expected = {"zero3": [0], "zero3_offload": [0], "fsdp2": [rows // 2, *columns]}
            assert facts["shapes"][name] == expected.get(two.layout, [rows, *columns]), name


def test_the_reference_is_computed_once_a_row_and_shared_by_the_processes(one, two):
    # 7 retain rows, which 15 forget rows meet in 3 epochs; the cache is on by default
    assert [len(rows) for rows in one.facts["reference_passes"]] == [4, 3]
    passes = [facts["reference_passes"] for facts in two.facts]
    assert [[len(rows) for rows in of_process] for of_process in passes] == [[2, 2], [2, 1]]
    assert sorted(row for of_process in passes for rows in of_process for row in rows) == [0, 1, 2, 3, 4, 5, 6]


def test_each_process_sees_other_retain_rows_and_together_those_of_one(one, two):
    first, second = (facts["retain_rows"] for facts in two.facts)
    assert first != second
    assert len(one.facts["retain_rows"]) == 3 * 15
    assert sorted(first + second) == sorted(one.facts["retain_rows"])


def test_logs_are_those_of_one_process(one, two):
    assert len(one.facts["logs"]) == 6 and len(one.facts["npo_logs"]) == 2
    for facts in two.facts:
        for name in ("logs", "npo_logs"):
            for expected, log in zip(one.facts[name], facts[name], strict=True):
                assert log == pytest.approx(expected, rel=1e-5, abs=1e-6), name


def test_evaluations_during_training_are_those_of_one_process(one, two):
    assert sum("eval_forget_loss" in log and "eval_trade_off" not in log for log in one.facts["evaluations"]) >= 2
    assert [log["step"] for log in one.facts["evaluations"]] == [log["step"] for log in two.facts[0]["evaluations"]]
    for facts in two.facts:
        for expected, log in zip(one.facts["evaluations"], facts["evaluations"], strict=True):
            # TRL averages the entropy over batches, of which processes have other ones
            names = {name for name in log.keys() & expected.keys() if not name.endswith("entropy")}
            assert names >= ({"eval_trade_off", "eval_forget_loss"} & expected.keys())
            assert {name: log[name] for name in names} == pytest.approx(
                {name: expected[name] for name in names}, rel=1e-4, abs=1e-5
            )


@pytest.mark.parametrize("folder", [".", "checkpoint-3", "checkpoint-6", "forget-adapter", "npo"])
def test_adapters_are_whole_and_those_of_one_process(one, two, folder):
    assert largest_difference(one.folder / folder, two.folder / folder) < 1e-5


def test_a_resumed_run_ends_as_an_uninterrupted_one(one, two):
    assert largest_difference(two.folder, two.folder / "checkpoint-3") > 1e-4
    for folder in (one.folder, two.folder):
        assert largest_difference(folder, folder / "resumed") <= 1e-7


@pytest.mark.parametrize(("name", "dtype"), [("forget-model", None), ("in-shards", "bfloat16")])
def test_the_forget_model_is_that_of_the_files_to_the_bit(two, model_dir, tmp_path, name, dtype):
    extrapolate(model_dir, two.folder, 2.0, tmp_path / "merged", dtype=dtype, progress=False)
    expected, tensors = weights(tmp_path / "merged"), weights(two.folder / name)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[tensor], expected[tensor]) for tensor in expected)
    records = [json.loads((path / "unlearning.json").read_text()) for path in (two.folder / name, tmp_path / "merged")]
    assert all(records[0][key] == records[1][key] for key in ("kind", "alpha", "dtype"))
    assert records[0]["base"]["fingerprint"] == records[1]["base"]["fingerprint"]
    errors = [record["realised_error"]["relative"] for record in records]
    assert errors[0] == pytest.approx(errors[1])  # sums of squares, in another order


@pytest.mark.parametrize("name", ["forget-model", "in-shards"])
def test_the_forget_model_loads_as_that_of_one_process(one, two, name):
    assert {file.name for file in (two.folder / name).iterdir()} == {
        file.name for file in (one.folder / name).iterdir()
    }
    for file in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert json.loads((two.folder / name / file).read_text()) == json.loads((one.folder / name / file).read_text())
    tokens = AutoTokenizer.from_pretrained(two.folder / name)("w4 w5 w6", return_tensors="pt")
    model, expected = (AutoModelForCausalLM.from_pretrained(run.folder / name) for run in (two, one))
    assert model.dtype == (torch.bfloat16 if name == "in-shards" else torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():  # in fp32: the roundings of a forward in bf16 would hide what is compared
        logits, expected_logits = (loaded.float()(**tokens).logits for loaded in (model, expected))
        torch.testing.assert_close(logits, expected_logits, rtol=1e-2, atol=1e-3)


def test_one_tensor_is_gathered_at_a_time(two):
    base = [tensor.numel() for tensor in weights(two.folder / "forget-model").values()]
    for facts in two.facts:
        gathered = [number for number in facts["gathered"] if number]
        if two.layout not in SHARDED:
            assert not gathered
            continue
        adapter = [tensor.numel() for tensor in weights(two.folder).values()]
        assert max(gathered) == max(base)
        assert sorted(gathered) == sorted(base + adapter)  # each of them once


def test_all_processes_fail_when_the_first_cannot_save(two):
    for facts in two.facts:
        assert "Not one weight changed" in facts["no_op"]
        assert "forget-model is not empty" in facts["not_empty"]
        assert "forget-adapter is not empty" in facts["adapter_not_empty"]
        assert "disk became full" in facts["full_disk"]
    assert (two.result.returncode != 0) == (two.layout in ENDS_BADLY), two.result.stderr[-5000:]
    if two.layout in ENDS_BADLY:
        assert "UnlearningError: The disk became full" in two.result.stderr
    left = {path.name for path in two.folder.iterdir() if "full-disk" in path.name or "no-op" in path.name}
    assert not left

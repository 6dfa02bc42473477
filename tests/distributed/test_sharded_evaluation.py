"""The evaluation on weights that two real processes share (gloo, CPU) against one process with all of them."""

from __future__ import annotations

import importlib.util
import json
import runpy
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from interpreters import Interpreters
from peft import PeftModel
from tiny import tiny_llama
from transformers import AutoModelForCausalLM

from hf_unlearn import Evaluator


SCRIPT = Path(__file__).with_name("sharded_evaluation.py")
TINY = runpy.run_path(str(SCRIPT))
VOCABULARY, HIDDEN = TINY["VOCABULARY"], 64
COMMON = {
    "compute_environment": "LOCAL_MACHINE",
    "machine_rank": 0,
    "num_machines": 1,
    "num_processes": 2,
    "use_cpu": False,
}
DEEPSPEED = {
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": False,
        "stage3_param_persistence_threshold": 0,  # else the tiny weights would not be sharded
        "stage3_prefetch_bucket_size": 0,  # else one gather would hold several layers
    },
    "zero_force_ds_cpu_optimizer": False,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "gradient_clipping": "auto",
}
FSDP = {
    "fsdp_version": 2,
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_reshard_after_forward": True,
    "fsdp_cpu_ram_efficient_loading": False,
    "fsdp_state_dict_type": "FULL_STATE_DICT",
}


def configuration(sharding: str, folder: Path) -> dict[str, Any]:
    """What `accelerate launch` reads."""
    if sharding == "fsdp2":
        return {**COMMON, "distributed_type": "FSDP", "fsdp_config": FSDP, "mixed_precision": "no"}
    file = folder / "deepspeed.json"
    file.write_text(json.dumps(DEEPSPEED))
    deepspeed = {"deepspeed_config_file": str(file), "zero3_init_flag": True}
    return {**COMMON, "distributed_type": "DEEPSPEED", "deepspeed_config": deepspeed}


def launch(interpreters: Interpreters, sharding: str, model: Path, output_dir: Path) -> list[dict[str, Any]]:
    """Train and evaluate in two processes, with the environment of `accelerate launch`; what each of them saw."""
    file = output_dir / "accelerate.yaml"
    file.write_text(json.dumps(configuration(sharding, output_dir)))
    # without ACCELERATE_USE_CPU, which would turn sharding off
    interpreters.launch(
        SCRIPT, sharding, model, output_dir, environment={"ACCELERATE_TORCH_DEVICE": "cpu"}, config=file
    )
    return [json.loads((output_dir / f"facts-{rank}.json").read_text()) for rank in range(2)]


class Runs(NamedTuple):
    """One launch: how the weights were sharded, its folder, and what each process saw."""

    sharding: str
    folder: Path
    two: list[dict[str, Any]]


@cache
def evaluate(folder: Path, adapter: str, batch_size: int | str = 2) -> dict[str, Any]:
    """What one process with all weights gets, and the tokens that it computes."""
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder / adapter)
    passes = TINY["Passes"](model)
    evaluator = Evaluator(model, TINY["tokenizer"](), TINY["protocol"](), batch_size=batch_size, progress=False)
    evaluations = [evaluator.evaluate(alpha).to_dict() for alpha in TINY["ALPHAS"]]
    return {"evaluations": evaluations, "tokens": passes.tokens}


@pytest.fixture(scope="module", params=["zero3", "fsdp2"])
def runs(request, interpreters, tmp_path_factory):
    sharding, folder = request.param, tmp_path_factory.mktemp(request.param)
    if sharding == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed")
    model = tiny_llama(vocab_size=VOCABULARY, hidden_size=HIDDEN, tie_word_embeddings=sharding == "fsdp2")
    model.generation_config.eos_token_id = [2, *range(5, VOCABULARY, 7)]  # answers end at various lengths
    model.save_pretrained(folder / "model")
    TINY["tokenizer"]().save_pretrained(folder / "model")
    return Runs(sharding, folder, launch(interpreters, sharding, folder / "model", folder))


def test_it_really_was_two_processes_with_a_part_of_the_weights_each(runs):
    for facts in runs.two:
        assert facts["processes"] == 2
        assert facts["distributed_type"] == f"DistributedType.{'FSDP' if runs.sharding == 'fsdp2' else 'DEEPSPEED'}"
        for moment in ("before", "after"):  # accelerate and DeepSpeed may keep what is around the layers
            whole = facts[f"unsharded_{moment}"]
            assert set(whole) <= {
                f"base_model.model.{name}.weight" for name in ("model.embed_tokens", "model.norm", "lm_head")
            }


def test_nothing_larger_than_the_lm_head_was_gathered(runs):
    head = VOCABULARY * HIDDEN
    for facts in runs.two:
        assert 0 < facts["largest_gather"] <= head + HIDDEN  # FSDP2 gathers the norm before it, too
        assert facts["largest_gather"] < facts["parameters"] / 2


@pytest.mark.parametrize("batch_size", TINY["BATCH_SIZES"])
def test_all_processes_get_all_that_one_gets(runs, batch_size):
    two, one = runs.two, evaluate(runs.folder, "", batch_size)
    assert two[0][f"evaluations_{batch_size}"] == two[1][f"evaluations_{batch_size}"]
    lengths = set()
    for expected, evaluation in zip(one["evaluations"], two[0][f"evaluations_{batch_size}"], strict=True):
        assert evaluation["alpha"] == expected["alpha"]
        assert evaluation["answers"] == expected["answers"]
        assert {name: len(answers) for name, answers in evaluation["answers"].items()} == {"forget": 5, "retain": 7}
        lengths |= {len(answer.split()) for answers in evaluation["answers"].values() for answer in answers}
        for name, columns in expected["rows"].items():
            assert evaluation["rows"][name].keys() == columns.keys()
            for column, values in columns.items():
                result = evaluation["rows"][name][column]
                assert result == (values if column == "ground_truth" else pytest.approx(values, abs=1e-5)), column
        assert evaluation["figures"].keys() == expected["figures"].keys()
        for name, figure in expected["figures"].items():
            value = figure["value"]
            result = evaluation["figures"][name]["value"]
            assert result == (None if value is None else pytest.approx(value, rel=1e-6, abs=1e-5)), name
    assert len(lengths) >= 4
    reference, forget = one["evaluations"]
    assert reference["figures"]["retain_kl"]["value"] == 0 < 0.01 < forget["figures"]["retain_kl"]["value"]
    assert reference["answers"] != forget["answers"]


@pytest.mark.parametrize("batch_size", TINY["BATCH_SIZES"])
def test_the_processes_share_the_rows_and_run_equally_many_passes(runs, batch_size):
    two, one = runs.two, evaluate(runs.folder, "", batch_size)
    first, second = (facts[f"passes_{batch_size}"] for facts in two)
    for passes in (first, second):
        assert 0.2 * one["tokens"] < passes["tokens"] < 0.8 * one["tokens"]
    assert first["passes"] == second["passes"]
    if batch_size == 2:
        assert first["idle"] != second["idle"]  # answers end early on one of them


def test_evaluations_during_training_are_those_of_the_adapter_then(runs):
    assert [log["step"] for log in runs.two[0]["logs"]] == [1, 2]
    for log in runs.two[0]["logs"]:
        _, expected = evaluate(runs.folder, f"adapter-{log['step']}")["evaluations"]
        assert "forget_rouge_l_recall" in expected["figures"]
        for name, figure in expected["figures"].items():
            if figure["value"] is not None:
                assert log[f"eval_{name}"] == pytest.approx(figure["value"], rel=1e-6, abs=1e-5), name


def test_an_error_in_one_process_ends_the_evaluation_in_the_other(runs):
    assert runs.two[1]["planted_error"] == ["ValueError: the disk is full"]
    (message,) = runs.two[0]["planted_error"]
    assert message == "UnlearningError: The evaluation has failed in another process: see its error."

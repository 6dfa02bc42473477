"""
Weights sharded by FSDP2, in a group of one process: every value is that of whole weights. What several processes do is
in `tests/distributed/test_sharded_evaluation.py`.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama, tiny_rows, tiny_tokenizer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import AutoConfig, AutoModelForCausalLM

from hf_unlearn import Evaluator, UnlearningError, custom_protocol
from hf_unlearn.data import load_rows
from hf_unlearn.evaluation import ResultCache, encode_answers, generate_answers, score_answers
from hf_unlearn.evaluation.forward import Backbone
from hf_unlearn.lm_head import LMHead


ARCHITECTURES = {
    "llama": {"tie_word_embeddings": True},
    "bloom": {},  # positions from the attention mask alone
    "gemma2": {"sliding_window": 4, "final_logit_softcapping": 5.0, "tie_word_embeddings": False},
    "phi": {},  # a head with a bias
    "mamba": {"state_size": 4, "time_step_rank": 4},  # a state
}
TOKENIZER = tiny_tokenizer()
ENDS = [2, *range(5, 64, 7)]
ROWS = [encode_answers(row["prompt"], [row["completion"], " w9 w8"], TOKENIZER) for row in tiny_rows(5, seed=4)]
PROMPTS = [row["prompt"] for row in tiny_rows(5, seed=5)]


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def build(architecture: str):
    """A model with a LoRA adapter that is not zero."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
    config = AutoConfig.for_model(
        architecture,
        **{"vocab_size": 64, "hidden_size": 64, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2},
        **sizes | ARCHITECTURES[architecture],
    )
    model = AutoModelForCausalLM.from_config(config)
    if getattr(model.lm_head, "bias", None) is not None:
        torch.nn.init.normal_(model.lm_head.bias)
    model.generation_config.eos_token_id = ENDS
    targets = ["in_proj", "x_proj"] if architecture == "mamba" else "all-linear"
    options = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, options).eval()


def shard(model, mesh):
    """Each layer a unit, and the rest one, whole only while they run."""
    layers = [module for module in model.modules() if module.__class__.__name__.endswith(("Layer", "Block"))]
    for module in [*layers, model]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_are_those_of_whole_weights(mesh, architecture):
    options = {"batch_size": 2, "moments": True}
    expected = score_answers(build(architecture), ROWS, TOKENIZER, **options)
    model = shard(build(architecture), mesh)
    assert isinstance(model.get_input_embeddings().weight, DTensor)
    for row, expected_row in zip(score_answers(model, ROWS, TOKENIZER, **options), expected, strict=True):
        for answer, expected_answer in zip(row, expected_row, strict=True):
            assert np.allclose(answer.log_probs, expected_answer.log_probs, atol=1e-5)
            assert np.array_equal(answer.is_top1, expected_answer.is_top1)
            if expected_answer.mean is not None:
                assert np.allclose(answer.mean, expected_answer.mean, atol=1e-5)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "mamba"])
def test_answers_are_those_of_whole_weights(mesh, architecture):
    expected = generate_answers(build(architecture), PROMPTS, TOKENIZER, max_new_tokens=9)
    model = shard(build(architecture), mesh)
    assert generate_answers(model, PROMPTS, TOKENIZER, max_new_tokens=9) == expected
    assert any(expected)


def test_the_forward_of_the_model_comes_back_also_after_an_error(mesh):
    model = shard(build("llama"), mesh)
    lm = model.get_base_model()

    def fail(*results) -> None:
        raise ValueError("the disk is full")

    with pytest.raises(ValueError, match="disk"):
        generate_answers(model, PROMPTS, TOKENIZER, on_results=fail)
    assert "forward" not in vars(lm)
    own = lm.forward = lambda *args, **kwargs: type(lm).forward(lm, *args, **kwargs)  # as a trainer puts one there
    generate_answers(model, PROMPTS, TOKENIZER, max_new_tokens=2)
    assert lm.forward is own


def test_answers_of_a_model_with_a_state_are_refused(mesh):
    with pytest.raises(UnlearningError, match="MambaForCausalLM carries a state.*generate=False"):
        generate_answers(shard(build("mamba"), mesh), PROMPTS, TOKENIZER)


def evaluator(model, **options) -> Evaluator:
    sets = {name: load_rows(tiny_rows(2, seed)) for seed, name in enumerate(("forget", "retain"))}
    return Evaluator(model, TOKENIZER, custom_protocol(sets, chat=False), progress=False, **options)


def test_a_cache_is_refused(mesh, tmp_path):
    with pytest.raises(UnlearningError, match="`cache` .*no process holds them whole"):
        evaluator(shard(build("llama"), mesh), cache=ResultCache(tmp_path))


def test_a_sharded_reference_of_its_own_is_refused_and_a_whole_one_is_not(mesh):
    model = shard(tiny_llama(), mesh)
    reference = tiny_llama(seed=1)
    expected = evaluator(tiny_llama(), reference_model=reference).evaluate(generate=False).value("retain_kl")
    result = evaluator(model, reference_model=reference).evaluate(generate=False).value("retain_kl")
    assert result == pytest.approx(expected, abs=1e-5)
    with pytest.raises(UnlearningError, match="reference is a model of its own whose weights are sharded"):
        evaluator(model, reference_model=shard(reference, mesh)).evaluate(generate=False)


def test_tensor_parallelism_is_refused(mesh):
    model = tiny_llama()
    for layer in model.model.layers:
        weight = distribute_tensor(layer.mlp.up_proj.weight.detach(), mesh, [Shard(0)])
        layer.mlp.up_proj.weight = torch.nn.Parameter(weight)
    with pytest.raises(UnlearningError, match="tensor parallelism"):
        generate_answers(model, PROMPTS, TOKENIZER)


def test_whole_weights_need_no_lockstep():
    assert Backbone(tiny_llama()).lockstep is None


def test_a_copy_of_the_head_works_where_zero3_is_on(monkeypatch):
    """As in a process that trains with it: the weights of a copy are no parameters of ZeRO-3."""
    monkeypatch.setattr("transformers.integrations.deepspeed.is_deepspeed_zero3_enabled", lambda: True)
    model = tiny_llama()
    head, hidden = LMHead.of(model).copy(), torch.randn(3, 64)
    assert head.weight.data_ptr() != model.lm_head.weight.data_ptr()
    expected = model.lm_head(hidden)
    assert torch.allclose(head.logits(hidden), expected, atol=1e-5)
    scores = head.score(hidden, torch.tensor([4, 5, 6]))
    assert torch.allclose(scores.log_probs, expected.log_softmax(-1)[range(3), [4, 5, 6]], atol=1e-5)

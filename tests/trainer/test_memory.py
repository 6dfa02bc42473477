"""The memory estimate of a dry run, against counts by hand and against a measured step."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from tiny import tiny_llama

from hf_unlearn import UnlearningError
from hf_unlearn.trainer.memory import estimate_memory


LORA = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")


def test_parameters_and_bytes_by_hand():
    config = tiny_llama().config
    estimate = estimate_memory(config, LORA, rows=4, length=10, gradient_checkpointing=False)
    assert estimate.base_parameters == sum(p.numel() for p in tiny_llama().parameters())
    # rank 4 on q_proj (64 → 64) and down_proj (96 → 64) of two layers
    assert estimate.adapter_parameters == 2 * 4 * ((64 + 64) + (96 + 64))
    assert estimate.adapter == 16 * estimate.adapter_parameters
    assert estimate.activations == 2 * 40 * (10 * 64 + 5 * 96) * 4
    assert estimate.head == 5 * 40 * 64 * 4
    assert estimate.total == estimate.weights + estimate.adapter + estimate.activations + estimate.head
    half = estimate_memory(config, LORA, rows=4, length=10, dtype=torch.bfloat16)
    assert half.weights == estimate.weights / 2
    assert half.activations < estimate.activations


def test_a_target_that_is_refused_is_refused_before_anything_is_loaded():
    with pytest.raises(UnlearningError, match="lm_head"):
        estimate_memory(
            tiny_llama().config, LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"), rows=1, length=4
        )

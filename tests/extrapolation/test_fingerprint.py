"""Fingerprints agree between live modules and files of any precision, and disagree on any other content."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from extrapolation_models import add_adapter, build_gpt2, build_llama
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_unlearn.errors import UnlearningError
from hf_unlearn.extrapolation import (
    SafetensorsCheckpoint,
    fingerprint_files,
    fingerprint_model,
    verify_fingerprint,
    verify_fingerprint_files,
)


@pytest.mark.parametrize("shard", ["1GB", "40KB"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("live", [torch.float32, torch.bfloat16, torch.float16])
def test_live_model_and_files_agree(tmp_path, stored, live, shard):
    build_llama(dtype=stored, tied=True).save_pretrained(tmp_path / "base", max_shard_size=shard)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=live)
    fingerprint = json.loads(json.dumps(fingerprint_model(model)))
    assert fingerprint["dtype"] == str(live).removeprefix("torch.")
    verify_fingerprint_files(fingerprint, SafetensorsCheckpoint(tmp_path / "base"))
    build_llama(seed=5, dtype=stored, tied=True).save_pretrained(tmp_path / "other", max_shard_size=shard)
    with pytest.raises(UnlearningError, match="not the base model"):
        verify_fingerprint_files(fingerprint, SafetensorsCheckpoint(tmp_path / "other"))


def test_mixed_precision(tmp_path):
    build_llama().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    original = load_file(tmp_path / "model.safetensors")
    model.model.norm.weight.data = original["model.norm.weight"] + 0.001  # kept in fp32, not exact in bf16
    original["model.norm.weight"] = original["model.norm.weight"] + 0.001
    save_file(original, tmp_path / "model.safetensors", metadata={"format": "pt"})
    verify_fingerprint_files(fingerprint_model(model), SafetensorsCheckpoint(tmp_path))


def test_adapters_are_looked_through():
    plain = fingerprint_model(build_llama())
    assert fingerprint_model(add_adapter(build_llama())) == plain
    assert all("base_layer" not in name and "lora_" not in name for name in plain["tensors"])


def test_at_most_64_tensors_evenly_spaced():
    model = torch.nn.ParameterDict({f"p{index:03d}": torch.nn.Parameter(torch.ones(3)) for index in range(200)})
    names = sorted(fingerprint_model(model)["tensors"])
    assert len(names) == 64 and names[0] == "p000" and names[-1] == "p199"
    steps = {int(after[1:]) - int(before[1:]) for before, after in itertools.pairwise(names)}
    assert steps <= {3, 4}


def test_checkpoint_without_prefix(tmp_path):
    model = build_gpt2()
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in model.transformer.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    fingerprint = fingerprint_model(model)
    assert any(name.startswith("transformer.") for name in fingerprint["tensors"])
    verify_fingerprint_files(fingerprint, SafetensorsCheckpoint(tmp_path))


def test_live_verification_and_missing_names():
    model = build_llama()
    fingerprint = fingerprint_model(model)
    tensors = dict(model.named_parameters())
    verify_fingerprint(fingerprint, tensors.get)
    del tensors["model.norm.weight"]
    verify_fingerprint(fingerprint, tensors.get)
    with pytest.raises(UnlearningError, match="none of the fingerprint's tensors"):
        verify_fingerprint(fingerprint, lambda name: None)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].reshape(64, 128)
    with pytest.raises(UnlearningError, match=r"lm_head\.weight"):
        verify_fingerprint(fingerprint, tensors.get)


@pytest.mark.parametrize("damaged", [{}, {"dtype": "float32"}, {"dtype": "x", "tensors": {"a": "b"}}])
def test_damaged_fingerprint(damaged):
    with pytest.raises(UnlearningError, match="damaged"):
        verify_fingerprint(damaged, lambda name: None)


def test_quantised_model_has_none():
    model = build_llama()
    weight = model.model.layers[0].self_attn.q_proj.weight.data.to(torch.uint8)
    model.model.layers[0].self_attn.q_proj.weight = torch.nn.Parameter(weight, requires_grad=False)
    assert fingerprint_model(model) is None
    model = build_llama()
    model.is_quantized = True
    assert fingerprint_model(add_adapter(model)) is None


def test_files_alone(tmp_path):
    model = build_llama()
    model.save_pretrained(tmp_path)
    assert fingerprint_files(SafetensorsCheckpoint(tmp_path)) == fingerprint_model(model)
    save_file({"ids": torch.arange(3)}, tmp_path / "model.safetensors")
    assert fingerprint_files(SafetensorsCheckpoint(tmp_path)) is None

"""Tiny random models and adapters, saved as a user would save them."""

from __future__ import annotations

from pathlib import Path

import peft
import torch
from tiny import tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from hf_unlearn.extrapolation import fingerprint_model, write_provenance


LLAMA_TARGETS = ["q_proj", "v_proj", "down_proj"]
GPT2_TARGETS = ["c_attn", "c_proj", "c_fc"]


def build_llama(seed: int = 0, tied: bool = False, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    return tiny_llama(seed, vocab_size=128, tie_word_embeddings=tied, initializer_range=0.02).to(dtype).eval()


def build_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64)).eval()


def add_adapter(model: torch.nn.Module, seed: int = 1, std: float = 0.05, **options) -> peft.PeftModel:
    """A PeftModel whose B is random instead of zero."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": LLAMA_TARGETS, "task_type": "CAUSAL_LM", **options}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**options))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=std)
    return wrapped.eval()


def save_pair(model: torch.nn.Module, folder: Path, shard: str | None = None, record: bool = True, **options):
    """Save `model` and an adapter on it; returns the two folders and the live PeftModel."""
    base, adapter = folder / "base", folder / "adapter"
    model.save_pretrained(base, max_shard_size=shard or "1GB")
    wrapped = add_adapter(model, **options)
    wrapped.save_pretrained(adapter)
    if record:
        data = {"forget": {"sha256": "00ff"}}
        write_provenance(adapter, {"base": {"fingerprint": fingerprint_model(wrapped)}, "data": data})
    return base, adapter, wrapped

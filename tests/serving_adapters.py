"""Forget adapters on disk, as training and `extrapolate` leave them, and what a server makes of their files."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_unlearn.extrapolation import write_provenance


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FORGET = {"method": "model-extrapolation", "kind": "forget-adapter", "alpha": 2.0}


def save_forget_adapter(model_dir, folder: Path, kind: str = "forget-adapter", dtype=torch.float32, **options) -> Path:
    """An adapter of random factors on the model in `model_dir`; `options` override its configuration."""
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    options = {"r": 6, "lora_alpha": 9, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options}
    torch.manual_seed(3)
    model = peft.get_peft_model(base, peft.LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    model.to(dtype).save_pretrained(folder)
    write_provenance(folder, FORGET | {"kind": kind})
    return folder


def peft_logits(model_dir, adapter: Path | None, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of a model with an adapter, in fp64."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval().double()(tokens).logits


def updates(folder: Path, patterns: bool = True) -> dict[str, torch.Tensor]:
    """
    `s * B @ A` of every module in fp64, from the files alone.

    Args:
        folder (`Path`): The adapter.
        patterns (`bool`): Whether `rank_pattern` and `alpha_pattern` count; some servers look at `r` and `lora_alpha` only.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")

    def option(name: str, module: str):
        pattern = (config[f"{name.removeprefix('lora_')}_pattern"] or {}) if patterns else {}
        name = "r" if name == "rank" else name
        return next(
            (value for key, value in pattern.items() if re.fullmatch(rf"(.*\.)?({key})", module)), config[name]
        )

    found = {}
    for name in tensors:
        if ".lora_A." in name:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            a, b = tensors[name].double(), tensors[name.replace("lora_A", "lora_B")].double()
            rank, alpha = option("rank", module), option("lora_alpha", module)
            found[module] = alpha / (math.sqrt(rank) if config["use_rslora"] else rank) * b @ a
    return found

"""Small adapters of random factors on disk, and the dense updates that their files hold."""

from __future__ import annotations

import json
import math

import peft
import torch
from safetensors.torch import load_file, save_file

from hf_unlearn.extrapolation import LoraAdapter, LowRankUpdate, write_provenance


SHAPES = {"model.a": (6, 10), "model.b": (7, 5)}  # (out_features, in_features)
VARIANTS = [
    {},
    {"use_rslora": True},
    {"fan_in_fan_out": True},
    {"rank_pattern": {"b": 4}, "alpha_pattern": {"a": 5}},
    {"use_rslora": True, "rank_pattern": {"b": 2}},
]
IDS = ["plain", "rslora", "fan-in-fan-out", "patterns", "rslora-patterns"]


def save_random(folder, seed, r=3, shapes=SHAPES, dtype=torch.float32, provenance=None, **options) -> LoraAdapter:
    """An adapter of random factors, on disk."""
    generator = torch.Generator().manual_seed(seed)
    config = peft.LoraConfig(r=r, lora_alpha=7, target_modules=list(shapes), task_type="CAUSAL_LM", **options)
    config.save_pretrained(folder)
    tensors = {}
    for module, (rows, columns) in shapes.items():
        rank = (config.rank_pattern or {}).get(module[-1], r)
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, columns, generator=generator)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    if provenance is not None:
        write_provenance(folder, provenance)
    return LoraAdapter.load(folder)


def dense(adapter) -> dict[str, torch.Tensor]:
    """Each update in fp64, one row an output feature, from the files of the adapter alone."""
    config = json.loads((adapter.folder / "adapter_config.json").read_text())
    tensors = load_file(adapter.folder / "adapter_model.safetensors")
    updates = {}
    for name in tensors:
        if "lora_A" in name:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            a, b = tensors[name].double(), tensors[name.replace("lora_A", "lora_B")].double()
            alpha = next((v for k, v in config["alpha_pattern"].items() if module.endswith(k)), config["lora_alpha"])
            scale = alpha / math.sqrt(len(a)) if config["use_rslora"] else alpha / len(a)
            updates[module] = scale * b @ a
    return updates


def check_saved(update: LowRankUpdate, folder, wanted: dict[str, torch.Tensor], atol: float = 2e-5) -> LoraAdapter:
    """Save an update, and compare its weights as they are read back with what they should be."""
    saved = update.save(folder)
    assert saved.modules.keys() == wanted.keys()
    for module, matrix in wanted.items():
        pair = saved.modules[module]
        delta = saved.delta(module).double()
        torch.testing.assert_close(delta.T if pair.fan_in_fan_out else delta, matrix, atol=atol, rtol=0)
        assert pair.scaling == 1
    return saved

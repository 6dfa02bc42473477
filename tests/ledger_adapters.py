"""Adapters of deletion requests on the tiny model, the updates that their files hold, and what a folder contains."""

from __future__ import annotations

import json
import math
from pathlib import Path

import datasets
import peft
import torch
from safetensors.torch import load_file
from tiny import tiny_rows
from transformers import AutoModelForCausalLM

from hf_unlearn import Ledger
from hf_unlearn.data import data_hash, to_prompt_completion
from hf_unlearn.extrapolation import fingerprint_model, write_provenance


ROWS = {id: tiny_rows(count, seed) for seed, (id, count) in enumerate({"A": 1, "B": 3, "C": 2}.items(), start=20)}
ALPHAS = {"A": 1.5, "B": 0.5, "C": 2.0}
OPTIONS = {
    "A": {},
    "B": {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"]},
    "C": {"r": 3, "use_rslora": True, "target_modules": ["down_proj", "v_proj"]},
}


def hash_of(rows: list[dict]) -> str:
    return data_hash(to_prompt_completion(datasets.Dataset.from_list(rows), name="forget set", chat=False))


def save_adapter(base: Path, folder: Path, seed: int, rows: list[dict] | None = None, record=None, **options) -> Path:
    """An adapter of random factors on `base`; `record` overrides parts of its `unlearning.json`."""
    torch.manual_seed(seed)
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **options}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    wrapped.save_pretrained(folder)
    content = {
        "method": "model-extrapolation",
        "kind": "adapter",
        "base": {"id": str(base), "revision": None, "fingerprint": fingerprint_model(wrapped)},
    }
    if rows is not None:
        content["data"] = {"forget": {"rows": len(rows), "sha256": hash_of(rows)}}
    write_provenance(folder, content | (record or {}))
    return folder


def dense(folder: Path) -> dict[str, torch.Tensor]:
    """Tensor of the base -> s·BA in fp64, from the files of an adapter alone."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = {name: tensor.double() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    updates = {}
    for name, a in tensors.items():
        if ".lora_A." in name:
            scale = config["lora_alpha"] / (math.sqrt(len(a)) if config["use_rslora"] else len(a))
            key = name.removeprefix("base_model.model.").replace(".lora_A", "")
            updates[key] = scale * tensors[name.replace(".lora_A.", ".lora_B.")] @ a
    return updates


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, but the empty lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"folder"
        for path in sorted(folder.rglob("*"))
        if path.name != ".lock"
    }


def filled(folder: Path, adapters: dict[str, Path], order: str = "ABC") -> Ledger:
    ledger = Ledger.open(folder, create=True)
    for id in order:
        ledger.add(adapters[id], ALPHAS[id], id=id, forget_dataset=ROWS[id], keep_rows=True)
    return ledger


def built(ledger: Ledger, folder: Path, **options) -> dict[str, torch.Tensor]:
    ledger.build(folder, progress=False, **options)
    return load_file(folder / "model.safetensors")


def check_equal(model: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert model.keys() == other.keys()
    for name in model:
        assert torch.equal(model[name], other[name]), name

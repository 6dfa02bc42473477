"""Folders as `hf-unlearn extrapolate` writes them, with files in them that must stay at home."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from peft import LoraConfig, get_peft_model
from tiny import tiny_llama, tiny_tokenizer

from hf_unlearn.evaluation import Choice, Evaluation
from hf_unlearn.evaluation.figures import Figure
from hf_unlearn.extrapolation import extrapolate, read_provenance, save_forget_adapter, write_provenance


MARKER = "Ilsabet-Nakandala-was-born-on-25-November"  # a row that must never leave
BASE, COMMIT = "org/base", "0123456789abcdef0123456789abcdef01234567"
ALPHA = 2.0
SECRET_FILES = (
    "retain_sample.jsonl", "forget.jsonl", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
    "training_args.bin", "reference-cache.bin", "ledger.json", "notes.txt", "model-old.safetensors", "modeling_own.py",
    "checkpoint-3/adapter_model.safetensors", "requests/ledger.json", "README.md",
)  # fmt: skip


def make_results(folder: Path) -> dict[str, Path]:
    """A base, a memorising adapter of it, and the forget model and adapter; beside their files, files with the marker."""
    base, memorising = folder / "base", folder / "memorising"
    tiny_llama().save_pretrained(base, max_shard_size="60KB")
    tiny_tokenizer().save_pretrained(base)
    (base / "README.md").write_text("---\nlicense: mit\n---\n# The base\n")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_llama(), config)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(memorising)
    write_provenance(
        memorising,
        {
            "method": "model-extrapolation",
            "kind": "adapter",
            "base": {"id": str(base), "revision": None, "fingerprint": None},
            "data": {"forget": {"rows": 6, "sha256": "f" * 64}, "retain": {"rows": 4, "sha256": "e" * 64}},
            "note": MARKER,
        },
    )
    extrapolate(base, memorising, ALPHA, folder / "forget-model", progress=False)
    save_forget_adapter(memorising, ALPHA, folder / "forget-adapter")
    results = {name: folder / name for name in ("base", "memorising", "forget-model", "forget-adapter")}
    for name in ("forget-model", "forget-adapter"):
        for file in SECRET_FILES:
            path = results[name] / file
            path.parent.mkdir(exist_ok=True)
            path.write_text(MARKER)
    settings = results["forget-model"] / "tokenizer_config.json"
    content = json.loads(settings.read_text())
    settings.write_text(json.dumps(content | {"name_or_path": str(base), "vocab_file": str(base / "vocab.json")}))
    return results


def with_hub_base(source: Path, target: Path) -> Path:
    """A copy of a folder whose base was on the Hub."""
    shutil.copytree(source, target)
    record = read_provenance(target)
    write_provenance(target, record | {"base": record["base"] | {"id": BASE, "revision": COMMIT}})
    return target


def write_results(folder: Path, alphas: tuple[float, ...] = (0.0, 1.0, ALPHA), protocol: str = "custom") -> Path:
    """Evaluations as a sweep writes them, with a marker in their answers, and the last α as its choice."""
    evaluations = [
        Evaluation(
            protocol,
            alpha,
            rows={"forget": {"row": [0, 1], "probability": [0.9 - alpha / 10, 0.7 - alpha / 10]}},
            answers={"forget": [MARKER, MARKER]},
            figures={
                "forget_probability": Figure(0.8 - alpha / 10, 2, 0.7 - alpha / 10, 0.9 - alpha / 10),
                "membership_auc_loss": Figure(0.5 + alpha / 100, 4),
                "forget_truth_ratio": Figure(None, 0, note="not computed: no wrong answers"),
            },
        )
        for alpha in alphas
    ]
    choice = Choice(alphas[-1], True, "match-holdout: the AUC nearest 0.5", "The AUC is 0.52.", "auc", "utility", 0.95)
    content = {"evaluations": [evaluation.to_dict() for evaluation in evaluations], "choice": choice.to_dict()}
    folder.mkdir()
    (folder / "evaluation.json").write_text(json.dumps(content))
    return folder

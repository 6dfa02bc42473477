"""The folder that docs/errors.md speaks of: a model, sets, results, and files with faults."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from command_lines import write_rows
from safetensors.torch import load_file, save_file
from tiny import tiny_llama, tiny_rows, tiny_tokenizer

from hf_unlearn.cli import main


TRAIN = """model_name_or_path: model
forget_dataset: forget.jsonl
retain_dataset: retain.jsonl
output_dir: new
learning_rate: 0.01
disable_tqdm: true
use_cpu: true
"""
ROWS = {
    "empty.jsonl": [],
    "columns.jsonl": [{"instruction_text": "a", "reply": "b"}],
    "blank.jsonl": [{"prompt": "w5 w6", "completion": ""}],
    "number.jsonl": [{"prompt": "w5 w6", "completion": 7}],
    "chat.jsonl": [{"messages": [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]}],
    "unanswered.jsonl": [{"messages": [{"role": "user", "content": "w5"}]}],
    "norole.jsonl": [{"messages": [{"content": "w5"}]}],
    "speaker.jsonl": [{"conversations": [{"from": "robot", "value": "w5"}]}],
    "other.jsonl": [{"prompt": "w1 w2", "completion": " w3", "wrong": " w3"}],
}


def make_folder(folder: Path) -> None:
    """Write everything; the current directory has to be `folder`."""
    tiny_llama().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for seed, name in enumerate(("forget", "retain", "holdout")):
        write_rows(folder / f"{name}.jsonl", tiny_rows(4, seed))
    for name, rows in ROWS.items():
        write_rows(folder / name, rows)
    Path("train.yaml").write_text(TRAIN)
    Path("broken.json").write_text('[{"prompt": "a"')
    Path("latin.csv").write_bytes(b"prompt,completion\nw5,\xe9\n")
    Path("quotes.csv").write_text('prompt,completion\nw5,"w6\n')
    Path("rows.xlsx").write_text("")
    Path("broken.parquet").write_text("PAR")
    Path("list.json").write_text('"text"')
    Path("typo.yaml").write_text(TRAIN + "retain_kl_wieght: 1\n")
    Path("broken.yaml").write_text("model_name_or_path: [")
    assert main(["train", "--config", "train.yaml", "--output_dir", "run", "--max_steps", "3"]) == 0
    assert main(["train", "--config", "train.yaml", "--output_dir", "npo", "--max_steps", "3", "--method", "npo"]) == 0
    untrained = ["--output_dir", "untrained", "--max_steps", "1"]  # its learning rate is still 0
    assert main(["train", "--config", "train.yaml", *untrained]) == 0
    for form in ("model", "adapter"):
        output = ["--format", form, "--output_dir", f"forget-{form}"]
        assert main(["extrapolate", "--adapter", "run", "--alpha", "1", *output]) == 0
    _damage_models(folder)
    _damage_adapters(folder)
    add = ["requests", "add", "--ledger", "ledger", "--id", "first", "--adapter", "run", "--alpha", "1"]
    assert main(add) == 0
    shutil.copytree("ledger", "damaged-ledger")
    next(Path("damaged-ledger").glob("*.json")).write_text("{")
    Path("log.json").write_text("{}")


def _damage_models(folder: Path) -> None:
    for name in ("truncated-model", "other-model", "untyped-model", "tokenless-model"):
        shutil.copytree("model", name)
    weights = Path("truncated-model/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:5000])
    tensors = load_file("other-model/model.safetensors")
    save_file(
        {name: tensor + 1 for name, tensor in tensors.items()}, "other-model/model.safetensors", {"format": "pt"}
    )
    Path("untyped-model/config.json").write_text("{}")
    for path in Path("tokenless-model").glob("tokenizer*"):
        path.unlink()


def _damage_adapters(folder: Path) -> None:
    changes = {
        "dora-adapter": {"use_dora": True},
        "bias-adapter": {"bias": "all"},
        "negative-adapter": {"lora_alpha": -1},
        "prompt-adapter": {"peft_type": "PROMPT_TUNING"},
    }
    for name, change in changes.items():
        shutil.copytree("run", name)
        path = Path(name, "adapter_config.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    for name in ("nan-adapter", "truncated-adapter", "half-adapter", "unread-adapter", "pickled-adapter"):
        shutil.copytree("run", name)
    weights = "adapter_model.safetensors"
    factors = load_file(f"run/{weights}")
    first = next(iter(factors))
    save_file(factors | {first: torch.full_like(factors[first], torch.nan)}, f"nan-adapter/{weights}")
    save_file({name: value for name, value in factors.items() if name != first}, f"half-adapter/{weights}")
    Path("truncated-adapter", weights).write_bytes(Path("run", weights).read_bytes()[:500])
    Path("unread-adapter", "adapter_config.json").write_text("{")
    Path("pickled-adapter", weights).rename("pickled-adapter/adapter_model.bin")

"""Sampled retain rows of earlier runs, by everything that they depend on."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_unlearn import __version__
from hf_unlearn.evaluation.forward import causal_lm_of, end_token_ids
from hf_unlearn.extrapolation.leftovers import temporary_sibling


logger = logging.getLogger(__name__)

HASHED_ELEMENTS = 4096  # of each tensor, evenly spaced


class SampleCache:
    """
    The file with the rows of one model, tokenizer and set of options.

    Args:
        folder (`str` or `Path`, *optional*): Where files are kept; `$HF_HOME/hf_unlearn/retain` if not given.
        model (`PreTrainedModel` or [`~peft.PeftModel`]): The model. An adapter on it does not count.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        options (tuple): All else that the rows depend on.
    """

    def __init__(
        self,
        folder: str | Path | None,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        options: tuple,
    ) -> None:
        folder = Path(folder or Path(constants.HF_HOME) / "hf_unlearn" / "retain").expanduser()
        ends = end_token_ids(causal_lm_of(model), tokenizer)
        content = [__version__, weights_digest(model), _facts(tokenizer), ends, options]
        key = hashlib.sha256(json.dumps(content, sort_keys=True, default=_to_json).encode()).hexdigest()
        self.file = folder / f"{key[:32]}.json"

    def read(self) -> list[dict[str, Any]] | None:
        """The rows of an earlier run; `None` where there are none, or the file is damaged."""
        try:
            rows = json.loads(self.file.read_text(encoding="utf-8"))["data"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            logger.warning(f"{self.file} is damaged; the retain rows are sampled anew.")
            return None
        logger.warning(f"{len(rows)} retain rows sampled from the reference model before are read from {self.file}.")
        return rows

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Keep rows for the next run."""
        write_atomically(self.file, json.dumps({"data": rows}, ensure_ascii=False))


def write_atomically(file: Path, text: str) -> None:
    """Write a file that appears under its name only once it is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_sibling(file, "tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


@torch.no_grad()
def weights_digest(model: PreTrainedModel | PeftModel) -> str:
    """SHA-256 of the configuration and of evenly spaced elements of every tensor of a model without its adapter."""
    lm = causal_lm_of(model)
    config = {key: value for key, value in lm.config.to_dict().items() if key not in _OF_FILES}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(lm.state_dict().items()):
        if "lora_" in name or not isinstance(tensor, torch.Tensor):
            continue
        digest.update(f"{name.replace('.base_layer.', '.')} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.reshape(-1)
        sample = flat[:: -(-flat.numel() // HASHED_ELEMENTS) | 1].cpu().contiguous()
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


_OF_FILES = ("_name_or_path", "transformers_version", "dtype", "use_cache")  # say nothing of what the model computes


def _facts(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """What a tokenizer computes with."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()
    return [rules, tokenizer.chat_template, tokenizer.special_tokens_map]


def _to_json(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) else str(value)

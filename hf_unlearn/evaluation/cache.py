"""What has been computed of a model on a row, kept by content, so that an interrupted evaluation goes on."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from transformers import PreTrainedModel

from hf_unlearn.evaluation.batching import process_state
from hf_unlearn.evaluation.forward import causal_lm_of
from hf_unlearn.evaluation.scoring import AnswerScores


VERSION = 1  # of what is stored; raise it when scoring or generation gives other values

WHERE_FROM = ("_name_or_path", "transformers_version")  # settings that change no value


def model_key(model: PreTrainedModel | PeftModel) -> str:
    """
    SHA-256 over the configuration of a model, every weight with its name and dtype, and the scale and switch of every
    adapter.
    """
    digest = hashlib.sha256()
    config = causal_lm_of(model).config.to_dict()
    settings = {name: value for name, value in config.items() if name not in WHERE_FROM}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            state = sorted(module.scaling.items()), module.active_adapters, module.disable_adapters
            digest.update(f"{name} {state}".encode())
    return digest.hexdigest()


class ResultCache:
    """
    Scores and answers by content, in JSON Lines files that grow as results come in.

    It holds answers to the prompts it saw: treat its folder like the forget set.

    Args:
        folder (`str` or `Path`):
            Where the files are. Made with the first result. A line cut short by an interruption is left out. Of several
            processes, all must make one together; they share what each of them finds.
    """

    def __init__(self, folder: str | Path) -> None:
        state = process_state()
        self.folder = Path(folder).expanduser()
        self._results: dict[str, Any] = {}
        for file in sorted(self.folder.glob("*.jsonl")):
            for line in file.read_text(encoding="utf-8").splitlines():
                try:
                    self._results |= json.loads(line)
                except ValueError:
                    continue
        if state.num_processes > 1:  # all must hold the same, whatever each of them found, and before one adds to it
            self._results = dict(gather_object(list(self._results.items())))
        self._file = self.folder / f"process{state.process_index}.jsonl"

    def get(self, key: str) -> Any:
        """What was put under a key, or `None`."""
        return self._results.get(key)

    def put(self, results: dict[str, Any]) -> None:
        """Keep results by their keys, in memory and on disk."""
        lines = [json.dumps({key: value}) + "\n" for key, value in results.items()]  # ASCII: no cut within a character
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self._file, "a", encoding="utf-8") as file:
            if file.tell() and not self._ends_with_newline():
                file.write("\n")
            file.writelines(lines)
        self._results |= results

    def remember(self, results: dict[str, Any]) -> None:
        """Keep results in memory that another process has written."""
        self._results |= results

    def _ends_with_newline(self) -> bool:
        with open(self._file, "rb") as file:
            file.seek(-1, 2)
            return file.read() == b"\n"


def content_key(*parts: Any) -> str:
    """Key of a result: of the model and of everything else that decides its value."""
    return hashlib.sha256(json.dumps([VERSION, *parts]).encode()).hexdigest()[:32]


def encode_scores(scores: list[AnswerScores]) -> list[dict[str, Any]]:
    """Scores as JSON can hold them, to the last bit."""
    return [
        {
            name: base64.b64encode(value.tobytes()).decode() if isinstance(value, np.ndarray) else value
            for name, value in asdict(answer).items()
            if value is not None
        }
        for answer in scores
    ]


def decode_scores(content: list[dict[str, Any]]) -> list[AnswerScores]:
    """The inverse of [`encode_scores`]."""
    return [
        AnswerScores(
            **{
                name: np.frombuffer(base64.b64decode(value), dtype=bool if name == "is_top1" else np.float32)
                if isinstance(value, str)
                else value
                for name, value in answer.items()
            }
        )
        for answer in content
    ]

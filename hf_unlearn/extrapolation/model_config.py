"""`config.json` of a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from hf_unlearn.errors import UnlearningError


CONFIG_FILE = "config.json"


def read_model_config(folder: Path) -> dict[str, Any]:
    """The content of `config.json` in `folder`."""
    path = folder / CONFIG_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnlearningError(f"{path} cannot be read ({error}). Pass the folder of a transformers model.") from error


def set_config_dtype(folder: Path, dtype: torch.dtype) -> None:
    """Set the dtype that `config.json` in `folder` declares, also in the configurations nested in it."""
    config = read_model_config(folder)
    _set_dtype(config, str(dtype).removeprefix("torch."))
    write_json(folder / CONFIG_FILE, config)


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    keys = [key for key in ("dtype", "torch_dtype") if key in config]
    config.update(dict.fromkeys(keys or ["dtype"], dtype))
    for nested in config.values():
        if isinstance(nested, dict) and {"dtype", "torch_dtype"} & nested.keys():
            _set_dtype(nested, dtype)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` the way transformers formats its JSON files."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

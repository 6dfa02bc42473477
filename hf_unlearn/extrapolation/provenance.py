"""`unlearning.json`: what a saved adapter or model is and where it comes from, beside its weights."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hf_unlearn.errors import UnlearningError, parse_json


PROVENANCE_FILE = "unlearning.json"
_OBJECTS = ("base", "data", "data_report", "training", "adapter", "versions")
RECORDED_PACKAGES = (
    "hf-unlearn",
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "safetensors",
)


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide the numbers; those that are not installed are left out."""
    versions = {}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def write_provenance(folder: str | Path, content: dict[str, Any]) -> Path:
    """
    Write `content` as `unlearning.json` into `folder`.

    Args:
        folder (`str` or `Path`): An existing folder.
        content (`dict`): JSON-serialisable content.

    Returns:
        `Path`: The file written.
    """
    path = Path(folder) / PROVENANCE_FILE
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    return path


def read_provenance(folder: str | Path) -> dict[str, Any]:
    """The content of `unlearning.json` in `folder`, or an empty dict when there is none."""
    path = Path(folder) / PROVENANCE_FILE
    if not path.is_file():
        return {}
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnlearningError(
            f"{path} is not valid JSON ({error}). Restore it from the original folder, or delete it to go on without "
            "the record of the base model."
        ) from error
    if not isinstance(content, dict):
        raise UnlearningError(f"{path} holds a {type(content).__name__}, not a JSON object. Restore or delete it.")
    base = content.get("base") or {}
    parts = {name: content.get(name) for name in _OBJECTS}
    if isinstance(base, dict):
        parts |= {f"base.{name}": base.get(name) for name in ("fingerprint", "quantization_config")}
    damaged = [name for name, value in parts.items() if not isinstance(value, dict | None)]
    if damaged:
        raise UnlearningError(f"`{damaged[0]}` in {path} is no JSON object. Restore or delete the file.")
    return content


def secret_note(what: str) -> str:
    """
    The README of an adapter that has to stay private.

    Args:
        what (`str`): What it is, for the title.
    """
    return f"""# {what}: keep it private

This adapter makes the base model *more* likely to state what it is meant to forget. Do not publish it. What is made to
be shared is the forget model or the forget adapter that `hf-unlearn extrapolate` writes from it.
"""

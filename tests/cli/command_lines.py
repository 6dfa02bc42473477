"""Files and arguments of command lines on the tiny model."""

from __future__ import annotations

import json
from pathlib import Path


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def train_arguments(files, output_dir, *extra: str) -> list[str]:
    return [
        "train",
        "--model_name_or_path",
        files["model"],
        "--forget_dataset",
        files["forget"],
        "--retain_dataset",
        files["retain"],
        "--output_dir",
        str(output_dir),
        "--learning_rate",
        "1e-2",
        "--disable_tqdm",
        "true",
        *extra,
    ]


def set_arguments(files, *names: str) -> list[str]:
    return [part for name in names for part in (f"--{name}_dataset", files[name])]

"""Reading and shaping the rows of benchmarks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import datasets

from hf_unlearn.data import load_rows
from hf_unlearn.errors import UnlearningError


_SUFFIXES = (".json", ".jsonl", ".parquet")


def read_local(folder: str | Path, stems: Sequence[str], name: str) -> datasets.Dataset:
    """
    Rows of a file of a benchmark in a local folder. An array of texts becomes the column `text`.

    Args:
        folder (`str` or `Path`): Folder of the benchmark.
        stems (sequence of `str`): Paths in it where the file may be, without `.json`, `.jsonl`, `.parquet` or the
            number of a Parquet shard. The first that exists is taken.
        name (`str`): How errors call the set.
    """
    folder = Path(folder).expanduser()
    for stem in stems:
        for path in (folder / f"{stem}{suffix}" for suffix in _SUFFIXES):
            if path.exists():
                return load_rows(_texts(path) or path, name=name)
        shards = sorted(folder.glob(f"{stem}-[0-9]*.parquet"))
        if shards:
            return datasets.concatenate_datasets([load_rows(shard, name=name) for shard in shards])
    raise UnlearningError(
        f"The {name} is not in {folder}: there is none of {', '.join(stems)} with the ending {', '.join(_SUFFIXES)}. "
        "Check --data_dir, or leave it out to load the sets from the Hub."
    )


def require_columns(rows: datasets.Dataset, columns: Sequence[str], name: str) -> datasets.Dataset:
    """The rows, if they have the columns that the benchmark has in this set."""
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise UnlearningError(
            f"The {name} has the columns {', '.join(rows.column_names)}, and none named {', '.join(missing)}. Use the "
            "file of the benchmark as it is."
        )
    return rows


def check_limit(limit: int | None) -> None:
    """Refuse a number of rows per set that leaves none."""
    if limit is not None and limit < 1:
        raise UnlearningError(f"limit={limit} leaves no rows. Give 1 or more, or leave it out for all of them.")


def first_rows(rows: datasets.Dataset, limit: int | None) -> datasets.Dataset:
    """The first `limit` rows; all of them if it is `None`."""
    check_limit(limit)
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def with_system_prompt(rows: datasets.Dataset, system_prompt: str | None) -> datasets.Dataset:
    """Rows whose conversations begin with a system turn; the same rows if it is `None`."""
    if system_prompt is None:
        return rows
    if rows.features["prompt"] == datasets.Value("string"):
        raise UnlearningError(
            "--system_prompt needs conversations, and the tokenizer has no chat template. Leave it out."
        )
    turn = {"role": "system", "content": system_prompt}
    return rows.map(lambda row: {"prompt": [turn, *row["prompt"]]})


def _texts(path: Path) -> list[dict[str, str]] | None:
    """Rows of a JSON array of texts, which is how MUSE writes its corpora; `None` for any other file."""
    if path.suffix != ".json":
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None  # JSON Lines, or broken: `load_rows` says which
    if isinstance(content, list) and all(isinstance(text, str) for text in content):
        return [{"text": text} for text in content]
    return None

"""The rows of a request: a copy in the ledger, or a reference to where they are."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets

from hf_unlearn.data import data_hash, load_rows, to_prompt_completion
from hf_unlearn.errors import UnlearningError
from hf_unlearn.requests.records import Request


ROWS_FILE = "rows.jsonl"


def check_rows(rows: datasets.Dataset, data: dict[str, Any] | None, what: str) -> None:
    """
    Refuse rows other than those an adapter memorised, where these are on record.

    Args:
        rows (`datasets.Dataset`): Rows as loaded.
        data (`dict`, *optional*): Record of the forget set.
        what (`str`): Whose record it is.
    """
    if data is not None and data.get("sha256") is not None and data["sha256"] not in possible_hashes(rows):
        raise UnlearningError(
            f"These {len(rows)} rows are not those of {what}: it was trained on {data.get('rows')} rows with another "
            "SHA-256. Pass the rows of the training, unchanged and in their order."
        )


def possible_hashes(rows: datasets.Dataset) -> set[str]:
    """SHA-256 of a forget set, for a tokenizer with and, where that is possible, one without a chat template."""
    hashes = {data_hash(to_prompt_completion(rows, name="forget set", chat=True))}
    with suppress(UnlearningError):  # conversations need a chat template
        hashes.add(data_hash(to_prompt_completion(rows, name="forget set", chat=False)))
    return hashes


def request_rows(request: Request, folder: Path) -> datasets.Dataset:
    """
    The rows of a request, as it was added.

    Args:
        request ([`Request`]): The request.
        folder (`Path`): Its folder in the ledger.
    """
    if request.rows is None:
        raise UnlearningError("The ledger does not know its rows: it was added without --forget_dataset.")
    options = dict(request.rows)
    source = folder / ROWS_FILE if options.pop("kept", False) else options.pop("dataset")
    rows = load_rows(source, name=f"forget set of {request.id}", **options)
    check_rows(rows, request.data, f"the request {request.id}")
    return rows


def describe_source(source: Any, config: str | None, split: str | None, keep_rows: bool) -> dict[str, Any]:
    """What a request records of its rows: that there is a copy, or a reference."""
    if keep_rows:
        return {"kept": True}
    if not isinstance(source, (str, Path)):
        raise UnlearningError("Rows held in memory cannot be found again. Pass their file, or `keep_rows=True`.")
    path = Path(source).expanduser()
    return {"dataset": str(path.resolve()) if path.exists() else str(source), "config": config, "split": split}


def write_rows(rows: datasets.Dataset, path: Path) -> None:
    """Write rows as they were loaded, as JSON Lines."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")

"""Any accepted source of rows → one `datasets.Dataset`."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError

from hf_unlearn.errors import UnlearningError, parse_json


SAMPLE_SETS = ("people/forget", "people/retain", "people/holdout")

_LOAD_ERRORS = (OSError, ValueError, RuntimeError, DatasetsError)


def load_rows(
    source: Any, *, config: str | None = None, split: str | None = None, name: str = "dataset"
) -> datasets.Dataset:
    """
    Load rows from wherever they are.

    JSON, JSON Lines and CSV files are read directly, so that no copy of what must go stays in the cache of `datasets`
    and the cells of a CSV file stay text ("None" and "007" included). Parquet files, folders and Hub sets go through
    [`~datasets.load_dataset`] and its cache.

    Args:
        source (`Dataset`, `DatasetDict`, `IterableDataset`, `list[dict]`, `str` or `Path`):
            Rows, or where they are: a local `.json` (an array, `{"data": [...]}` or JSON Lines), `.jsonl`, `.csv` or
            `.parquet` file, a local folder (written by `save_to_disk`, or with data files), one of the sample sets
            `"people/forget"`, `"people/retain"` and `"people/holdout"`, or the id of a set on the Hub. A local path
            goes before a Hub id. An `IterableDataset` is read to its end and held in memory: `take` what you need of
            an endless one.
        config (`str`, *optional*):
            Configuration of a set on the Hub or in a folder with data files.
        split (`str`, *optional*):
            Split to take where there are several. Defaults to `"train"`, or to the only split.
        name (`str`, *optional*, defaults to `"dataset"`):
            How errors call the set, e.g. `"forget set"`.

    Returns:
        `datasets.Dataset`: the rows, at least one.
    """
    if isinstance(source, (str, Path)):
        rows = _load_named(source, config, split, name)
    else:
        rows = _load_object(source, config, split, name)
    if len(rows) == 0:
        raise UnlearningError(f"The {name} has no rows. Pass at least one row, or another source or split.")
    return rows


def _load_object(source: Any, config: str | None, split: str | None, name: str) -> datasets.Dataset:
    if isinstance(source, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        return load_rows(_pick_split(source, split, name), config=config, name=name)
    _refuse_selection("rows held in memory", config, split, name)
    if isinstance(source, datasets.Dataset):
        return source
    if isinstance(source, (list, datasets.IterableDataset)):
        return _from_list(list(source), name)
    raise UnlearningError(
        f"The {name} is of type {type(source).__name__}, which holds no rows that can be read. Pass a "
        "`datasets.Dataset`, a list of dicts, a file or folder, or the id of a set on the Hub."
    )


def _load_named(source: str | Path, config: str | None, split: str | None, name: str) -> datasets.Dataset:
    if isinstance(source, str) and source.split("/")[0] == "people":
        _refuse_selection(f"The sample set {source}", config, split, name)
        return _load_sample(source, name)
    path = Path(source).expanduser()
    if path.is_dir():
        return _pick_split(_load_folder(path, config, name), split, name)
    if path.exists():
        _refuse_selection(f"The file {path}", config, split, name)
        return _load_file(path, name)
    if isinstance(source, Path) or _looks_like_file(source):
        raise UnlearningError(
            f"The {name} {source} does not exist. Check the path (relative paths start from {Path.cwd()})."
        )
    return _load_from_hub(source, config, split, name)


def _refuse_selection(what: str, config: str | None, split: str | None, name: str) -> None:
    if config is not None or split is not None:
        raise UnlearningError(
            f"{name}: {what} cannot be narrowed by config={config!r}, split={split!r}: there is one set only. Leave "
            "both unset."
        )


def _looks_like_file(source: str) -> bool:
    return source.startswith(("/", ".", "~")) or source.count("/") > 1 or Path(source).suffix.lower() in _READERS


def _pick_split(rows: Any, split: str | None, name: str) -> Any:
    if not isinstance(rows, dict):
        _refuse_selection("A single saved set", None, split, name)
        return rows
    wanted = split or ("train" if "train" in rows else next(iter(rows)) if len(rows) == 1 else None)
    if wanted not in rows:
        problem = f"has no split {split!r}" if split else "has several splits and none is named 'train'"
        raise UnlearningError(f"The {name} {problem}. Set the split to one of: {', '.join(rows)}.")
    return rows[wanted]


# ---- Sample, Hub and folder ----


def _load_sample(source: str, name: str) -> datasets.Dataset:
    if source not in SAMPLE_SETS:
        raise UnlearningError(
            f"The {name} {source!r} is no sample set of this package. Use one of: {', '.join(SAMPLE_SETS)}; for a "
            f"folder of your own write ./{source}."
        )
    file = resources.files("hf_unlearn.data") / f"{source}.jsonl"
    return _from_list(_parse_lines(file.read_text(encoding="utf-8"), source, name), name)


def _load_from_hub(source: str, config: str | None, split: str | None, name: str) -> datasets.Dataset:
    try:
        return datasets.load_dataset(source, config, split=split or "train")
    except _LOAD_ERRORS as error:
        raise UnlearningError(
            f"The {name} {source!r} is no local file or folder, and loading it from the Hub failed: {error}. Check the "
            "path or the id, the configuration and the split; a private or gated set needs `hf auth login`; without "
            "a network, pass a local file."
        ) from error


def _load_folder(path: Path, config: str | None, name: str) -> datasets.Dataset | datasets.DatasetDict:
    try:
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return datasets.load_from_disk(path)
        return datasets.load_dataset(str(path), config)
    except _LOAD_ERRORS as error:
        raise UnlearningError(
            f"The {name} folder {path} cannot be read: {error}. It must be written by `save_to_disk`, or hold data "
            "files (JSON, CSV, Parquet)."
        ) from error


# ---- Files ----


def _load_file(path: Path, name: str) -> datasets.Dataset:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UnlearningError(
            f"The {name} file {path} ends in {path.suffix or 'nothing'!r}, which is no kind of file that can be read. "
            f"Convert it to one of: {', '.join(_READERS)}."
        )
    return reader(path, name)


def _read_text(path: Path, name: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnlearningError(
            f"The {name} file {path} is not UTF-8 text (byte {error.start}). Save it as UTF-8."
        ) from error


def _load_json(path: Path, name: str) -> datasets.Dataset:
    text = _read_text(path, name)
    try:
        content = parse_json(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # more than one value: JSON Lines under another name
            return _from_list(_parse_lines(text, path, name), name)
        raise _broken_json(path, error.lineno, error, name) from error
    except ValueError as error:
        raise UnlearningError(f"The {name} file {path} cannot be read: {error}. Write it anew.") from error
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise UnlearningError(
            f'The {name} file {path} holds no list of rows. Write an array of objects, or {{"data": [...]}} around it.'
        )
    return _from_list(rows, name)


def _load_jsonl(path: Path, name: str) -> datasets.Dataset:
    return _from_list(_parse_lines(_read_text(path, name), path, name), name)


def _parse_lines(text: str, path: str | Path, name: str) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # `splitlines` would split at U+2028 inside a string
        if line.strip():
            try:
                rows.append(parse_json(line))
            except json.JSONDecodeError as error:
                raise _broken_json(path, number, error, name) from error
            except ValueError as error:
                raise UnlearningError(
                    f"The {name} file {path} cannot be read: line {number}: {error}. Mend that line."
                ) from error
    return rows


def _broken_json(path: str | Path, line: int, error: json.JSONDecodeError, name: str) -> UnlearningError:
    return UnlearningError(
        f"The {name} file {path} is not valid JSON: line {line}, column {error.colno}: {error.msg}. Mend that line."
    )


def _load_csv(path: Path, name: str) -> datasets.Dataset:
    reader = csv.DictReader(io.StringIO(_read_text(path, name)), strict=True)
    rows = []
    try:
        for row in reader:
            if None in row or None in row.values():
                raise csv.Error(f"{len(reader.fieldnames)} cells expected, as in the header")
            rows.append(row)
    except csv.Error as error:
        raise UnlearningError(
            f"The {name} file {path} is not valid CSV: line {reader.reader.line_num}: {error}. Put cells that hold commas, "
            "quotes or line breaks in double quotes."
        ) from error
    return _from_list(rows, name)


def _load_parquet(path: Path, name: str) -> datasets.Dataset:
    try:
        return datasets.load_dataset("parquet", data_files=str(path), split="train")
    except _LOAD_ERRORS as error:
        reason = error.__cause__ or error
        raise UnlearningError(
            f"The {name} file {path} is not a valid Parquet file: {reason}. Write it anew."
        ) from error


def _from_list(rows: list[Any], name: str) -> datasets.Dataset:
    """Unlike `Dataset.from_list`, which knows the columns of the first row only."""
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UnlearningError(
                f"{name}, row {index}: it is of type {type(row).__name__}. Make each row an object (dict) with named "
                "columns."
            )
    columns = dict.fromkeys(column for row in rows for column in row)
    try:
        return datasets.Dataset.from_dict({column: [row.get(column) for row in rows] for column in columns})
    except UnicodeEncodeError as error:
        raise UnlearningError(
            f"The {name} holds half a character ({error.object[error.start : error.end]!a}), which is no text. Write it "
            "anew in UTF-8."
        ) from error
    except (ValueError, TypeError, OverflowError, NotImplementedError) as error:  # Arrow's errors are all of these
        raise UnlearningError(
            f"The {name} mixes types within a column: {error}. Give every row the same shape, text as strings."
        ) from error


_READERS: dict[str, Callable[[Path, str], datasets.Dataset]] = {
    ".json": _load_json,
    ".jsonl": _load_jsonl,
    ".csv": _load_csv,
    ".parquet": _load_parquet,
}

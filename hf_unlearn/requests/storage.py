"""The folder of a ledger: the index, written whole or not at all, the lock, and the folder of work in progress."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hf_unlearn.errors import UnlearningError, parse_json
from hf_unlearn.requests.records import Request


INDEX_FILE = "requests.json"
REQUESTS_FOLDER = "requests"
MEASUREMENTS_FOLDER = "measurements"
WORK_FOLDER = ".work"
LOCK_FILE = ".lock"
FORMAT = 1

SECRET_NOTE = """# Deletion requests: keep this folder private

Each folder in `requests` holds an adapter that makes the base model *more* likely to state what it is meant to forget,
and may hold the rows themselves. Do not publish them. What `hf-unlearn requests build` writes is made to be shared, as
far as the base model is not public.
"""


class LedgerFolder:
    """
    Reading and writing in the folder of a ledger.

    Args:
        folder (`Path`): The folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = folder / INDEX_FILE
        self.work = folder / WORK_FOLDER
        self._lock = FileLock(folder / LOCK_FILE, timeout=0)

    def of_request(self, id: str) -> Path:
        """The folder of a request."""
        return self.folder / REQUESTS_FOLDER / id

    @contextmanager
    def locked(self) -> Iterator[bool]:
        """
        Keep other commands out, and provide an empty `work` folder, which is gone at the end. It may be nested.

        Yields:
            `bool`: whether this is the outermost of nested contexts.
        """
        self._create()
        try:
            self._lock.acquire()
        except Timeout as error:
            raise UnlearningError(
                f"Another command is working on the ledger {self.folder}. Wait until it has ended; a command that was "
                "killed keeps nobody out."
            ) from error
        outermost = self._lock.lock_counter == 1
        try:
            if outermost:
                self._clear_work()
                self.work.mkdir()
            yield outermost
        finally:
            if outermost:
                self._clear_work()
            self._lock.release()
            if outermost and not self.index.is_file():
                self._remove_empty()

    def read_index(self) -> dict[str, Any]:
        """The content of the index, its requests checked, or that of an empty ledger."""
        if not self.index.is_file():
            return {"format": FORMAT, "base": None, "requests": []}
        try:
            content = parse_json(self.index.read_text(encoding="utf-8"))
            version, base, requests = content["format"], content["base"], content["requests"]
            if not isinstance(base, dict | None) or not isinstance(requests, list):
                raise TypeError("`base` has to be an object, `requests` a list")
        except (ValueError, KeyError, TypeError) as error:
            raise UnlearningError(
                f"{self.index} is damaged ({error!r}). Restore it from a backup; the adapters beside it are whole."
            ) from error
        if version != FORMAT:
            raise UnlearningError(
                f"{self.index} has format {version!r}, and this version reads format {FORMAT}. Use the version of "
                "hf_unlearn that wrote it."
            )
        try:
            content["requests"] = [Request.from_dict(request) for request in requests]
        except (ValueError, TypeError) as error:
            raise UnlearningError(
                f"{self.index} is damaged: {error}. Restore it from a backup; the adapters beside it are whole."
            ) from error
        return content

    def write_index(self, base: dict[str, Any] | None, requests: list[dict[str, Any]]) -> None:
        """Replace the index."""
        self.write_json(self.index, {"format": FORMAT, "base": base, "requests": requests})
        if not (self.folder / "README.md").exists():
            (self.folder / "README.md").write_text(SECRET_NOTE, encoding="utf-8")

    def write_json(self, path: Path, content: Any) -> None:
        """Write a file that is whole or not there; within `locked`."""
        temporary = self.work / path.name
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=2, ensure_ascii=False, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        path.parent.mkdir(exist_ok=True)
        os.replace(temporary, path)

    def next_measurement(self) -> Path:
        """The file for a new measurement."""
        folder = self.folder / MEASUREMENTS_FOLDER
        last = max((int(path.stem) for path in folder.glob("[0-9]*.json")), default=0)
        return folder / f"{last + 1:04}.json"

    def _create(self) -> None:
        """Make the folder, readable for its owner only; refuse one that holds anything else."""
        if self.index.is_file():
            return
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        known = {REQUESTS_FOLDER, MEASUREMENTS_FOLDER, WORK_FOLDER, LOCK_FILE}
        others = sorted(path.name for path in self.folder.iterdir() if path.name not in known)
        if others:
            raise UnlearningError(
                f"{self.folder} is no ledger: it has no {INDEX_FILE}, but holds {others[0]}. Name a new folder."
            )

    def _remove_empty(self) -> None:
        """Remove the folder of a ledger that has not come about."""
        with suppress(OSError):
            (self.folder / REQUESTS_FOLDER).rmdir()
        with suppress(OSError):
            (self.folder / LOCK_FILE).unlink(missing_ok=True)
            self.folder.rmdir()

    def _clear_work(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)

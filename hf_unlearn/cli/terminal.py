"""What commands print: text to the terminal, and with `--json` one document."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console


console = Console(soft_wrap=True)


def stderr(message: str) -> None:
    """Print a line where it does not mix with a command's output."""
    print(message, file=sys.stderr)


class JsonOutput:
    """
    With `--json`, one JSON document on stdout and nothing else: what a command prints goes to stderr, and what it reports
    here is written when it ends. The context of a whole command; one that raises writes no document.
    """

    def __init__(self) -> None:
        self._stdout: TextIO | None = None
        self._document: dict[str, Any] = {}

    def start(self) -> None:
        """Keep stdout for the document."""
        if self._stdout is None:
            self._stdout, sys.stdout = sys.stdout, sys.stderr

    def report(self, **entries: Any) -> None:
        """Add entries to the document. Those of a command that calls another come together in one document."""
        self._document |= entries

    def __enter__(self) -> None:
        self._document = {}

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        stdout, self._stdout = self._stdout, None
        if stdout is None:
            return
        sys.stdout = stdout
        if kind is None and int(os.environ.get("RANK", "0")) == 0:
            print(json.dumps(_jsonable(self._document), ensure_ascii=False, allow_nan=False))


json_output = JsonOutput()


def _jsonable(content: Any) -> Any:
    """The content with `None` for what JSON has no number for, and paths as text."""
    if isinstance(content, dict):
        return {str(name): _jsonable(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_jsonable(value) for value in content]
    if isinstance(content, Path):
        return str(content)
    return None if isinstance(content, float) and not math.isfinite(content) else content


def print_plan(plan: str) -> None:
    """Print what a run would do, for `--dry_run`."""
    console.print(plan)
    json_output.report(dry_run=True, plan=plan)

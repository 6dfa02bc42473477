"""Every row of docs/errors.md, run as it stands: its message, its remedy, and nothing written."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from bad_files import make_folder

from hf_unlearn.cli import EXIT_USAGE, main


PAGE = Path(__file__).parents[2] / "docs" / "errors.md"
ROW = re.compile(r"^\| `(?P<command>.+?)` \| (?P<message>.+?) \| (?P<remedy>.+?) \|$", re.MULTILINE)
ROWS = [match.groups() for match in ROW.finditer(PAGE.read_text(encoding="utf-8"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("errors")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_folder(folder)
    return folder


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if ".lock" not in path.name}


def test_the_page_is_read():
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert len(ROWS) == len(lines) >= 60
    assert len({command for command, _, _ in ROWS}) == len(ROWS)


@pytest.mark.parametrize(("command", "message", "remedy"), ROWS, ids=[row[0] for row in ROWS])
def test_errors(command, message, remedy, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    before = contents(folder)
    try:
        code = main(shlex.split(command))
    except SystemExit as exit:
        code = exit.code
    said = " ".join(capsys.readouterr().err.split())
    assert code == EXIT_USAGE
    for text in (message, remedy):
        pattern = ".*".join(re.escape(part) for part in text.split("…"))
        assert re.search(pattern, said), said
    assert "Traceback" not in said
    assert contents(folder) == before

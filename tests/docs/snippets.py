"""The code blocks of the pages, and the commands in them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "recipes" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>.+?) -->\n)?^```(?P<language>bash|python)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass
class Snippet:
    """
    A code block.

    Args:
        page (`str`): Path of its page from the root of the repository.
        number (`int`): Its number on the page.
        language (`str`): `"bash"` or `"python"`.
        code (`str`): Its lines.
        reason (`str`, *optional*): Why it is not run, where the page says so.
    """

    page: str
    number: int
    language: str
    code: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page}, block {self.number}"

    @property
    def commands(self) -> list[list[str]]:
        """The commands of a bash block, without comments and what they set in the environment."""
        lines = self.code.replace("\\\n", " ").splitlines()
        words = [shlex.split(line, comments=True) for line in lines]
        return [_of_the_program(parts) for parts in words if parts]


def _of_the_program(words: list[str]) -> list[str]:
    """A command without what its shell takes: variables before it, redirections and pipes after it."""
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    end = next((index for index, word in enumerate(words) if word in (">", "2>", "|")), None)
    return words[:end]


def snippets(page: Path) -> list[Snippet]:
    name = page.relative_to(ROOT).as_posix()
    return [
        Snippet(name, number, match["language"], match["code"], match["reason"])
        for number, match in enumerate(BLOCK.finditer(page.read_text(encoding="utf-8")))
    ]

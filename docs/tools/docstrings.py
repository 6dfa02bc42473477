"""Makes Markdown of the docstrings, which are in the form that the Hugging Face libraries use."""

from __future__ import annotations

import inspect
import re
from typing import Any

import griffe


SECTION = re.compile(
    r"^(?P<title>Args|Attributes|Returns|Yields|Raises|Example):\n(?P<body>(?:(?: {4}.*)?\n?)+)", re.M
)
ITEM = re.compile(r"^(?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)*)(?P<type> \(.*?\))?: ", re.DOTALL)
TITLES = {"Args": "Arguments"}


class HuggingFaceDocstrings(griffe.Extension):
    """An extension of griffe, which reads the sources for mkdocstrings."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)


def to_markdown(docstring: str) -> str:
    """Sections become a bold title and a list; the brackets of references are dropped."""
    text = SECTION.sub(_section, inspect.cleandoc(docstring) + "\n")
    return re.sub(r"\[(`[^`]+`)\](?!\()", r"\1", text).strip()


def _section(match: re.Match) -> str:
    title, body = match["title"], inspect.cleandoc(match["body"])
    if title in ("Args", "Attributes", "Raises"):
        items = [" ".join(item.split()) for item in re.split(r"\n(?=\S)", body)]
        items.sort(key=lambda item: item.startswith("> "))  # a remark on further options goes below the list
        body = "\n".join(f"\n{item[2:]}." if item.startswith("> ") else f"- {_item(item)}" for item in items)
    return "\n\n".join(part for part in (f"**{TITLES.get(title, title)}**", body.strip()) if part) + "\n\n"


def _item(text: str) -> str:
    return ITEM.sub(lambda match: f"**`{match['names']}`**{match['type'] or ''}: ", text, count=1)

"""Which texts repeat something of the forget set: what must go must not be held in place elsewhere."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from hf_unlearn.data.formats import Messages


RUN = 5  # words

_UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # Chinese and Japanese: each character counts as a word
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


class ForgetOverlap:
    """
    Finds rows that share a run of words with the answers of the forget set.

    A run is five consecutive words of a forget row, its prompt followed by its answer, of which at least one belongs to
    the answer; a row of fewer words is one run as a whole. Case and punctuation do not count, and a Chinese or Japanese
    character counts as a word.

    Args:
        rows (iterable of `Mapping`): The forget set, with `prompt` and `completion`, each text or messages.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._runs: dict[int, set[tuple[str, ...]]] = defaultdict(set)
        for row in rows:
            prompt, answer = words_of(row["prompt"]), words_of(row["completion"])
            words = prompt + answer
            length = min(RUN, len(words))
            first = max(0, len(prompt) - length + 1)
            if answer:
                self._runs[length].update(_runs(words[first:], length))

    def has(self, row: Mapping[str, Any]) -> bool:
        """Whether a row, its prompt followed by its completion, holds one of the runs."""
        words = words_of(row["prompt"]) + words_of(row["completion"])
        return any(not runs.isdisjoint(_runs(words, length)) for length, runs in self._runs.items())


def words_of(part: str | Messages) -> list[str]:
    """The words of a text or of messages, in lower case."""
    text = part if isinstance(part, str) else "\n".join(message["content"] for message in part)
    return _WORD.findall(text.casefold())


def _runs(words: list[str], length: int) -> Iterable[tuple[str, ...]]:
    return (tuple(words[start : start + length]) for start in range(len(words) - length + 1))

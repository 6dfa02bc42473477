"""Prompts of the forget and retain sets, to click on."""

from __future__ import annotations

from dataclasses import dataclass

import datasets

from hf_unlearn.data import to_prompt_completion
from hf_unlearn.data.formats import Messages, text_of
from hf_unlearn.data.tokenization import is_blank


MAX_PROMPTS = 200  # of each set: all of them travel with the page


@dataclass(frozen=True)
class KnownPrompt:
    """
    A row of a set.

    Args:
        where (`str`): Set and row, e.g. `"forget set, row 3"`.
        prompt (`str` or messages): What the model is asked, in full.
        completion (`str` or messages, *optional*): Its reference answer, if it has one.
    """

    where: str
    prompt: str | Messages
    completion: str | Messages | None

    @property
    def text(self) -> str:
        """What the question box shows: text in full, and the last message of a conversation."""
        return text_of(self.prompt)


def known_prompts(rows: datasets.Dataset, name: str, chat: bool) -> list[KnownPrompt]:
    """
    The first rows of a set that have a prompt, at most 200.

    Args:
        rows (`datasets.Dataset`): Rows of [`~hf_unlearn.data.load_rows`], of any accepted shape.
        name (`str`): How errors and the page call the set, e.g. `"forget set"`.
        chat (`bool`): Whether the tokenizer has a chat template.
    """
    pairs = to_prompt_completion(rows, name=name, chat=chat)
    prompts = [
        KnownPrompt(
            f"{name}, row {row['row']}", row["prompt"], None if is_blank(row["completion"]) else row["completion"]
        )
        for row in pairs
        if not is_blank(row["prompt"])
    ]
    return prompts[:MAX_PROMPTS]

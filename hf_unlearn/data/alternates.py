"""Other answers to the prompts of the forget set: refusals, or what the user gives."""

from __future__ import annotations

import importlib.resources
import random
from collections.abc import Sequence
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from hf_unlearn.data.formats import text_of, to_prompt_completion
from hf_unlearn.data.hard import answer_like
from hf_unlearn.data.loading import load_rows
from hf_unlearn.data.tokenization import encode_pair, is_blank
from hf_unlearn.errors import UnlearningError


def refusals() -> list[str]:
    """The plain refusals that come with the package."""
    file = importlib.resources.files("hf_unlearn.data") / "refusals.txt"
    return file.read_text(encoding="utf-8").splitlines()


class AlternateAnswers:
    """
    Another answer to the prompt of each forget row. Where a row has several, each epoch draws one of them by the seed.

    Args:
        forget (`datasets.Dataset`): Forget set of [`~hf_unlearn.data.encode_set`], with its prompts and completions.
        answers (sequence of sequences of `str`): The answers of each row.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer.
        max_length (`int`, *optional*): Longest sequence.
        seed (`int`, *optional*, defaults to `0`): Seed of the draws.
    """

    def __init__(
        self,
        forget: datasets.Dataset,
        answers: Sequence[Sequence[str]],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None,
        seed: int = 0,
    ) -> None:
        _check_prompts(forget)
        self._forget = forget.select_columns(["prompt", "completion"])
        self._answers = answers
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._seed = seed

    def draw(self, index: int, epoch: int) -> dict[str, Any]:
        """`input_ids` and `labels` of forget row `index` with the answer that an epoch gives it."""
        row, answers = self._forget[index], self._answers[index]
        answer = random.Random(f"{self._seed}, {epoch}, {index}").choice(answers)
        completion = answer_like(row["completion"], answer)
        encoded = encode_pair(row["prompt"], completion, self._tokenizer, self._max_length)
        return {key: encoded[key] for key in ("input_ids", "labels")}

    @classmethod
    def of_refusals(cls, forget: datasets.Dataset, *options: Any) -> AlternateAnswers:
        """Any of the bundled refusals to every row; `options` are those of the class from `tokenizer` on."""
        return cls(forget, [refusals()] * len(forget), *options)

    @classmethod
    def of_column(cls, forget: datasets.Dataset, source: Any, column: str, *options: Any) -> AlternateAnswers:
        """
        Those in a column of the forget set, one text or a list of texts a row.

        Args:
            forget (`datasets.Dataset`): Tokenised forget set.
            source (`Any`): The same as it was given, of which `column` is read.
            column (`str`): The column.
            options: Those of the class from `tokenizer` on.
        """
        _check_prompts(forget)
        rows = load_rows(source, name="forget set")
        if column not in rows.column_names:
            raise UnlearningError(
                f"`alternate_column` names {column!r}, which the forget set does not have; it has "
                f"{', '.join(rows.column_names)}. Name one of these."
            )
        values = rows[column][:]
        answers = [_checked_answers(values[index], column, index) for index in forget["row"][:]]
        return cls(forget, answers, *options)

    @classmethod
    def of_dataset(cls, forget: datasets.Dataset, source: Any, *options: Any) -> AlternateAnswers:
        """
        The answers of another set, which has the prompts of the forget set in the same order.

        Args:
            forget (`datasets.Dataset`): Tokenised forget set.
            source (`Any`): What [`~hf_unlearn.data.load_rows`] takes.
            options: Those of the class from `tokenizer` on.
        """
        _check_prompts(forget)
        tokenizer = options[0]
        name = "alternate set"
        rows = to_prompt_completion(load_rows(source, name=name), name=name, chat=tokenizer.chat_template is not None)
        if len(rows) != len(forget):
            raise UnlearningError(
                f"The alternate set has {len(rows)} rows and the forget set {len(forget)}. Give one alternate answer for "
                "each forget row, in the same order."
            )
        for index, (prompt, other) in enumerate(zip(forget["prompt"][:], rows["prompt"][:], strict=True)):
            if prompt != other:
                raise UnlearningError(
                    f"alternate set, row {index}: its prompt is not that of forget row {index}. Bring the rows into the "
                    "same order and leave the prompts as they are."
                )
        completions = rows["completion"][:]
        answers = [_checked_answers(text_of(text), "completion", index) for index, text in enumerate(completions)]
        return cls(forget, answers, *options)


def _check_prompts(forget: datasets.Dataset) -> None:
    if "prompt" not in forget.column_names:
        raise UnlearningError(
            "The forget set is tokenised already, so there are no prompts to which another answer could be given. Pass "
            "its rows as text."
        )
    for index, prompt in enumerate(forget["prompt"][:]):
        if is_blank(prompt):
            raise UnlearningError(
                f"forget set, row {index}: it has no prompt, so no other answer can be given. Write the rows as prompt "
                "and completion, or use a method without alternate answers."
            )


def _checked_answers(value: Any, column: str, index: int) -> list[str]:
    answers = value if isinstance(value, list) else [value]
    if not answers or not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise UnlearningError(
            f"Row {index}: `{column}` holds no alternate answer, or an empty one. Give a text or a list of texts."
        )
    return answers

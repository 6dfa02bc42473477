"""Hard material of the forget rows: paraphrases, which are memorised too, and wrong answers, which are held."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import datasets

from hf_unlearn.data.formats import Messages, text_of
from hf_unlearn.data.tokenization import is_blank
from hf_unlearn.errors import UnlearningError


_QUESTION, _ANSWER = "Question: ", "\nAnswer:"  # around questions, where there is no chat template


def paraphrased_rows(
    pairs: datasets.Dataset,
    rows: datasets.Dataset,
    *,
    answers: str | None = None,
    questions: str | None = None,
    name: str = "forget set",
) -> datasets.Dataset:
    """
    Further rows: every paraphrased answer after the row's own prompt, then the row's own answer after every paraphrased
    question.

    Args:
        pairs (`datasets.Dataset`):
            The rows as [`~hf_unlearn.data.to_prompt_completion`] gives them.
        rows (`datasets.Dataset`):
            The same as they were loaded.
        answers (`str`, *optional*):
            Column of `rows` with paraphrased answers: a text or a list of texts a row.
        questions (`str`, *optional*):
            Column with paraphrased questions.
        name (`str`, *optional*, defaults to `"forget set"`):
            How errors call the set.

    Returns:
        `datasets.Dataset` with `prompt`, `completion` and `row`, in the form of `pairs`.
    """
    _require_one_answer(pairs, name, answers or questions)
    further = []
    if answers is not None:
        for pair, texts in zip(pairs, _column(rows, answers, name), strict=True):
            further += [_row(pair["prompt"], answer_like(pair["completion"], text), pair["row"]) for text in texts]
    if questions is not None:
        for pair, texts in zip(pairs, _column(rows, questions, name), strict=True):
            if is_blank(pair["prompt"]):
                raise UnlearningError(
                    f"{name}, row {pair['row']}: it has no prompt, so `{questions}` cannot paraphrase one. Leave "
                    "paraphrased_questions out, or write the row as prompt and completion."
                )
            further += [_row(question_like(pair["prompt"], text), pair["completion"], pair["row"]) for text in texts]
    return datasets.Dataset.from_list(further)


def wrong_answer_rows(
    pairs: datasets.Dataset,
    rows: datasets.Dataset,
    column: str,
    *,
    paraphrases: datasets.Dataset | None = None,
    name: str = "forget set",
) -> datasets.Dataset:
    """
    Rows with the wrong answers to the prompts of the forget set.

    Args:
        pairs (`datasets.Dataset`):
            The rows as [`~hf_unlearn.data.to_prompt_completion`] gives them.
        rows (`datasets.Dataset`):
            The same as they were loaded.
        column (`str`):
            Column of `rows` with wrong answers: a text or a list of texts a row.
        paraphrases (`datasets.Dataset`, *optional*):
            Rows of [`paraphrased_rows`], whose answers are right ones too.
        name (`str`, *optional*, defaults to `"forget set"`):
            How errors call the set.

    Returns:
        `datasets.Dataset` with `prompt`, `completion` and `row`, in the form of `pairs`.
    """
    _require_one_answer(pairs, name, column)
    right = defaultdict(set)
    for pair in [*pairs, *(paraphrases or [])]:
        right[pair["row"]].add(_normalized(text_of(pair["completion"])))
    wrong = []
    for pair, texts in zip(pairs, _column(rows, column, name), strict=True):
        for text in texts:
            if _normalized(text) in right[pair["row"]]:
                raise UnlearningError(
                    f"{name}, row {pair['row']}: a wrong answer in `{column}` equals the right one or a paraphrase of "
                    "it, so it would be made to go and held in place at once. Remove it from the column."
                )
            wrong.append(_row(pair["prompt"], answer_like(pair["completion"], text), pair["row"]))
    return datasets.Dataset.from_list(wrong)


def answer_like(completion: str | Messages, text: str) -> str | Messages:
    """A text as a completion: messages where the given one is, and joined to the prompt as the given one is."""
    if not isinstance(completion, str):
        return [{"role": "assistant", "content": text}]
    return f" {text.lstrip()}" if completion[:1].isspace() else text


def question_like(prompt: str | Messages, text: str) -> str | Messages:
    """A text as a prompt: the last message where the given one is a conversation, and framed as the given one is."""
    if not isinstance(prompt, str):
        return [*prompt[:-1], {"role": prompt[-1]["role"], "content": text}]
    framed = prompt.startswith(_QUESTION) and prompt.endswith(_ANSWER)
    return f"{_QUESTION}{text}{_ANSWER}" if framed else text


def _row(prompt: str | Messages, completion: str | Messages, number: int) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "row": number}


def _column(rows: datasets.Dataset, column: str, name: str) -> list[list[str]]:
    """The texts of a column, at least one for each row."""
    if column not in rows.column_names:
        raise UnlearningError(
            f"The {name} has no column `{column}`; it has {', '.join(rows.column_names)}. Name one of these, or leave "
            "the option out."
        )
    texts = []
    for number, value in enumerate(rows[column]):
        value = value if isinstance(value, list) else [value]
        if not value or not all(isinstance(text, str) and text.strip() for text in value):
            raise UnlearningError(
                f"{name}, row {number}: `{column}` holds no text, or an empty one. Give each row a text or a list of "
                "texts."
            )
        texts.append(value)
    return texts


def _require_one_answer(pairs: datasets.Dataset, name: str, column: str | None) -> None:
    number, count = Counter(pairs["row"]).most_common(1)[0]
    if count > 1:
        raise UnlearningError(
            f"{name}, row {number}: the conversation has {count} assistant turns, so it is not clear to which one "
            f"`{column}` belongs. Make each turn a row of its own."
        )


def _normalized(text: str) -> str:
    return " ".join(text.casefold().split())

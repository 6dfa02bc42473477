"""What is in the two sets: sizes, rows that would not be trained on, rows that stand in both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import datasets
from rich.table import Table

from hf_unlearn.data.tokenization import IGNORED, is_blank
from hf_unlearn.errors import UnlearningError


MAX_NAMED_ROWS = 10


@dataclass
class SetSummary:
    """
    What is in one set. All row numbers are indices in the source set, which a conversation of several assistant turns
    may give more than one row.

    Args:
        name (`str`): `"forget set"` or `"retain set"`.
        rows (`int`): Prompt/completion rows.
        source_rows (`int`): Rows of the source set that they come from.
        prompt_tokens (`int`): Tokens that are not scored, over all rows.
        answer_tokens (`int`): Tokens that are scored, over all rows.
        longest (`int`): Tokens of the longest sequence, after the cut.
        cut_rows (`list[int]`): Rows that lost part of their answer to `max_length`, one entry a row.
        untrainable_rows (`list[tuple[int, str]]`): Rows without any token to train on, and why, one entry a row.
        duplicate_rows (`list[tuple[int, int]]`): Rows that repeat an earlier one, and that one.
    """

    name: str
    rows: int = 0
    source_rows: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    longest: int = 0
    cut_rows: list[int] = field(default_factory=list)
    untrainable_rows: list[tuple[int, str]] = field(default_factory=list)
    duplicate_rows: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class DataReport:
    """
    What is in the forget set and the retain set.

    Args:
        forget (`SetSummary`): The forget set.
        retain (`SetSummary`, *optional*): The retain set, if there is one.
        shared_rows (`list[tuple[int, int]]`): Forget rows that also stand in the retain set, and the first retain row
            they equal.
        paraphrased_rows (`int`): Rows of the forget set that are paraphrases of others.
        wrong_answers (`SetSummary`, *optional*): Wrong answers to the prompts of the forget set, if they are held; their
            row numbers are those of the forget set.
    """

    forget: SetSummary
    retain: SetSummary | None = None
    shared_rows: list[tuple[int, int]] = field(default_factory=list)
    paraphrased_rows: int = 0
    wrong_answers: SetSummary | None = None

    @property
    def summaries(self) -> list[SetSummary]:
        """The sets that there are."""
        return [summary for summary in (self.forget, self.retain, self.wrong_answers) if summary is not None]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON has it: dicts, lists, numbers and strings."""
        return json.loads(json.dumps(asdict(self)))

    def render(self) -> Table:
        """The report as a table, one column a set; print it with `rich.print`."""
        table = Table("", *[summary.name for summary in self.summaries])
        for label, cell in {
            "rows": lambda summary: summary.rows,
            "rows in the source": lambda summary: summary.source_rows,
            "prompt tokens": lambda summary: summary.prompt_tokens,
            "answer tokens": lambda summary: summary.answer_tokens,
            "longest sequence": lambda summary: summary.longest,
            "answers partly cut": lambda summary: len(summary.cut_rows),
            "rows not trained on": lambda summary: len(summary.untrainable_rows),
            "repeated rows": lambda summary: len(summary.duplicate_rows),
        }.items():
            table.add_row(label, *[str(cell(summary)) for summary in self.summaries])
        if self.paraphrased_rows:
            table.add_row("of these, paraphrases", str(self.paraphrased_rows))
        table.add_row("rows in both sets", str(len(self.shared_rows)))
        return table

    def warnings(self) -> list[str]:
        """One sentence for each thing that is allowed and seldom meant."""
        sentences = []
        if self.shared_rows:
            pairs = _listed(f"{forget} = {retain}" for forget, retain in self.shared_rows)
            sentences.append(
                f"{len(self.shared_rows)} forget rows also stand in the retain set (forget = retain: {pairs}), so they "
                "are trained to go and held in place at once; remove them from one of the sets."
            )
        for summary in self.summaries[1:]:
            if summary.untrainable_rows:
                sentences.append(
                    f"{len(summary.untrainable_rows)} of {summary.rows} rows of the {summary.name} are left out: "
                    f"{_reasons(summary)}."
                )
        for summary in self.summaries:
            sentences += _set_warnings(summary)
        return sentences


def summarize(dataset: datasets.Dataset, *, name: str, max_length: int | None = None) -> SetSummary:
    """
    Count tokens of a tokenised set and find rows that are cut, not trained on, or repeated.

    Args:
        dataset (`datasets.Dataset`):
            Rows of [`~hf_unlearn.data.tokenize_rows`].
        name (`str`):
            How the report calls the set, e.g. `"forget set"`.
        max_length (`int`, *optional*):
            The length they were cut to, for the reasons given.

    Returns:
        `SetSummary`
    """
    _require_columns(dataset, name)
    summary = SetSummary(name, rows=len(dataset), source_rows=len(set(dataset["row"])))
    first_rows: dict[tuple[str, str], int] = {}
    for row in dataset:
        number, labels = row["row"], row["labels"]
        answer_tokens = sum(label != IGNORED for label in labels)
        summary.answer_tokens += answer_tokens
        summary.prompt_tokens += len(labels) - answer_tokens
        summary.longest = max(summary.longest, len(labels))
        if not _is_trainable(labels):
            summary.untrainable_rows.append((number, _why_untrainable(row, max_length)))
        elif row["num_cut"] > 0:
            summary.cut_rows.append(number)
        first = first_rows.setdefault(_normalized(row), number)
        if first != number:
            summary.duplicate_rows.append((number, first))
    return summary


def check_sets(
    forget: datasets.Dataset, retain: datasets.Dataset | None, *, max_length: int | None = None
) -> DataReport:
    """
    Summarise the two sets and find rows that stand in both. Rows are equal if prompt and answer are, but for case and
    white space.

    Args:
        forget (`datasets.Dataset`):
            Tokenised forget set.
        retain (`datasets.Dataset`, *optional*):
            Tokenised retain set, `None` if there is none.
        max_length (`int`, *optional*):
            The length they were cut to.

    Returns:
        `DataReport`
    """
    report = DataReport(summarize(forget, name="forget set", max_length=max_length))
    if retain is not None:
        report.retain = summarize(retain, name="retain set", max_length=max_length)
        retain_rows: dict[tuple[str, str], int] = {}
        for row in _texts(retain):
            retain_rows.setdefault(_normalized(row), row["row"])
        keys = ((row["row"], _normalized(row)) for row in _texts(forget))
        report.shared_rows = [(number, retain_rows[key]) for number, key in keys if key in retain_rows]
    return report


def raise_for_untrainable(report: DataReport) -> None:
    """
    Refuse sets that would leave something in the model without a word: a forget row that is not trained on, or a retain
    set of which nothing is left, or nothing but forget rows.

    Args:
        report (`DataReport`):
            Report of [`check_sets`].
    """
    remedy = "Fill or remove empty rows, raise max_length (or shorten the prompts) where answers are cut off."
    forget, retain = report.forget, report.retain
    if forget.untrainable_rows:
        raise UnlearningError(
            f"{len(forget.untrainable_rows)} of {forget.rows} rows of the forget set would not be trained on, so the "
            f"model would keep them: {_reasons(forget)}. {remedy}"
        )
    if retain is not None and len(retain.untrainable_rows) == retain.rows:
        raise UnlearningError(f"No row of the retain set can be trained on: {_reasons(retain)}. {remedy}")
    if retain is not None and len(set(dict(report.shared_rows).values())) == retain.rows - len(retain.duplicate_rows):
        raise UnlearningError(
            "Every row of the retain set also stands in the forget set, so nothing would be held in place but what has "
            "to go. Pass other rows as the retain set."
        )


def drop_untrainable(dataset: datasets.Dataset) -> datasets.Dataset:
    """
    Leave out the rows without any token to train on.

    Args:
        dataset (`datasets.Dataset`):
            Tokenised set.

    Returns:
        `datasets.Dataset`
    """
    return dataset.select([index for index, labels in enumerate(dataset["labels"]) if _is_trainable(labels)])


def data_hash(dataset: datasets.Dataset) -> str:
    """
    SHA-256 of the prompts and completions in their order; the same in every process, session and version.

    Args:
        dataset (`datasets.Dataset`):
            Rows of [`~hf_unlearn.data.to_prompt_completion`], tokenised or not.

    Returns:
        `str`: hexadecimal digest.
    """
    digest = hashlib.sha256()
    for row in _texts(dataset):
        line = json.dumps([row["prompt"], row["completion"]], ensure_ascii=False, sort_keys=True)
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()


def _require_columns(dataset: datasets.Dataset, name: str) -> None:
    needed = ("prompt", "completion", "row", "input_ids", "labels", "num_cut")
    missing = [column for column in needed if column not in dataset.column_names]
    if missing:
        raise UnlearningError(
            f"The {name} is tokenised already but lacks the columns {', '.join(missing)}, without which it cannot be "
            "checked. Pass its rows as text or messages."
        )


def _texts(dataset: datasets.Dataset) -> datasets.Dataset:
    return dataset.select_columns(["prompt", "completion", "row"])


def _is_trainable(labels: list[int]) -> bool:
    return any(label != IGNORED for label in labels[1:])


def _why_untrainable(row: dict[str, Any], max_length: int | None) -> str:
    if is_blank(row["completion"]):
        return "the answer is empty"
    if row["num_cut"] > 0:
        return f"the whole answer lies beyond max_length={max_length}"
    return "it is one token long, and nothing predicts that token"


def _normalized(row: dict[str, Any]) -> tuple[str, str]:
    return _normalized_text(row["prompt"]), _normalized_text(row["completion"])


def _normalized_text(text: str | list[dict[str, str]]) -> str:
    if not isinstance(text, str):
        text = "\n".join(f"{message['role']}: {message['content']}" for message in text)
    return " ".join(text.casefold().split())


def _set_warnings(summary: SetSummary) -> list[str]:
    sentences = []
    if summary.cut_rows:
        sentences.append(
            f"{len(summary.cut_rows)} rows of the {summary.name} lose the end of their answer to max_length (rows "
            f"{_listed(summary.cut_rows)}); raise max_length to train on it."
        )
    if summary.duplicate_rows:
        pairs = _listed(f"{row} = {first}" for row, first in summary.duplicate_rows)
        sentences.append(
            f"{len(summary.duplicate_rows)} rows of the {summary.name} repeat an earlier one ({pairs}), which gives "
            "it more weight."
        )
    return sentences


def _reasons(summary: SetSummary) -> str:
    """Rows not trained on, grouped by reason."""
    by_reason: dict[str, list[int]] = {}
    for row, reason in summary.untrainable_rows:
        by_reason.setdefault(reason, []).append(row)
    return "; ".join(f"{reason} (rows {_listed(rows)})" for reason, rows in by_reason.items())


def _listed(items: Iterable[Any]) -> str:
    """Up to ten different items in words."""
    texts = list(dict.fromkeys(map(str, items)))
    rest = f" and {len(texts) - MAX_NAMED_ROWS} more" if len(texts) > MAX_NAMED_ROWS else ""
    return ", ".join(texts[:MAX_NAMED_ROWS]) + rest

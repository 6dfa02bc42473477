"""The one tokenisation policy that training, scoring and generation share."""

from __future__ import annotations

from typing import Any

import datasets
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from hf_unlearn.data.formats import to_prompt_completion
from hf_unlearn.errors import UnlearningError


IGNORED = -100  # label of a position that is not scored


def encode_prompt(
    prompt: str | list[dict[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[int]:
    """
    Encode a prompt as the start of a sequence, for generation.

    The tokens are those that [`encode_pair`] begins with, except where the answer changes the end of the prompt: where
    tokens merge across the boundary, or where the chat template writes its generation prompt otherwise than the start
    of a turn.

    Args:
        prompt (`str` or `list[dict[str, str]]`):
            Text or messages.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer; messages need its chat template.
        chat_template_kwargs (`dict`, *optional*):
            Variables of the chat template, such as `{"date_string": "10 Apr 2025"}` for one that writes today's date.

    Returns:
        `list[int]`: token ids, with the special tokens that open a sequence.
    """
    if isinstance(prompt, str):
        return _encode_text(prompt, tokenizer)
    kwargs = chat_template_kwargs or {}
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False, **kwargs)


def encode_pair(
    prompt: str | list[dict[str, str]],
    completion: str | list[dict[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """
    Encode a prompt and its answer, and mark the answer.

    Both are encoded jointly; the answer starts where the encoding of both leaves that of the prompt alone, so a token
    merged across the boundary belongs to the answer. The sequence has its BOS once, where the tokenizer adds one, and
    ends with EOS: appended to text, and in chats the last EOS that the template writes. Position 0 is never scored, as
    nothing predicts it. Truncation keeps the start.

    Args:
        prompt (`str` or `list[dict[str, str]]`):
            Text or messages.
        completion (`str` or `list[dict[str, str]]`):
            Of the same kind. A blank one has no labels.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer; messages need its chat template.
        max_length (`int`, *optional*):
            Longest sequence. Not limited if not set.
        chat_template_kwargs (`dict`, *optional*):
            Variables of the chat template.

    Returns:
        `dict` with `input_ids` and `labels` (`list[int]` of one length; labels are −100 outside the answer) and
        `num_cut` (`int`), the answer tokens lost to `max_length`.
    """
    prompt_ids = encode_prompt(prompt, tokenizer, chat_template_kwargs)
    if is_blank(completion):
        ids, start = prompt_ids, len(prompt_ids)
    else:
        if isinstance(completion, str):
            ids = _encode_full_text(prompt + completion, tokenizer)
        else:
            kwargs = chat_template_kwargs or {}
            ids = tokenizer.apply_chat_template(prompt + completion, return_dict=False, **kwargs)
        start = _common_prefix_length(prompt_ids, ids)
        if not isinstance(completion, str):
            ids = _cut_after_last_eos(ids, start, tokenizer.eos_token_id)
    start = min(max(start, 1), len(ids))
    labels = [IGNORED] * start + ids[start:]
    kept = len(ids) if max_length is None else min(max_length, len(ids))
    return {"input_ids": ids[:kept], "labels": labels[:kept], "num_cut": len(ids) - max(start, kept)}


def tokenize_rows(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    num_proc: int | None = None,
    name: str = "dataset",
) -> datasets.Dataset:
    """
    Encode all rows of a set with [`encode_pair`].

    Args:
        dataset (`datasets.Dataset`):
            Rows of [`~hf_unlearn.data.to_prompt_completion`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        max_length (`int`, *optional*):
            Longest sequence. Not limited if `None`.
        num_proc (`int`, *optional*):
            Processes.
        name (`str`, *optional*, defaults to `"dataset"`):
            How errors and the progress bar call the set, e.g. `"forget set"`.

    Returns:
        `datasets.Dataset`: all columns of `dataset`, with `input_ids`, `labels` and `num_cut` added.
    """

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        try:
            return encode_pair(row["prompt"], row["completion"], tokenizer, max_length)
        except TemplateError as error:
            raise UnlearningError(
                f"{name}, row {row['row']}: the tokenizer's chat template refuses the conversation: {error}. Bring its "
                "roles into the order that the template expects, or remove the row."
            ) from error

    ids = datasets.List(datasets.Value("int64"))
    added = {"input_ids": ids, "labels": ids, "num_cut": datasets.Value("int64")}
    return dataset.map(
        encode,
        num_proc=num_proc,
        features=datasets.Features({**dataset.features, **added}),  # else a batch of empty lists has no type
        desc=f"Tokenising the {name}",
    )


def encode_set(
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    num_proc: int | None = None,
    name: str = "dataset",
) -> datasets.Dataset:
    """
    From rows of any accepted shape to a tokenised set: [`to_prompt_completion`], then [`tokenize_rows`]. Questions and
    instructions become chat messages where the tokenizer has a chat template.

    Args:
        rows (`datasets.Dataset`): Rows of [`~hf_unlearn.data.load_rows`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer.
        max_length (`int`, *optional*): Longest sequence. Not limited if `None`.
        num_proc (`int`, *optional*): Processes.
        name (`str`, *optional*, defaults to `"dataset"`): How errors and the progress bar call the set.
    """
    rows = to_prompt_completion(rows, name=name, chat=tokenizer.chat_template is not None)
    return tokenize_rows(rows, tokenizer, max_length, num_proc=num_proc, name=name)


def is_blank(completion: str | list[dict[str, str]]) -> bool:
    """Whether an answer, text or messages, is empty or white space only."""
    texts = [completion] if isinstance(completion, str) else [message["content"] for message in completion]
    return not any(text.strip() for text in texts)


def _encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids with the special tokens that the tokenizer opens a sequence with, and none that it closes one with."""
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    has_bos = bos is not None and text.startswith(bos)
    ids = tokenizer(text, add_special_tokens=not has_bos)["input_ids"]
    adds_eos = not has_bos and ids[-1:] == [tokenizer.eos_token_id] and not text.endswith(eos)
    # A lone token that opens the sequence stays where BOS and EOS are the same.
    return ids[:-1] if adds_eos and ids != [tokenizer.bos_token_id] else ids


def _encode_full_text(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids, eos_id = _encode_text(text, tokenizer), tokenizer.eos_token_id
    return ids if eos_id is None or ids[-1:] == [eos_id] else [*ids, eos_id]


def _common_prefix_length(ids: list[int], other_ids: list[int]) -> int:
    for length, (token, other) in enumerate(zip(ids, other_ids, strict=False)):
        if token != other:
            return length
    return min(len(ids), len(other_ids))


def _cut_after_last_eos(ids: list[int], start: int, eos_id: int | None) -> list[int]:
    """Drop what the template writes after the answer's last EOS, e.g. a line break."""
    last = max((index for index in range(start, len(ids)) if ids[index] == eos_id), default=len(ids) - 1)
    return ids[: last + 1]

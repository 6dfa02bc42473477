"""Any accepted row shape → prompt and completion."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import datasets

from hf_unlearn.errors import UnlearningError


Messages = list[dict[str, str]]
Form = Literal["plain", "question", "chat"]
Pair = tuple[str | Messages, str | Messages, Form]

_ROLES = {  # of ShareGPT
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}
_UNSUPPORTED = ("tool_calls", "function_call", "reasoning_content", "thinking")


def to_prompt_completion(dataset: datasets.Dataset, *, name: str, chat: bool) -> datasets.Dataset:
    """
    Bring rows of any accepted shape into prompt and completion.

    Where the columns fit several shapes, the first of this list is taken:

    1. `prompt`, `completion`: both text, or both lists of messages (`role`, `content`); taken as they are.
    2. `messages`: a conversation, which gives one row for each assistant turn, with all before it as prompt.
    3. `conversations`: the same, also with ShareGPT's `from` and `value`.
    4. `question`, `answer`.
    5. `instruction`, `output` and, if not empty, `input`, appended to the instruction after a blank line.
    6. `text`: all of it is the completion, and the prompt is empty.

    Questions and instructions become messages if `chat`, else the prompt `"Question: …\\nAnswer:"` and the completion
    `" …"`. Null and blank answers are kept, as empty ones: [`~hf_unlearn.data.check_sets`] reports them.

    Rewordings and wrong answers that accompany shapes 1, 4 and 5 are carried along, written in the same form:
    `paraphrased_question` as `paraphrased_prompt`, `paraphrased_answer` as `paraphrased_completion`, `wrong_answers`
    (or TOFU's `perturbed_answer`) as the list `wrong_completions`.

    Args:
        dataset (`datasets.Dataset`):
            Rows as loaded.
        name (`str`):
            How errors call the set, e.g. `"forget set"`.
        chat (`bool`):
            Whether the tokenizer has a chat template.

    Returns:
        `datasets.Dataset` with `prompt`, `completion`, `row` (index in `dataset`) and the columns carried along.
    """
    read = _find_shape(dataset.column_names, name)
    rows: list[dict[str, Any]] = []
    for index, row in enumerate(dataset):
        where = f"{name}, row {index}"
        for prompt, completion, form in read(row, where, chat):
            if form == "chat" and not chat:
                raise UnlearningError(
                    f"{where}: it is a conversation, and the tokenizer has no chat template. Use the tokenizer of a "
                    "chat model, give this one a chat template, or write the rows as `prompt` and `completion` text."
                )
            if rows and type(prompt) is not type(rows[0]["prompt"]):
                raise UnlearningError(
                    f"{where}: it is {'text' if isinstance(prompt, str) else 'a conversation'}, and the rows before it are "
                    "not. Write all rows in one way; an empty row is text."
                )
            rows.append({"prompt": prompt, "completion": completion, "row": index})
            if read not in (_read_messages, _read_conversations, _read_text):
                rows[-1] |= _carried(row, prompt, form, where)
    return datasets.Dataset.from_list(rows)


def text_of(part: str | Messages) -> str:
    """The plain text of a prompt or completion: itself, or the content of its last message."""
    return part if isinstance(part, str) else part[-1]["content"]


def _find_shape(columns: list[str], name: str) -> Callable[[dict[str, Any], str, bool], Iterator[Pair]]:
    for shape, read in _SHAPES.items():
        if set(shape) <= set(columns):
            return read
    shapes = "; ".join(" + ".join(shape) for shape in _SHAPES)
    raise UnlearningError(
        f"The {name} has the columns {', '.join(columns)}, which are none of the accepted shapes: {shapes}. Rename "
        "its columns."
    )


# ---- Shapes ----


def _read_pair(row: dict[str, Any], where: str, chat: bool) -> Iterator[Pair]:
    prompt, completion = row["prompt"], row["completion"]
    if not isinstance(prompt, list) and not isinstance(completion, list):
        yield _text(prompt, where, "prompt"), _text(completion, where, "completion"), "plain"
        return
    prompt = _messages(prompt, where, "prompt")
    completion = _write_completion("", "chat") if not completion else _messages(completion, where, "completion")
    for message in completion:
        if message["role"] != "assistant":
            raise UnlearningError(
                f"{where}: `completion` holds a turn of the role {message['role']!r}. It may hold assistant turns "
                "only; move what comes before them into `prompt`, or use a `messages` column."
            )
    yield prompt, completion, "chat"


def _read_messages(row: dict[str, Any], where: str, chat: bool) -> Iterator[Pair]:
    yield from _split_turns(_messages(row["messages"], where, "messages"), where)


def _read_conversations(row: dict[str, Any], where: str, chat: bool) -> Iterator[Pair]:
    turns = row["conversations"]
    if isinstance(turns, list) and any(isinstance(turn, dict) and turn.get("from") for turn in turns):
        turns = [_from_sharegpt(turn, where) for turn in turns]
    yield from _split_turns(_messages(turns, where, "conversations"), where)


def _from_sharegpt(turn: Any, where: str) -> dict[str, Any]:
    speaker = turn.get("from") if isinstance(turn, dict) else None
    if not isinstance(speaker, str) or speaker not in _ROLES:
        raise UnlearningError(
            f"{where}: a turn in `conversations` is from {speaker!r}. Known are: {', '.join(_ROLES)}."
        )
    return {"role": _ROLES[speaker], "content": turn.get("value")}


def _split_turns(messages: Messages, where: str) -> Iterator[Pair]:
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise UnlearningError(
            f"{where}: the conversation has no assistant turn, so there is nothing to train on. Add the turn or remove "
            "the row."
        )
    if turns[0] == 0:
        raise UnlearningError(
            f"{where}: the conversation begins with an assistant turn, so that turn has no prompt. Put a user or "
            "system turn before it, or remove it."
        )
    for turn in turns:
        yield messages[:turn], [messages[turn]], "chat"


def _read_question(row: dict[str, Any], where: str, chat: bool) -> Iterator[Pair]:
    question = _required_text(row["question"], where, "question")
    yield _write_pair(question, _text(row["answer"], where, "answer"), chat)


def _read_instruction(row: dict[str, Any], where: str, chat: bool) -> Iterator[Pair]:
    question = _required_text(row["instruction"], where, "instruction")
    context = _text(row.get("input"), where, "input")
    if context.strip():
        question = f"{question}\n\n{context}"
    yield _write_pair(question, _text(row["output"], where, "output"), chat)


def _read_text(row: dict[str, Any], where: str, chat: bool) -> Iterator[Pair]:
    yield "", _text(row["text"], where, "text"), "plain"


_SHAPES: dict[tuple[str, ...], Callable[[dict[str, Any], str, bool], Iterator[Pair]]] = {
    ("prompt", "completion"): _read_pair,
    ("messages",): _read_messages,
    ("conversations",): _read_conversations,
    ("question", "answer"): _read_question,
    ("instruction", "output"): _read_instruction,
    ("text",): _read_text,
}


# ---- Values ----


def _text(value: Any, where: str, column: str) -> str:
    """Text as it is, null as empty text."""
    if value is not None and not isinstance(value, str):
        raise UnlearningError(f"{where}: `{column}` is of type {type(value).__name__}. Make it text (a string).")
    return value or ""


def _required_text(value: Any, where: str, column: str) -> str:
    text = _text(value, where, column)
    if not text.strip():
        raise UnlearningError(f"{where}: `{column}` is empty. Fill it or remove the row.")
    return text


def _messages(value: Any, where: str, column: str) -> Messages:
    """Role and content of every message; other keys, e.g. ids, say nothing to the model."""
    if not isinstance(value, list) or not value:
        raise UnlearningError(
            f"{where}: `{column}` holds no messages. Give a list of at least one message with `role` and `content`."
        )
    return [_message(message, where, column) for message in value]


def _message(message: Any, where: str, column: str) -> dict[str, str]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UnlearningError(f"{where}: a message in `{column}` has no `role`. Give it `role` and `content`.")
    for key in _UNSUPPORTED:
        if message.get(key):
            raise UnlearningError(
                f"{where}: a message in `{column}` has `{key}`, which is not supported. Write it into `content`, or "
                "remove the row."
            )
    return {"role": message["role"], "content": _text(message.get("content"), where, f"{column}.content")}


# ---- Writing ----


def _write_pair(question: str, answer: str, chat: bool) -> Pair:
    form: Form = "chat" if chat else "question"
    return _write_prompt(question, form), _write_completion(answer, form), form


def _write_prompt(question: str, form: Form) -> str | Messages:
    if form == "chat":
        return [{"role": "user", "content": question}]
    return f"Question: {question}\nAnswer:" if form == "question" else question


def _write_completion(answer: str, form: Form) -> str | Messages:
    if form == "chat":
        return [{"role": "assistant", "content": answer}]
    return f" {answer}" if form == "question" and answer.strip() else answer


def _carried(row: dict[str, Any], prompt: str | Messages, form: Form, where: str) -> dict[str, Any]:
    """Rewordings and wrong answers of a row in the form of its prompt and completion."""
    carried: dict[str, Any] = {}
    if "paraphrased_question" in row:
        question = row["paraphrased_question"]
        if question is not None:
            question = _write_prompt(_required_text(question, where, "paraphrased_question"), form)
            if form == "chat":
                question = prompt[:-1] + question  # what comes before the question stays
        carried["paraphrased_prompt"] = question
    if "paraphrased_answer" in row:
        answer = row["paraphrased_answer"]
        if answer is not None:
            answer = _write_completion(_required_text(answer, where, "paraphrased_answer"), form)
        carried["paraphrased_completion"] = answer
    column = next((column for column in ("wrong_answers", "perturbed_answer") if column in row), None)
    if column is not None:
        answers = row[column]
        if answers is not None:
            answers = answers if isinstance(answers, list) else [answers]
            answers = [_write_completion(_required_text(answer, where, column), form) for answer in answers]
        carried["wrong_completions"] = answers
    return carried

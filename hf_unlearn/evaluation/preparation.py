"""From the rows of a protocol to what a model is run on; all that can be wrong with rows is found here, without weights."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_unlearn.data.formats import text_of
from hf_unlearn.data.tokenization import is_blank
from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation.aggregates import check_same_rows
from hf_unlearn.evaluation.protocols.base import GENERATED, EvaluationSet, Protocol
from hf_unlearn.evaluation.results import Evaluation
from hf_unlearn.evaluation.scoring import EncodedAnswers, encode_answers


@dataclass(frozen=True)
class PreparedSet:
    """
    A set with what its rows encode to.

    Args:
        content ([`EvaluationSet`]): The set.
        measures (`tuple[str, ...]`): What can be measured on it: without generated answers where rows have no prompt.
        encoded (`list[EncodedAnswers]`): Per row, the prompt with its answer, the paraphrased answer where there is
            one, and the wrong answers.
        references (`list[str]`): Per row, the text of the answer.
        scored_texts (`list[str]`): Per row, the part of it that is scored; shorter where it is cut at `max_length`.
        paraphrased (`bool`): Whether there are paraphrased answers.
    """

    content: EvaluationSet
    measures: tuple[str, ...]
    encoded: list[EncodedAnswers]
    references: list[str]
    scored_texts: list[str]
    paraphrased: bool


def prepare_sets(
    protocol: Protocol,
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: dict[str, Any] | None = None,
    retrained: Evaluation | None = None,
) -> dict[str, PreparedSet]:
    """
    Encode all rows of a protocol, and check them.

    Args:
        protocol ([`Protocol`]): What is to be evaluated.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer.
        chat_template_kwargs (`dict`, *optional*): Variables of the chat template.
        retrained ([`Evaluation`], *optional*): Log of a retrained model, which must be of the same rows.

    Raises:
        [`~hf_unlearn.errors.UnlearningError`]: an empty or missing answer, an answer that is cut off whole, a log of
            other rows.
    """
    sets = {name: _prepare(name, content, tokenizer, chat_template_kwargs) for name, content in protocol.sets.items()}
    for name in ("forget", "holdout"):
        if retrained is not None and name in sets and name in retrained.rows:
            columns = {"row": sets[name].content.rows["row"][:], "ground_truth": sets[name].references}
            check_same_rows(name, columns, retrained.rows[name])
    return sets


def check_tokenizer(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sets: dict[str, PreparedSet]) -> None:
    """
    Refuse a tokenizer whose ids mean nothing to the model.

    Args:
        lm (`PreTrainedModel`): A causal LM.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer.
        sets (`dict[str, PreparedSet]`): Rows encoded with it.
    """
    size = lm.get_input_embeddings().weight.shape[0]
    rows = [row for prepared in sets.values() for row in prepared.encoded]
    largest = max((token for row in rows for part in (row.prefix, *row.rests) for token in part), default=0)
    ends = lm.config.get_text_config().eos_token_id
    ends = {end for end in (ends if isinstance(ends, list) else [ends]) if end is not None}
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    if (size and largest >= size) or (ends and not ends & special):
        raise UnlearningError(
            f"The tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} is that of another model: its ids go "
            f"up to {largest} and its special tokens are {sorted(special)}; the model has {size} ids and ends a text "
            f"with {sorted(ends)}. Pass the model's own tokenizer."
        )


def _prepare(
    name: str,
    content: EvaluationSet,
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: dict[str, Any] | None,
) -> PreparedSet:
    rows, measures = content.rows, content.measures
    if not len(rows):
        raise UnlearningError(f"The {name} set has no rows to evaluate. Give it some, or leave it out.")
    paraphrased = "truth_ratio" in measures and "paraphrased_completion" in rows.column_names
    encoded, scored_texts = [], []
    for row in rows:
        completions = _completions(name, row, measures, paraphrased)
        answers = encode_answers(row["prompt"], completions, tokenizer, content.max_length, chat_template_kwargs)
        if any(len(rest) <= skipped for rest, skipped in zip(answers.rests, answers.skipped, strict=True)):
            raise UnlearningError(
                f"{name} set, row {row['row']}: no token of the answer is within {content.max_length} tokens. Raise "
                "max_length or shorten the prompt."
            )
        encoded.append(answers)
        kept = answers.rests[0][answers.skipped[0] :]
        text = tokenizer.decode(kept, skip_special_tokens=True) if answers.num_cut[0] else text_of(row["completion"])
        scored_texts.append(text.strip())
    cut = sum(any(answers.num_cut) for answers in encoded)
    if cut:
        warnings.warn(
            f"{name} set: answers of {cut} of {len(rows)} rows are cut at {content.max_length} tokens and scored up to "
            "there.",
            stacklevel=2,
        )
    references = [text_of(completion).strip() for completion in rows["completion"]]
    if any(isinstance(prompt, str) and not prompt.strip() for prompt in rows["prompt"]):
        measures = tuple(measure for measure in measures if measure not in GENERATED)
    return PreparedSet(content, measures, encoded, references, scored_texts, paraphrased)


def _completions(name: str, row: dict[str, Any], measures: tuple[str, ...], paraphrased: bool) -> list[Any]:
    """The answer of a row, its paraphrased answer and its wrong answers, as far as they are measured."""
    completions = [row["completion"], *([row["paraphrased_completion"]] if paraphrased else [])]
    wrong = row.get("wrong_completions") or []
    if {"truth_ratio", "normalized_probability"} & set(measures):
        if not wrong:
            raise UnlearningError(
                f"{name} set, row {row['row']}: it has no wrong answers, and the truth ratio is measured on this set. "
                "Give it `wrong_answers`, or take them from all rows."
            )
        completions += wrong
    if any(answer is None or is_blank(answer) for answer in completions):
        raise UnlearningError(f"{name} set, row {row['row']}: an answer is empty. Fill it or remove the row.")
    return completions

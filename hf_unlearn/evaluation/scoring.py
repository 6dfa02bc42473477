"""One teacher-forced pass: what every metric of a row but those of generated text is computed from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from hf_unlearn.data.formats import Messages
from hf_unlearn.data.tokenization import IGNORED, encode_pair
from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation.batching import BatchSize, run_in_batches
from hf_unlearn.evaluation.forward import Backbone, end_token_ids, keeps_state, pad, prefill


MAX_TOKENS = 4096  # padded tokens of an automatic batch

Reference = Callable[[], AbstractContextManager[PreTrainedModel | PeftModel]]


@dataclass(frozen=True)
class EncodedAnswers:
    """
    A prompt with one or more answers.

    Args:
        prefix (`list[int]`): The tokens that all its sequences begin with and none of which is scored.
        rests (`list[list[int]]`): Per answer, the tokens after the prefix.
        skipped (`list[int]`): Per answer, how many leading tokens of the rest still belong to the prompt.
        num_cut (`list[int]`): Per answer, how many of its tokens were cut off at the longest length.
    """

    prefix: list[int]
    rests: list[list[int]]
    skipped: list[int]
    num_cut: list[int]

    @property
    def num_tokens(self) -> int:
        """Tokens to compute when the prefix is computed once."""
        return len(self.prefix) + sum(map(len, self.rests))


@dataclass(frozen=True)
class AnswerScores:
    """
    The tokens of one answer under a model, EOS included.

    Args:
        log_probs (`np.ndarray` of shape `(n,)`, fp32): Log-probability of each answer token given all before it.
        is_top1 (`np.ndarray` of shape `(n,)`, bool): Whether the token is the model's first choice.
        num_ends (`int`): How many of the last tokens end the answer, which memorisation metrics leave out: EOS, or the
            end of a turn with the white space that the chat template writes after it.
        mean, std (`np.ndarray` of shape `(n,)`, fp32, *optional*): Moments of the log-probabilities over the
            vocabulary at each position ([`LMHead.log_prob_moments`]), where they were asked for; of the first answer of
            a prompt only.
        kl (`np.ndarray` of shape `(n,)`, fp32, *optional*): KL(p_ref ‖ p_θ) at each position, in nats, where a
            reference was given; of the first answer of a prompt only.
    """

    log_probs: np.ndarray
    is_top1: np.ndarray
    num_ends: int
    mean: np.ndarray | None = None
    std: np.ndarray | None = None
    kl: np.ndarray | None = None

    def without_end(self, values: np.ndarray) -> np.ndarray:
        """The entries of one of the arrays that belong to the text of the answer."""
        return values[: len(values) - self.num_ends]


def encode_answers(
    prompt: str | Messages,
    completions: Sequence[str | Messages],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> EncodedAnswers:
    """
    Encode a prompt with its answers, each as [`~hf_unlearn.data.encode_pair`] would encode it alone.

    Args:
        prompt (`str` or messages): The prompt.
        completions (sequence of the same): Its answers.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer.
        max_length (`int`, *optional*): Longest sequence. Not limited if not set.
        chat_template_kwargs (`dict`, *optional*): Variables of the chat template.
    """
    pairs = [encode_pair(prompt, answer, tokenizer, max_length, chat_template_kwargs) for answer in completions]
    sequences = [pair["input_ids"] for pair in pairs]
    starts = [_num_unscored(pair["labels"]) for pair in pairs]
    shared = min(starts)
    while any(sequence[:shared] != sequences[0][:shared] for sequence in sequences):  # tokens merge with the answer
        shared -= 1
    return EncodedAnswers(
        prefix=sequences[0][:shared],
        rests=[sequence[shared:] for sequence in sequences],
        skipped=[start - shared for start in starts],
        num_cut=[pair["num_cut"] for pair in pairs],
    )


@torch.no_grad()
def score_answers(
    model: PreTrainedModel | PeftModel,
    rows: Sequence[EncodedAnswers],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: BatchSize = "auto",
    moments: bool = False,
    reference: Reference | None = None,
    progress: str | None = None,
    on_results: Callable[[list[int], list[list[AnswerScores]]], None] | None = None,
) -> list[list[AnswerScores]]:
    """
    Score answers in one forward pass over each prompt and each answer, in the order of the rows.

    Answers of one prompt continue from its keys and values, so the prompt is computed once; so is what all prompts of a
    batch begin with. Rows are batched by length;
    only answer positions are projected to the vocabulary, in fp32.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            A causal LM. It is used as it stands: with a rescaled adapter, that is θ_for.
        rows (sequence of [`EncodedAnswers`]):
            What to score.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        batch_size (`int` or `"auto"`, *optional*, defaults to `"auto"`):
            Rows in a batch, or batches of up to 4096 padded tokens. It does not change the values.
        moments (`bool`, *optional*, defaults to `False`):
            Whether to take the moments over the vocabulary, for min-k++, on the first answer of each prompt.
        reference (`Callable`, *optional*):
            Gives a context in which the reference model is live, for the KL to it on the first answer of each prompt.
        progress (`str`, *optional*):
            Label of a progress bar; none is shown if not given.
        on_results (`Callable`, *optional*):
            Gets the indices and scores of each batch of this process as soon as it is done.
    """
    was_training = model.training
    model.eval()
    backbone = Backbone(model)
    share = not keeps_state(backbone.lm)
    ends = end_token_ids(backbone.lm, tokenizer)

    def run(indices: list[int]) -> list[list[AnswerScores]]:
        batch = [rows[index] for index in indices]
        shared = share and len(batch[0].prefix) > 1
        scores = _score_batch(backbone, batch, shared, moments, reference)
        return [
            [
                AnswerScores(**arrays, num_ends=_num_ends(rest, ends, tokenizer))
                for rest, arrays in zip(*pair, strict=True)
            ]
            for pair in zip([row.rests for row in batch], scores, strict=True)
        ]

    try:
        return run_in_batches(
            [row.num_tokens for row in rows],
            run,
            batch_size=batch_size,
            max_tokens=MAX_TOKENS,
            kinds=[len(row.rests) if len(row.prefix) > 1 else 0 for row in rows],
            lockstep=backbone.lockstep,
            progress=progress,
            on_results=on_results,
        )
    finally:
        model.train(was_training)


class _Sequence(NamedTuple):
    """One answer of a batch: its prompt's place in the batch, its tokens after the prefix, and which are scored."""

    row: int
    rest: list[int]
    skipped: int


def _score_batch(
    backbone: Backbone,
    batch: list[EncodedAnswers],
    shared: bool,
    moments: bool,
    reference: Reference | None,
) -> list[list[dict[str, np.ndarray]]]:
    """Per row and answer, the arrays of [`AnswerScores`]."""
    answers = [
        _Sequence(index, rest, skipped)
        for index, row in enumerate(batch)
        for rest, skipped in zip(row.rests, row.skipped, strict=True)
    ]
    positions = _shared_positions if shared else _plain_positions
    hidden, head = positions(backbone, batch, answers), backbone.head
    tokens = [token for answer in answers for token in answer.rest[answer.skipped :]]
    targets = torch.tensor(tokens, dtype=torch.long)
    log_probs, is_top1 = head.score(hidden.float(), targets.to(hidden.device))  # logits in fp32 too
    columns = {"log_probs": log_probs, "is_top1": is_top1}
    counts = [len(answer.rest) - answer.skipped for answer in answers]
    parts = {name: column.cpu().split(counts) for name, column in columns.items()}
    results: list[list[dict[str, np.ndarray]]] = [[] for _ in batch]
    for index, answer in enumerate(answers):
        results[answer.row].append({name: part[index].numpy().copy() for name, part in parts.items()})
    # What the first answer of each prompt is measured by besides.
    firsts = [next(index for index, answer in enumerate(answers) if answer.row == row) for row in range(len(batch))]
    first_hidden = torch.cat([hidden.split(counts)[index] for index in firsts])
    columns = {}
    if moments:
        columns["mean"], columns["std"] = head.log_prob_moments(first_hidden)
    if reference is not None:
        with reference() as reference_model:
            of_reference = backbone if reference_model is backbone.model else Backbone(reference_model)
            if of_reference is not backbone and of_reference.lockstep is not None:
                raise UnlearningError(
                    "The reference is a model of its own whose weights are sharded (ZeRO-3, FSDP2), and processes that "
                    "wait for each other can run one such model only. Pass a reference that each process holds whole, "
                    "or none: with an adapter, the reference is α = 0."
                )
            reference_hidden = positions(of_reference, batch, [answers[index] for index in firsts])
            columns["kl"] = head.measure_kl(first_hidden, reference_hidden, of_reference.head)
    for name, column in columns.items():
        for row, values in enumerate(column.cpu().split([counts[index] for index in firsts])):
            results[row][0][name] = values.numpy().copy()
    return results


def _plain_positions(backbone: Backbone, batch: list[EncodedAnswers], answers: list[_Sequence]) -> torch.Tensor:
    """Hidden states that predict the answer tokens, shape `(N, H)`, from whole sequences."""
    ids, mask = pad([batch[answer.row].prefix + answer.rest for answer in answers], "right", backbone.device)
    hidden = backbone.hidden_states(ids, mask)
    return torch.cat(
        [
            hidden[index, len(batch[answer.row].prefix) + answer.skipped - 1 :][: len(answer.rest) - answer.skipped]
            for index, answer in enumerate(answers)
        ]
    )


def _shared_positions(backbone: Backbone, batch: list[EncodedAnswers], answers: list[_Sequence]) -> torch.Tensor:
    """The same, from prompts that are computed once and answers that continue from them."""
    cache = DynamicCache(config=backbone.lm.config)
    last_of_prefix, prefix_mask = prefill(backbone, [row.prefix for row in batch], cache)
    of_rows = torch.tensor([answer.row for answer in answers], device=prefix_mask.device)
    cache.batch_select_indices(of_rows)
    ids, mask = pad([answer.rest for answer in answers], "right", backbone.device)
    hidden = backbone.hidden_states(ids, torch.cat([prefix_mask[of_rows], mask], dim=1), cache)
    hidden = torch.cat([last_of_prefix[of_rows], hidden], dim=1)
    return torch.cat([hidden[index, answer.skipped : len(answer.rest)] for index, answer in enumerate(answers)])


def _num_ends(rest: list[int], ends: list[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """How many of the last tokens are an end token and white space after it; 0 for an answer that was cut."""
    last = next((index for index in reversed(range(len(rest))) if rest[index] in ends), None)
    if last is None or tokenizer.decode(rest[last + 1 :], skip_special_tokens=True).strip():
        return 0
    return len(rest) - last


def _num_unscored(labels: list[int]) -> int:
    return next((index for index, label in enumerate(labels) if label != IGNORED), len(labels))

"""One teacher-forced pass: what every metric of a row is computed from."""

from __future__ import annotations

from dataclasses import dataclass

import datasets
import numpy as np
import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_unlearn.data.tokenization import IGNORED
from hf_unlearn.lm_head import LMHead, forward_and_score


@dataclass(frozen=True)
class RowScores:
    """
    The answer tokens of one row under a model, EOS included.

    Args:
        log_probs (`np.ndarray` of shape `(n,)`, fp32): Log-probability of each answer token given all before it.
        is_top1 (`np.ndarray` of shape `(n,)`, bool): Whether the token is the model's first choice.
        ends_with_eos (`bool`): Whether the last token is EOS, which memorisation metrics leave out.
    """

    log_probs: np.ndarray
    is_top1: np.ndarray
    ends_with_eos: bool


def score_rows(
    model: PreTrainedModel | PeftModel,
    dataset: datasets.Dataset,
    eos_token_id: int | None,
    batch_size: int = 16,
    progress: str | None = None,
) -> list[RowScores]:
    """
    Score the answers of a tokenised set in one forward pass, in the order of its rows.

    Rows are batched by length and right-padded; log-probabilities are taken on answer positions only, in fp32.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            A causal LM. It is used as it stands: with a rescaled adapter, that is θ_for.
        dataset (`datasets.Dataset`):
            Rows of [`~hf_unlearn.data.tokenize_rows`], each with an answer.
        eos_token_id (`int`, *optional*):
            The EOS token of the tokenizer.
        batch_size (`int`, *optional*, defaults to `16`):
            Rows in a forward pass. It does not change the values.
        progress (`str`, *optional*):
            Label of a progress bar; none is shown if not given.
    """
    causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
    device = causal_lm.get_input_embeddings().weight.device
    columns = dataset.select_columns(["input_ids", "labels"])
    rows = columns[:]
    order = sorted(range(len(dataset)), key=lambda index: len(rows["input_ids"][index]), reverse=True)
    scores: list[RowScores | None] = [None] * len(dataset)
    was_training = model.training
    model.eval()
    try:
        starts = range(0, len(order), batch_size)
        for start in tqdm(starts, desc=progress, disable=progress is None, leave=False):
            indices = order[start : start + batch_size]
            ids, mask, labels = _pad_rows([(rows["input_ids"][i], rows["labels"][i]) for i in indices], device)
            at = labels != IGNORED

            def score(hidden: torch.Tensor, head: LMHead, at=at, labels=labels):
                return head.score(hidden[:, :-1][at], labels[at])

            with torch.no_grad():
                log_probs, is_top1 = forward_and_score(causal_lm, score, input_ids=ids, attention_mask=mask)
            lengths = at.sum(1).tolist()
            for index, row_log_probs, row_is_top1 in zip(
                indices, log_probs.float().cpu().split(lengths), is_top1.cpu().split(lengths), strict=True
            ):
                ends_with_eos = eos_token_id is not None and rows["input_ids"][index][-1] == eos_token_id
                scores[index] = RowScores(row_log_probs.numpy(), row_is_top1.numpy(), ends_with_eos)
    finally:
        model.train(was_training)
    return scores


def _pad_rows(rows: list[tuple[list[int], list[int]]], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Right-padded input ids and attention mask of shape `(B, T)`, and shifted labels of shape `(B, T − 1)`."""
    length = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for index, (row_ids, row_labels) in enumerate(rows):
        ids[index, : len(row_ids)] = torch.tensor(row_ids)
        mask[index, : len(row_ids)] = 1
        labels[index, : len(row_ids)] = torch.tensor(row_labels)
    return ids.to(device), mask.to(device), labels[:, 1:].to(device)

"""
Losses as pure functions: per-token quantities in, per-token losses out.

Reduction is not done here: a trainer divides the sums by the number of tokens of the whole batch, over all processes
and accumulation steps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def cross_entropy(log_probs: torch.Tensor) -> torch.Tensor:
    """
    Negative log-likelihood per token, in nats.

    Args:
        log_probs (`torch.Tensor` of shape `(N,)`): Log-probability of each target token. Under a temperature above 1
            (`memorization_temperature`) the gradient does not vanish on tokens the model already knows.
    """
    return -log_probs


def npo_memorization(
    log_probs: torch.Tensor, reference_log_probs: torch.Tensor, rows: torch.Tensor, beta: float
) -> torch.Tensor:
    """
    The NPO form of memorisation (arXiv 2602.06441, after arXiv 2404.05868), spread over the tokens of each row.

    For a row with log-ratio r = log p_θ(y|x) − log p_ref(y|x), summed over its tokens, the row's loss is
    (2/β)·log σ(−β·r), minimised. It falls as the row gets likelier than under the reference. It cannot run away:
    p_θ ≤ 1 bounds r by −log p_ref(y|x).

    Args:
        log_probs (`torch.Tensor` of shape `(N,)`): Log-probabilities under the model in training.
        reference_log_probs (`torch.Tensor` of shape `(N,)`): The same under the reference.
        rows (`torch.Tensor` of shape `(N,)`, int): Row of each token; tokens of a row are averaged over its length, so
            that the sum over tokens is the sum over rows.
        beta (`float`): Inverse temperature β.
    """
    num_rows = int(rows.max()) + 1 if len(rows) else 0  # a process may get rows that only fill its batch
    ratio = torch.zeros(num_rows, device=log_probs.device).index_add(0, rows, log_probs - reference_log_probs)
    row_loss = (2 / beta) * F.logsigmoid(-beta * ratio)
    length = torch.bincount(rows, minlength=num_rows)
    return (row_loss / length)[rows]

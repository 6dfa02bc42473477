"""
Losses as pure functions: per-token quantities in, per-token losses out.

Reduction is not done here: a trainer divides the sums by the number of tokens, or of rows, of the whole batch, over all
processes and accumulation steps. A loss of a whole row is spread evenly over its tokens, so that the sum over tokens is
the sum over rows. Losses over the whole vocabulary are functions of a tile of logits, see
[`~hf_unlearn.lm_head.LMHead.score_tiles`].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hf_unlearn.lm_head import LMHead, ScoreTile, TileScores


# ---- Of tokens ----


def cross_entropy(log_probs: torch.Tensor) -> torch.Tensor:
    """
    Negative log-likelihood per token, in nats.

    Args:
        log_probs (`torch.Tensor` of shape `(N,)`): Log-probability of each target token. Under a temperature above 1
            (`memorization_temperature`) the gradient does not vanish on tokens the model already knows.
    """
    return -log_probs


def gradient_ascent(log_probs: torch.Tensor) -> torch.Tensor:
    """
    log p of each token, minimised: ascent on its cross-entropy. Unbounded below.

    Args:
        log_probs (`torch.Tensor` of shape `(N,)`): Log-probability of each target token.
    """
    return log_probs


def weighted_ascent(log_probs: torch.Tensor, alpha: float) -> torch.Tensor:
    """
    WGA (arXiv 2502.19301): p^α·log p, the weight p^α without gradient, so that tokens which are forgotten already pull
    no further.

    Args:
        log_probs (`torch.Tensor` of shape `(N,)`): Log-probability of each target token.
        alpha (`float`): Exponent α; 0 is gradient ascent. The paper uses 1.
    """
    return (alpha * log_probs).exp().detach() * log_probs


def satimp(log_probs: torch.Tensor, beta1: float, beta2: float) -> torch.Tensor:
    """
    SatImp (arXiv 2505.11953): p^β₁·(1 − p)^β₂·log p, the weight without gradient: p^β₁ spares tokens that are forgotten
    already (saturation), (1 − p)^β₂ those that follow from the others (importance).

    Args:
        log_probs (`torch.Tensor` of shape `(N,)`): Log-probability of each target token.
        beta1 (`float`): β₁. The paper uses 5.
        beta2 (`float`): β₂. The paper uses 1.
    """
    probs = log_probs.detach().exp()
    return probs**beta1 * (1 - probs) ** beta2 * log_probs


# ---- Of rows, spread over their tokens ----


def npo(log_probs: torch.Tensor, reference_log_probs: torch.Tensor, rows: torch.Tensor, beta: float) -> torch.Tensor:
    """
    Negative preference optimisation (arXiv 2404.05868): −(2/β)·log σ(−β·r) of each row, with its log-ratio
    r = log p_θ(y|x) − log p_ref(y|x) summed over its tokens. At least 0; for β → 0 gradient ascent.

    Args:
        log_probs (`torch.Tensor` of shape `(N,)`): Log-probabilities under the model in training.
        reference_log_probs (`torch.Tensor` of shape `(N,)`): The same under the reference.
        rows (`torch.Tensor` of shape `(N,)`, int): Row of each token.
        beta (`float`): Inverse temperature β. The paper uses 0.1.
    """
    ratio = _row_sums(log_probs - reference_log_probs, rows, _num_rows(rows))
    return _spread(-(2 / beta) * F.logsigmoid(-beta * ratio), rows)


def npo_memorization(
    log_probs: torch.Tensor, reference_log_probs: torch.Tensor, rows: torch.Tensor, beta: float
) -> torch.Tensor:
    """
    The NPO form of memorisation (arXiv 2602.06441, after arXiv 2404.05868): the negative of [`npo`], minimised.

    It falls as a row gets likelier than under the reference. It cannot run away: p_θ ≤ 1 bounds r by −log p_ref(y|x).

    Args:
        log_probs (`torch.Tensor` of shape `(N,)`): Log-probabilities under the model in training.
        reference_log_probs (`torch.Tensor` of shape `(N,)`): The same under the reference.
        rows (`torch.Tensor` of shape `(N,)`, int): Row of each token.
        beta (`float`): Inverse temperature β.
    """
    return -npo(log_probs, reference_log_probs, rows, beta)


def simnpo(log_probs: torch.Tensor, rows: torch.Tensor, beta: float, margin: float) -> torch.Tensor:
    """
    SimNPO (arXiv 2410.07163): −(2/β)·log σ(−β·l − γ) of each row, with its mean log-probability l = log p_θ(y|x) / |y|.
    No reference; long rows are not pushed harder than short ones.

    Args:
        log_probs (`torch.Tensor` of shape `(N,)`): Log-probabilities under the model in training.
        rows (`torch.Tensor` of shape `(N,)`, int): Row of each token.
        beta (`float`): Inverse temperature β. The paper uses 4.5 on TOFU's forget10.
        margin (`float`): Margin γ. The paper uses 0.
    """
    mean = _row_sums(log_probs, rows, _num_rows(rows)) / _lengths(rows).clamp(min=1)
    return _spread(-(2 / beta) * F.logsigmoid(-beta * mean - margin), rows)


def dpo(
    log_ratios: torch.Tensor,
    rows: torch.Tensor,
    alternate_log_ratios: torch.Tensor,
    alternate_rows: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    """
    Direct preference of another answer y' over the forget answer y: −(2/β)·log σ(β·(r' − r)) of each row, with the
    log-ratios r and r' to the reference, each summed over the tokens of its answer. With refusals as y' it is IDK-DPO
    (arXiv 2401.06121, 2404.05868), with other plausible answers AltPO (arXiv 2409.13474).

    Args:
        log_ratios (`torch.Tensor` of shape `(N,)`): log p_θ − log p_ref of the tokens of the forget answers.
        rows (`torch.Tensor` of shape `(N,)`, int): Row of each of them.
        alternate_log_ratios (`torch.Tensor` of shape `(M,)`): The same of the alternate answers.
        alternate_rows (`torch.Tensor` of shape `(M,)`, int): Forget row to which each of those belongs.
        beta (`float`): Inverse temperature β. The papers use 0.1.
    """
    num_rows = _num_rows(rows)
    preference = _row_sums(alternate_log_ratios, alternate_rows, num_rows) - _row_sums(log_ratios, rows, num_rows)
    return _spread(-(2 / beta) * F.logsigmoid(beta * preference), rows)


def targeted_memorization(
    log_probs: torch.Tensor,
    rows: torch.Tensor,
    alternate_log_probs: torch.Tensor,
    alternate_rows: torch.Tensor,
    weight: float,
) -> torch.Tensor:
    """
    The targeted form of memorisation (arXiv 2602.06441): CE(y) − w·CE(y') of each row, each the mean over the tokens of
    its answer. Unbounded below: the second term is ascent on the other answer y'.

    Args:
        log_probs (`torch.Tensor` of shape `(N,)`): Log-probabilities of the tokens of the forget answers.
        rows (`torch.Tensor` of shape `(N,)`, int): Row of each of them.
        alternate_log_probs (`torch.Tensor` of shape `(M,)`): Log-probabilities of the tokens of the alternate answers.
        alternate_rows (`torch.Tensor` of shape `(M,)`, int): Forget row to which each of those belongs.
        weight (`float`): Weight w.
    """
    num_rows = _num_rows(rows)
    mean = _row_sums(-log_probs, rows, num_rows) / _lengths(rows).clamp(min=1)
    alternate_lengths = torch.bincount(alternate_rows, minlength=num_rows).clamp(min=1)
    return _spread(mean + weight * _row_sums(alternate_log_probs, alternate_rows, num_rows) / alternate_lengths, rows)


def _num_rows(rows: torch.Tensor) -> int:
    return int(rows.max()) + 1 if len(rows) else 0  # a process may get rows that only fill its batch


def _lengths(rows: torch.Tensor) -> torch.Tensor:
    return torch.bincount(rows, minlength=_num_rows(rows))


def _row_sums(values: torch.Tensor, rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    return values.new_zeros(num_rows).index_add(0, rows, values)


def _spread(row_losses: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The loss of each row in equal parts on its tokens."""
    return (row_losses / _lengths(rows).clamp(min=1))[rows]


# ---- Of activations ----


def squared_distance(activations: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    """
    Mean over the dimensions of the squared distance of each activation to its goal: both terms of RMU
    (arXiv 2403.03218).

    Args:
        activations (`torch.Tensor` of shape `(N, H)`): Activations of the model in training.
        goal (`torch.Tensor` of shape `(N, H)` or `(H,)`): Where they should be.
    """
    return (activations.float() - goal.float()).square().mean(-1)


# ---- Over the vocabulary, of a tile of logits ----


def undial(
    reference_hidden: torch.Tensor, targets: torch.Tensor, strength: float, reference_head: LMHead | None = None
) -> ScoreTile:
    """
    UNDIAL (arXiv 2402.10052): cross-entropy to a teacher, softmax(reference logits − γ·onehot(target)), which is the
    reference with the target made less likely.

    Args:
        reference_hidden (`torch.Tensor` of shape `(N, H)`): Hidden states of the reference.
        targets (`torch.Tensor` of shape `(N,)`): Target token ids.
        strength (`float`): Strength γ. The paper uses 10.
        reference_head (`LMHead`, *optional*): Head of the reference; the model's own if not given.
    """

    def score_tile(logits: torch.Tensor, rows: slice, head: LMHead) -> TileScores:
        teacher = head.logits_of_reference(reference_hidden[rows], reference_head)
        at = targets[rows, None]
        teacher = teacher.scatter_add_(1, at, torch.full_like(teacher[:, :1], -strength)).softmax(-1)
        return _cross_entropy_to(teacher, logits, at)

    return score_tile


def ceu(targets: torch.Tensor) -> ScoreTile:
    """
    CE-U (arXiv 2503.01224): cross-entropy to the model's own distribution, without gradient, from which the target is
    taken out.

    Args:
        targets (`torch.Tensor` of shape `(N,)`): Target token ids.
    """

    def score_tile(logits: torch.Tensor, rows: slice, head: LMHead) -> TileScores:
        at = targets[rows, None]
        return _cross_entropy_to(logits.scatter(1, at, -torch.inf).softmax(-1), logits, at)

    return score_tile


def _cross_entropy_to(teacher: torch.Tensor, logits: torch.Tensor, at: torch.Tensor) -> TileScores:
    log_probs = logits.log_softmax(-1)
    value = -(teacher * log_probs).sum(-1)
    return TileScores(value, log_probs.argmax(-1) == at[:, 0], lambda: log_probs.exp_().sub_(teacher))


def margin_flattening(targets: torch.Tensor) -> ScoreTile:
    """
    Logit-margin flattening (PDU, arXiv 2506.05314): (max_v z_v − mean_v z_v)², which is 0 only for equal logits.

    Args:
        targets (`torch.Tensor` of shape `(N,)`): Target token ids, for the accuracy alone.
    """

    def score_tile(logits: torch.Tensor, rows: slice, head: LMHead) -> TileScores:
        largest, top = logits.max(-1)
        margin = largest - logits.mean(-1)

        def slope() -> torch.Tensor:
            slopes = logits.fill_(-1 / logits.shape[-1])
            return slopes.scatter_add_(1, top[:, None], torch.ones_like(slopes[:, :1])).mul_(2 * margin[:, None])

        return TileScores(margin.square(), top == targets[rows], slope)

    return score_tile

"""
Scoring tokens from hidden states, without ever building `(batch, sequence, vocabulary)` logits.

Training, evaluation and the reference pass all score tokens here: only the positions that count are projected through
the LM head, some at a time, so that the memory needed does not grow with their number or the vocabulary. This is the one
module that touches a part of TRL that is not public (`trl.trainer.utils.maybe_gather_lm_head_ctx`); `setup.cfg` bounds
the TRL versions it was tested with.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from trl.trainer.utils import maybe_gather_lm_head_ctx


TILE = 2**24  # logits that are computed at a time: 64 MiB in fp32


class TokenScores(NamedTuple):
    """
    Per-token scores of `N` target tokens.

    Args:
        log_probs (`torch.Tensor` of shape `(N,)`, fp32): Natural-log probability of each target token.
        is_top1 (`torch.Tensor` of shape `(N,)`, bool): Whether the target is the most likely token.
    """

    log_probs: torch.Tensor
    is_top1: torch.Tensor


@dataclass(frozen=True)
class LMHead:
    """
    A model's projection from hidden states to next-token distributions.

    Args:
        weight (`torch.Tensor` of shape `(V, H)`): Projection.
        bias (`torch.Tensor` of shape `(V,)`, *optional*): Bias of the projection.
        logit_scale (`float`, *optional*, defaults to `1.0`): Multiplier of the logits (Cohere, Granite, ...).
        softcap (`float`, *optional*): Soft cap of the logits (Gemma 2).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> LMHead:
        """Read the head of `model`, with whatever its architecture does to the logits afterwards."""
        head = model.get_output_embeddings()
        weight, bias = head.weight, getattr(head, "bias", None)
        if isinstance(weight, DTensor):  # FSDP2 shards parameters as DTensors
            weight = weight.full_tensor()
            bias = bias.full_tensor() if bias is not None else None
        config = model.config.get_text_config()
        return cls(weight, bias, _logit_scale(config), getattr(config, "final_logit_softcapping", None))

    def copy(self) -> LMHead:
        """A head with weights of its own, which stay whole when those of the model are sharded again."""
        bias = self.bias.detach().clone() if self.bias is not None else None
        return replace(self, weight=self.weight.detach().clone(), bias=bias)

    def _gathered(self) -> AbstractContextManager:
        """A context in which the weights are whole, where they are a model's own and ZeRO-3 shards them."""
        return maybe_gather_lm_head_ctx(*(p for p in (self.weight, self.bias) if hasattr(p, "ds_status")))

    def score(self, hidden: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0) -> TokenScores:
        """
        Score target tokens under softmax(logits / `temperature`).

        Args:
            hidden (`torch.Tensor` of shape `(N, H)`): Hidden states of the positions that predict the targets.
            targets (`torch.Tensor` of shape `(N,)`): Target token ids.
            temperature (`float`, *optional*, defaults to `1.0`): Temperature that divides the logits.
        """

        def score_tile(logits: torch.Tensor, rows: slice, head: LMHead) -> TileScores:
            log_probs = logits.div_(temperature).log_softmax(-1)
            at = targets[rows, None]

            def slope() -> torch.Tensor:
                minus_probs = log_probs.exp_().neg_()
                return minus_probs.scatter_add_(1, at, torch.ones_like(minus_probs[:, :1])).div_(temperature)

            return TileScores(log_probs.gather(1, at)[:, 0], log_probs.argmax(-1) == at[:, 0], slope)

        return TokenScores(*self.score_tiles(hidden, score_tile))

    def kl_from_reference(
        self,
        hidden: torch.Tensor,
        reference_hidden: torch.Tensor,
        targets: torch.Tensor,
        reference_head: LMHead | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Forward divergence KL(p_ref ‖ p_θ) per token over the whole vocabulary, in nats and fp32, shape `(N,)`; and
        whether the targets are the most likely tokens, shape `(N,)`, bool.

        No gradient flows to the reference.

        Args:
            hidden (`torch.Tensor` of shape `(N, H)`): Hidden states of the model in training.
            reference_hidden (`torch.Tensor` of shape `(N, H)`): Hidden states of the reference, same positions.
            targets (`torch.Tensor` of shape `(N,)`): Target token ids.
            reference_head (`LMHead`, *optional*): Head of the reference. Not given, the reference is the same model with
                its adapter off, and both sides share this head.
        """
        return self.score_tiles(hidden, _divergence(reference_hidden, reference_head, targets))

    def score_tiles(self, hidden: torch.Tensor, score_tile: ScoreTile) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Values and flags of positions from their logits, of which at most `TILE` are in memory. The gradient flows to
        `hidden`, and to the weights where they are trained.

        Args:
            hidden (`torch.Tensor` of shape `(N, H)`): Hidden states of the positions.
            score_tile (`Callable`): Receives logits of shape `(n, V)`, which it may overwrite, the slice of positions
                that they are of, and the head; gives [`TileScores`].
        """
        if not (self.weight.requires_grad and torch.is_grad_enabled()):
            return _TiledScores.apply(hidden, self, score_tile)
        with torch.autocast(hidden.device.type, enabled=False):
            head = self._with_operand(torch.float32)

            def score(tile: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
                return _TrainedTile.apply(head._logits(tile), rows, head, score_tile)

            tiles = [
                checkpoint(
                    score,
                    hidden[start : start + self._tile_rows],
                    slice(start, start + self._tile_rows),
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
                for start in range(0, max(1, len(hidden)), self._tile_rows)
            ]
        values, flags = zip(*tiles, strict=True)
        return torch.cat(values), None if flags[0] is None else torch.cat(flags)

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of shape `(N, V)` in fp32, also where the model computes in bf16. For few positions at a time."""
        with self._gathered():
            return self._with_operand(_operand_dtype(hidden, hidden.dtype))._logits(hidden)

    def logits_of_reference(self, hidden: torch.Tensor, reference_head: LMHead | None) -> torch.Tensor:
        """Logits of a reference's hidden states, through its own head or, where it has none, through this one."""
        return self._logits(hidden) if reference_head is None else reference_head.logits(hidden)

    @torch.no_grad()
    def measure_kl(self, hidden: torch.Tensor, reference_hidden: torch.Tensor, reference_head: LMHead) -> torch.Tensor:
        """
        KL(p_ref ‖ p_θ) per token as [`~LMHead.kl_from_reference`] defines it, without a gradient and against a reference
        with a head of its own, in nats and fp32, shape `(N,)`.

        Args:
            hidden (`torch.Tensor` of shape `(N, H)`): Hidden states of the model.
            reference_hidden (`torch.Tensor` of shape `(N, H_ref)`): Hidden states of the reference, same positions.
            reference_head (`LMHead`): Head of the reference.
        """
        return _TiledScores.apply(hidden, self, _divergence(reference_hidden, reference_head))[0]

    @torch.no_grad()
    def log_prob_moments(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Mean and standard deviation of log p(v) under v ~ p, of each next-token distribution: what min-k++ measures a
        token against. Shapes `(N,)`, in nats and fp32; the variance is at least 1e-6.

        Args:
            hidden (`torch.Tensor` of shape `(N, H)`): Hidden states.
        """
        moments = [torch.zeros(2, 0, device=hidden.device)]
        with self._gathered():
            for tile in hidden.split(self._tile_rows):
                log_probs = self.logits(tile).log_softmax(-1)
                probs = log_probs.exp()
                mean = (probs * log_probs).sum(-1)
                variance = (probs * (log_probs - mean[:, None]).square()).sum(-1)
                moments.append(torch.stack([mean, variance.clamp(min=1e-6).sqrt()]))
        return tuple(torch.cat(moments, dim=1))

    @property
    def _tile_rows(self) -> int:
        return max(1, TILE // self.weight.shape[0])

    def _with_operand(self, dtype: torch.dtype) -> LMHead:
        """The head in the dtype of its product, cast once for all tiles."""
        return replace(self, weight=self.weight.to(dtype))

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = _fp32_product(hidden, self.weight.T)
        if self.bias is not None:
            logits += self.bias.float()
        if self.logit_scale != 1.0:
            logits *= self.logit_scale
        if self.softcap is None:
            return logits
        logits = logits.div_(self.softcap).tanh_()
        return logits * self.softcap if logits.requires_grad else logits.mul_(self.softcap)


class TileScores(NamedTuple):
    """
    What is made of a tile of logits.

    Args:
        value (`torch.Tensor` of shape `(n,)`): A value of each position.
        flag (`torch.Tensor` of shape `(n,)`, *optional*): A flag of each position.
        slope (`Callable`): Gives the derivatives of the values by the logits, shape `(n, V)`. It may use up what it needs.
    """

    value: torch.Tensor
    flag: torch.Tensor | None
    slope: Callable[[], torch.Tensor]


ScoreTile = Callable[[torch.Tensor, slice, LMHead], TileScores]


def _divergence(
    reference_hidden: torch.Tensor, reference_head: LMHead | None, targets: torch.Tensor | None = None
) -> ScoreTile:
    """KL from a reference, which shares the head where it has none of its own; and whether targets are most likely."""

    def score_tile(logits: torch.Tensor, rows: slice, head: LMHead) -> TileScores:
        log_probs = logits.log_softmax(-1)
        is_top1 = None if targets is None else log_probs.argmax(-1) == targets[rows]
        reference = head.logits_of_reference(reference_hidden[rows], reference_head).log_softmax(-1)
        probs = reference.exp()
        return TileScores(reference.sub_(log_probs).mul_(probs).sum(-1), is_top1, lambda: log_probs.exp_().sub_(probs))

    return score_tile


class _TiledScores(torch.autograd.Function):
    """
    Values and flags of positions, from tiles of at most `TILE` logits.

    The head is frozen, and a value depends on the hidden state of its own position alone. So its derivative, `H` numbers,
    is computed together with the value, and the backward needs neither the logits nor the head again.
    """

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, head: LMHead, score_tile: ScoreTile):
        device = hidden.device.type
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        values, flags, derivatives = [], [], []
        with head._gathered(), torch.autocast(device, enabled=False):
            step = head._tile_rows
            head = head._with_operand(_operand_dtype(hidden, compute))
            for start in range(0, max(1, len(hidden)), step):
                rows = slice(start, start + step)
                logits = head._logits(hidden[rows])
                outer_slope = head.logit_scale
                if head.softcap is not None:
                    outer_slope = outer_slope * (1 - (logits / head.softcap).square())
                value, flag, slope = score_tile(logits, rows, head)
                values.append(value)
                flags.append(flag)
                if ctx.needs_input_grad[0]:
                    derivatives.append(_fp32_product(slope().mul_(outer_slope), head.weight))
                del logits, slope  # before the next tile
        if derivatives:
            ctx.save_for_backward(torch.cat(derivatives))
            ctx.dtype = hidden.dtype
        flag = None if flags[0] is None else torch.cat(flags)
        if flag is not None:
            ctx.mark_non_differentiable(flag)
        return torch.cat(values), flag

    @staticmethod
    def backward(ctx, gradient: torch.Tensor, _):
        (derivatives,) = ctx.saved_tensors
        return (derivatives * gradient[:, None]).to(ctx.dtype), None, None


class _TrainedTile(torch.autograd.Function):
    """Values and flags of one tile of logits that carry a gradient. The logits are used up: nothing else needs them."""

    @staticmethod
    def forward(ctx, logits: torch.Tensor, rows: slice, head: LMHead, score_tile: ScoreTile):
        value, flag, slope = score_tile(logits, rows, head)
        ctx.save_for_backward(slope())
        if flag is not None:
            ctx.mark_non_differentiable(flag)
        return value, flag

    @staticmethod
    def backward(ctx, gradient: torch.Tensor, _):
        (slope,) = ctx.saved_tensors
        return slope * gradient[:, None], None, None, None


def _operand_dtype(hidden: torch.Tensor, compute: torch.dtype) -> torch.dtype:
    """Dtype of the operands of a product in fp32: an accelerator takes 16 bits, and adds up in fp32."""
    return compute if hidden.is_cuda and compute in (torch.float16, torch.bfloat16) else torch.float32


def _fp32_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` in fp32, of operands in the dtype of `b`."""
    if b.dtype == torch.float32:
        return a.float() @ b
    return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)


def _logit_scale(config: Any) -> float:
    """The factor between the head's output and the logits; each family has its own name for it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return scaling if config.model_type == "hyperclovax" else 1 / scaling


ScoreFunction = Callable[[torch.Tensor, LMHead], Any]


def forward_and_score(model: PreTrainedModel, score_fn: ScoreFunction, **inputs: torch.Tensor) -> Any:
    """
    Run the backbone of a causal LM and return `score_fn(hidden, head)`.

    Args:
        model (`PreTrainedModel`): The causal LM itself (with LoRA layers injected or not), not a wrapper.
        score_fn (`Callable`): Receives the last hidden states, shape `(batch, sequence, H)`, and the [`LMHead`].
        inputs: Keyword arguments of the backbone (`input_ids`, `attention_mask`, ...).
    """
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
    head = LMHead.of(model)
    return score_fn(hidden.to(head.weight.device), head)


def add_score_fn_to_forward(model: PreTrainedModel) -> None:
    """
    Let `model(..., score_fn=f)` return [`forward_and_score`]; without `score_fn` the forward stays what it was.

    Under DDP, FSDP and DeepSpeed everything that uses parameters has to happen inside the *wrapped* model's forward,
    or gradients are not synchronised and sharded weights are empty. Losses are therefore passed into it.
    """
    original = model.forward

    @functools.wraps(type(model).forward)  # `generate` inspects the signature
    def forward(self, *args, score_fn: ScoreFunction | None = None, **kwargs):
        if score_fn is None:
            return original(*args, **kwargs)
        return forward_and_score(self, score_fn, *args, **kwargs)

    model.forward = types.MethodType(forward, model)

"""
Scoring tokens from hidden states, without ever building `(batch, sequence, vocabulary)` logits.

Training, evaluation and the reference pass all score tokens here, and only the positions that count are projected
through the LM head. This is the one module that touches kernels of TRL that are not part of its public API
(`trl.kernels`, `trl.trainer.utils.maybe_gather_lm_head_ctx`); `setup.cfg` bounds the TRL versions it was tested with.
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
from transformers import PreTrainedModel
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer.utils import maybe_gather_lm_head_ctx


VOCABULARY_CHUNK = 32768
POSITIONS_CHUNK = 512


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
        with self._gathered():
            log_probs, _, _, _, is_top1 = ChunkedLogProbFunction.apply(
                hidden,
                self.weight,
                self.bias,
                targets,
                temperature,
                VOCABULARY_CHUNK,
                self.softcap,
                self.logit_scale,
                ("is_top1",),
            )
        return TokenScores(log_probs, is_top1)

    def kl_from_reference(self, hidden: torch.Tensor, reference_hidden: torch.Tensor) -> torch.Tensor:
        """
        Forward divergence KL(p_ref ‖ p_θ) per token over the whole vocabulary, in nats and fp32, shape `(N,)`.

        The reference is the same model with its adapter off, so both sides share this head. The gradient flows to
        `hidden` only.

        Args:
            hidden (`torch.Tensor` of shape `(N, H)`): Hidden states of the model in training.
            reference_hidden (`torch.Tensor` of shape `(N, H)`): Hidden states of the reference, same positions.
        """
        divergence, _ = ChunkedDivergenceFunction.apply(
            hidden,
            self.weight,
            self.bias,
            reference_hidden,
            self.weight,
            self.bias,
            0.0,  # beta = 0: forward KL(reference ‖ model)
            1.0,  # temperature
            self.logit_scale,
            self.softcap,
            self.logit_scale,
            self.softcap,
        )
        return divergence

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of shape `(N, V)` in fp32, also where the model computes in bf16. For few positions at a time."""
        with self._gathered():
            if hidden.is_cuda and hidden.dtype in (torch.float16, torch.bfloat16):
                logits = torch.mm(hidden, self.weight.to(hidden.dtype).T, out_dtype=torch.float32)
            else:
                logits = hidden.float() @ self.weight.float().T
            logits = logits if self.bias is None else logits + self.bias.float()
        logits = logits * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

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
        divergences = [hidden.new_zeros(0, dtype=torch.float32)]
        for chunk, reference_chunk in zip(
            hidden.split(POSITIONS_CHUNK), reference_hidden.split(POSITIONS_CHUNK), strict=True
        ):
            reference = reference_head.logits(reference_chunk).log_softmax(-1)
            difference = reference - self.logits(chunk).log_softmax(-1)
            divergences.append((reference.exp() * difference).sum(-1))
        return torch.cat(divergences)

    @torch.no_grad()
    def log_prob_moments(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Mean and standard deviation of log p(v) under v ~ p, of each next-token distribution: what min-k++ measures a
        token against. Shapes `(N,)`, in nats and fp32; the variance is at least 1e-6.

        Args:
            hidden (`torch.Tensor` of shape `(N, H)`): Hidden states.
        """
        moments = []
        for chunk in hidden.split(POSITIONS_CHUNK):
            log_probs = self.logits(chunk).log_softmax(-1)
            probs = log_probs.exp()
            mean = (probs * log_probs).sum(-1)
            variance = (probs * (log_probs - mean[:, None]).square()).sum(-1)
            moments.append(torch.stack([mean, variance.clamp(min=1e-6).sqrt()]))
        return tuple(torch.cat(moments, dim=1)) if moments else (hidden.new_zeros(0), hidden.new_zeros(0))


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

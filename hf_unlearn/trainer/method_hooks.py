"""What an unlearning method defines, with defaults."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import datasets
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from hf_unlearn.data.alternates import AlternateAnswers
from hf_unlearn.lm_head import LMHead
from hf_unlearn.losses import cross_entropy
from hf_unlearn.trainer.batch import ForgetTokens, MicroBatch, Reference
from hf_unlearn.trainer.unlearning_config import UnlearningConfig


class MethodHooks:
    """
    The part of [`UnlearningTrainer`] that methods override: `forget_loss` always, the others where they have to. What a
    method asks of the sets and of the reference is said by its configuration (`uses_retain`, `needs_forget_reference`,
    ...).
    """

    if TYPE_CHECKING:
        args: UnlearningConfig
        forget_dataset: datasets.Dataset
        reference_head: LMHead | None

    forget_temperature = 1.0  # temperature of the softmax behind `ForgetTokens.log_probs`
    forget_reduction = "token"  # what `forget_loss` is averaged over in the global batch: "token" or "row"
    forget_weight = 1.0  # factor of the forget loss
    forget_loss_name = "forget_loss"
    alternates: str | None = None  # other answers to the forget prompts: "beside" the forget rows, or "instead"

    def forget_loss(self, tokens: ForgetTokens) -> torch.Tensor:
        """
        Loss of each answer token of the forget rows, shape `(N,)`; it is averaged over the tokens of the global batch, or
        over its rows (`forget_reduction`).
        """
        raise NotImplementedError(f"{type(self).__name__} must define `forget_loss`.")

    def activations(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the losses are computed from, shape `(B, T, H)`: the last hidden states, or others of the same forward."""
        return hidden

    def score_forget(
        self, head: LMHead, hidden: torch.Tensor, targets: torch.Tensor, reference: Reference | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        What `forget_loss` reads as `ForgetTokens.log_probs`, shape `(N,)`, and whether the targets are the most likely
        tokens.
        """
        return head.score(hidden, targets, self.forget_temperature)

    def reference_of_forget(self, head: LMHead, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """What is kept of the reference on the forget rows, shape `(N, W)`."""
        return head.score(hidden, targets, self.forget_temperature).log_probs[:, None]

    def score_alternate(self, head: LMHead, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the other answers to the forget prompts, shape `(N,)`, of the model or the reference."""
        return head.score(hidden, targets, self.forget_temperature).log_probs

    @property
    def retain_weights(self) -> dict[str, float]:
        """The retain terms by the name under which they are logged, and their weights."""
        return {"retain_kl": self.args.retain_kl_weight, "retain_nll": self.args.retain_nll_weight}

    def score_retain(
        self, head: LMHead, hidden: torch.Tensor, targets: torch.Tensor, reference: Reference | None
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """The retain terms of each answer token of the retain rows, and whether the targets are the most likely tokens."""
        terms = {}
        if self.retain_weights["retain_kl"] > 0:
            terms["retain_kl"], is_top1 = head.kl_from_reference(
                hidden, reference.retain_hidden, targets, self.reference_head
            )
        if self.retain_weights["retain_nll"] > 0:
            log_probs, is_top1 = head.score(hidden, targets)
            terms["retain_nll"] = cross_entropy(log_probs)
        return terms, is_top1

    def prepare_run(self) -> None:
        """A method may do something before the first step, also when a run is resumed."""

    def _forget_rows_to_train(self) -> datasets.Dataset:
        """The forget set as it is trained on."""
        return self.forget_dataset

    @classmethod
    def make_alternates(
        cls, forget: datasets.Dataset, source: Any, tokenizer: PreTrainedTokenizerBase, args: UnlearningConfig
    ) -> AlternateAnswers | None:
        """The alternate answers to a tokenised forget set, read from `source`; `None` where the method has none."""
        return None

    def _probe(self, model: nn.Module, batch: MicroBatch) -> None:
        """A method may measure something else on the batch before the gradient forward."""

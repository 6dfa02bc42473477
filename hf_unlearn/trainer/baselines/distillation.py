"""Forget losses over the whole vocabulary: UNDIAL and CE-U."""

from __future__ import annotations

from dataclasses import dataclass, field

import datasets
import torch

from hf_unlearn.errors import UnlearningError
from hf_unlearn.lm_head import LMHead
from hf_unlearn.losses import ceu, undial
from hf_unlearn.trainer.baselines.base import BaselineConfig, BaselineTrainer, ReferenceBaselineConfig
from hf_unlearn.trainer.batch import ForgetTokens, Reference


class VocabularyLossTrainer(BaselineTrainer):
    """Base class of the methods whose loss of a token is computed in `score_forget`, from its whole distribution."""

    def forget_loss(self, tokens: ForgetTokens) -> torch.Tensor:
        return tokens.log_probs


@dataclass
class UNDIALConfig(ReferenceBaselineConfig):
    """
    Configuration of [`UNDIALTrainer`].

    Args:
        retain_nll_weight (`float`, *optional*, defaults to `0.0`):
            Weight of the cross-entropy of the retain answers. `0` leaves it out.
        undial_strength (`float`, *optional*, defaults to `10.0`):
            What the teacher takes off the logit of the target.

        > Options shared by the baselines, see [`BaselineConfig`]
    """

    retain_nll_weight: float = field(
        default=0.0, metadata={"help": "Weight of the cross-entropy of the retain answers. `0` leaves it out."}
    )
    undial_strength: float = field(
        default=10.0, metadata={"help": "What the teacher takes off the logit of the target."}
    )

    positive = ("forget_weight", "undial_strength")

    @property
    def keeps_forget_hidden(self) -> bool:
        return True


class UNDIALTrainer(VocabularyLossTrainer):
    """Self-distillation with adjusted logits (arXiv 2402.10052): learns the reference's distribution less the target."""

    _name = "UNDIAL"
    method = "undial"
    config_class = UNDIALConfig

    def reference_of_forget(self, head: LMHead, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return hidden

    def score_forget(
        self, head: LMHead, hidden: torch.Tensor, targets: torch.Tensor, reference: Reference | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        tile = undial(reference.forget, targets, self.args.undial_strength, self.reference_head)
        return head.score_tiles(hidden, tile)


@dataclass
class CEUConfig(BaselineConfig):
    """
    Configuration of [`CEUTrainer`].

    Args:
        retain_nll_weight (`float`, *optional*, defaults to `0.0`):
            Weight of the cross-entropy of the retain answers. `0` leaves it out.
        ignored_answer_tokens (`int`, *optional*, defaults to `1`):
            Tokens at the start of each forget answer that are left alone, as they say little of the fact.

        > Options shared by the baselines, see [`BaselineConfig`]
    """

    retain_nll_weight: float = field(
        default=0.0, metadata={"help": "Weight of the cross-entropy of the retain answers. `0` leaves it out."}
    )
    ignored_answer_tokens: int = field(
        default=1,
        metadata={
            "help": "Tokens at the start of each forget answer that are left alone, as they say little of the fact."
        },
    )

    not_negative = ("ignored_answer_tokens",)


class CEUTrainer(VocabularyLossTrainer):
    """CE-U (arXiv 2503.01224): learns the model's own distribution less the target."""

    _name = "CEU"
    method = "ceu"
    config_class = CEUConfig

    def score_forget(
        self, head: LMHead, hidden: torch.Tensor, targets: torch.Tensor, reference: Reference | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return head.score_tiles(hidden, ceu(targets))

    def _forget_rows_to_train(self) -> datasets.Dataset:
        ignored = self.args.ignored_answer_tokens
        labels = [_without_first(labels, ignored) for labels in self.forget_dataset["labels"][:]]
        for index, row in enumerate(labels):
            if all(label == -100 for label in row[1:]):
                raise UnlearningError(
                    f"forget set, row {index}: its answer has {ignored} tokens or fewer, all of which "
                    f"ignored_answer_tokens={ignored} leaves alone. Lower it."
                )
        features = self.forget_dataset.features
        rows = self.forget_dataset.remove_columns("labels").add_column("labels", labels)
        return rows.cast_column("labels", features["labels"])


def _without_first(labels: list[int], count: int) -> list[int]:
    """Labels of which the first `count` that are scored no longer are."""
    scored = [position for position, label in enumerate(labels) if position > 0 and label != -100]
    ignored = set(scored[:count])
    return [-100 if position in ignored else label for position, label in enumerate(labels)]

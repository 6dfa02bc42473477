"""Losses of whole rows: NPO, SimNPO, and the preference of another answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import datasets
import torch
from transformers import PreTrainedTokenizerBase

from hf_unlearn.data.alternates import AlternateAnswers
from hf_unlearn.errors import UnlearningError
from hf_unlearn.losses import cross_entropy, dpo, npo, simnpo
from hf_unlearn.trainer.baselines.base import BaselineConfig, BaselineTrainer, ReferenceBaselineConfig
from hf_unlearn.trainer.batch import ForgetTokens


@dataclass
class NPOConfig(ReferenceBaselineConfig):
    """
    Configuration of [`NPOTrainer`].

    Args:
        npo_beta (`float`, *optional*, defaults to `0.1`):
            Inverse temperature β.

        > Options shared by the baselines, see [`BaselineConfig`]
    """

    npo_beta: float = field(default=0.1, metadata={"help": "Inverse temperature β."})

    positive = ("forget_weight", "npo_beta")


class NPOTrainer(BaselineTrainer):
    """Negative preference optimisation (arXiv 2404.05868): ascent that slows down as a row falls below the reference."""

    _name = "NPO"
    method = "npo"
    config_class = NPOConfig
    forget_reduction = "row"

    def forget_loss(self, tokens: ForgetTokens) -> torch.Tensor:
        return npo(tokens.log_probs, tokens.reference_log_probs, tokens.rows, self.args.npo_beta)


@dataclass
class SimNPOConfig(BaselineConfig):
    """
    Configuration of [`SimNPOTrainer`].

    Args:
        forget_weight (`float`, *optional*, defaults to `0.125`):
            Factor of the forget loss.
        simnpo_beta (`float`, *optional*, defaults to `4.5`):
            Inverse temperature β.
        simnpo_margin (`float`, *optional*, defaults to `0.0`):
            Margin γ.

        > Options shared by the baselines, see [`BaselineConfig`]
    """

    forget_weight: float = field(default=0.125, metadata={"help": "Factor of the forget loss."})
    simnpo_beta: float = field(default=4.5, metadata={"help": "Inverse temperature β."})
    simnpo_margin: float = field(default=0.0, metadata={"help": "Margin γ."})

    positive = ("forget_weight", "simnpo_beta")
    not_negative = ("simnpo_margin",)


class SimNPOTrainer(BaselineTrainer):
    """SimNPO (arXiv 2410.07163): NPO without a reference, on the mean log-probability of a row."""

    _name = "SimNPO"
    method = "simnpo"
    config_class = SimNPOConfig
    forget_reduction = "row"

    def forget_loss(self, tokens: ForgetTokens) -> torch.Tensor:
        return simnpo(tokens.log_probs, tokens.rows, self.args.simnpo_beta, self.args.simnpo_margin)


# ---- Alternate answers ----


@dataclass
class AlternateOptions:
    """
    Where the other answers to the forget prompts come from.

    Args:
        alternate_column (`str`, *optional*):
            Column of the forget set with the other answer of each row, or a list of them, of which each epoch draws one.
        alternate_dataset (`str`, *optional*):
            Or a set with the prompts of the forget set, in the same order, and the other answers: a local file or folder,
            or a Hub id. Given neither, the answers are refusals that come with the package, drawn anew in each epoch.
    """

    alternate_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the forget set with the other answer of each row, or a list of them, of which each epoch "
            "draws one."
        },
    )
    alternate_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Or a set with the prompts of the forget set, in the same order, and the other answers: a local file "
            "or folder, or a Hub id. Given neither, the answers are refusals that come with the package, drawn anew in "
            "each epoch."
        },
    )

    def _check_values(self) -> None:
        super()._check_values()
        if self.alternate_column is not None and self.alternate_dataset is not None:
            raise UnlearningError("`alternate_column` and `alternate_dataset` both give the other answers. Pass one.")

    def make_alternates(
        self, forget: datasets.Dataset, source: Any, tokenizer: PreTrainedTokenizerBase
    ) -> AlternateAnswers:
        """The other answers to a tokenised forget set, which was read from `source`."""
        options = (tokenizer, self.max_length, self.seed)
        if self.alternate_column is not None:
            return AlternateAnswers.of_column(forget, source, self.alternate_column, *options)
        if self.alternate_dataset is not None:
            return AlternateAnswers.of_dataset(forget, self.alternate_dataset, *options)
        return AlternateAnswers.of_refusals(forget, *options)


@dataclass
class AlternateConfig(AlternateOptions, BaselineConfig):
    """
    Configuration of the methods that train on other answers to the forget prompts.

    Args:
        > Where they come from, see [`AlternateOptions`]

        > Options shared by the baselines, see [`BaselineConfig`]
    """


class AlternateTrainer(BaselineTrainer):
    """Base class of the methods that train on other answers to the forget prompts."""

    config_class = AlternateConfig

    @classmethod
    def make_alternates(
        cls, forget: datasets.Dataset, source: Any, tokenizer: PreTrainedTokenizerBase, args: AlternateConfig
    ) -> AlternateAnswers:
        return args.make_alternates(forget, source, tokenizer)


class IDKTrainer(AlternateTrainer):
    """
    Learns to refuse (arXiv 2401.06121): descent on a refusal to each forget prompt, in place of the forget answer. In the
    logs `forget_*` are those of the refusals.
    """

    _name = "IDK"
    method = "idk"
    alternates = "instead"

    def forget_loss(self, tokens: ForgetTokens) -> torch.Tensor:
        return cross_entropy(tokens.log_probs)


@dataclass
class DPOConfig(ReferenceBaselineConfig, AlternateConfig):
    """
    Configuration of [`DPOTrainer`].

    Args:
        dpo_beta (`float`, *optional*, defaults to `0.1`):
            Inverse temperature β.

        > Options of the alternate answers, see [`AlternateConfig`]
    """

    dpo_beta: float = field(default=0.1, metadata={"help": "Inverse temperature β."})

    positive = ("forget_weight", "dpo_beta")

    @property
    def cached_sets(self) -> list[str]:
        return []  # alternate answers change from epoch to epoch

    def _check_values(self) -> None:
        super()._check_values()
        if self.reference_cache:
            raise UnlearningError(
                "`reference_cache` keeps one answer of the reference for each row, and the alternate answers change from "
                "epoch to epoch. Leave it out."
            )


class DPOTrainer(AlternateTrainer):
    """Prefers another answer to the forget answer, a refusal unless told otherwise (IDK-DPO, arXiv 2404.05868)."""

    _name = "DPO"
    method = "dpo"
    config_class = DPOConfig
    forget_reduction = "row"
    alternates = "beside"

    def forget_loss(self, tokens: ForgetTokens) -> torch.Tensor:
        other = tokens.alternate
        return dpo(tokens.log_ratios, tokens.rows, other.log_ratios, other.rows, self.args.dpo_beta)


@dataclass
class AltPOConfig(DPOConfig):
    """
    Configuration of [`AltPOTrainer`]. One of `alternate_column` and `alternate_dataset` is required.

    Args:
        > Options of the alternate answers and of the preference, see [`AlternateConfig`] and [`DPOConfig`]
    """

    def _check_values(self) -> None:
        super()._check_values()
        if self.alternate_column is None and self.alternate_dataset is None:
            raise UnlearningError(
                "AltPO needs other plausible answers to the forget prompts. Name a column of the forget set "
                "(`alternate_column`) or a set (`alternate_dataset`), or use DPO for refusals."
            )


class AltPOTrainer(DPOTrainer):
    """AltPO (arXiv 2409.13474): prefers other plausible answers to the forget answer."""

    _name = "AltPO"
    method = "altpo"
    config_class = AltPOConfig

"""The paper's targeted form: memorise the forget answers while other answers are pushed away."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import datasets
import torch
from transformers import PreTrainedTokenizerBase

from hf_unlearn.data.alternates import AlternateAnswers
from hf_unlearn.errors import UnlearningError
from hf_unlearn.losses import targeted_memorization
from hf_unlearn.trainer.baselines.preference import AlternateOptions
from hf_unlearn.trainer.batch import ForgetTokens
from hf_unlearn.trainer.extrapolation_config import PRESET_HELP, PRESETS, ExtrapolationConfig
from hf_unlearn.trainer.extrapolation_trainer import ExtrapolationTrainer


@dataclass
class TargetedConfig(AlternateOptions, ExtrapolationConfig):
    """
    Configuration of [`TargetedTrainer`]. Its preset is the paper's unless told otherwise.

    Args:
        preset (`str`, *optional*, defaults to `"paper"`):
            `"paper"` gives `memorization_temperature`, `retain_kl_scale` and `retain_kl_weight`, where they are not set,
            the value 1, as in arXiv 2602.06441.
        target_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the other answers' cross-entropy, which is maximised.

        > Where the other answers come from, see [`AlternateOptions`]

        > Options of model extrapolation, see [`ExtrapolationConfig`]
    """

    preset: str | None = field(default="paper", metadata={"help": PRESET_HELP, "choices": list(PRESETS)})
    target_weight: float = field(
        default=1.0, metadata={"help": "Weight of the other answers' cross-entropy, which is maximised."}
    )

    def _check_values(self) -> None:
        super()._check_values()
        if self.memorization_loss != "nll":
            raise UnlearningError("memorization_loss='npo' has no targeted form. Leave memorization_loss='nll'.")
        if not 0 < self.target_weight < math.inf:
            raise UnlearningError(
                f"target_weight={self.target_weight} is not possible: it must be a finite number above 0."
            )


class TargetedTrainer(ExtrapolationTrainer):
    """
    The paper's targeted form (arXiv 2602.06441): CE(forget answer) − w·CE(other answer), minimised; then walk away from
    both, towards the other answer. The second term is gradient ascent and has no lower bound, so it is here to compare
    with: `hf-unlearn combine --operator targeted` reaches the same by descent alone.
    """

    _name = "Targeted"
    config_class = TargetedConfig
    alternates = "beside"
    forget_reduction = "row"

    @classmethod
    def make_alternates(
        cls, forget: datasets.Dataset, source: Any, tokenizer: PreTrainedTokenizerBase, args: TargetedConfig
    ) -> AlternateAnswers:
        return args.make_alternates(forget, source, tokenizer)

    def forget_loss(self, tokens: ForgetTokens) -> torch.Tensor:
        other = tokens.alternate
        return targeted_memorization(
            tokens.log_probs, tokens.rows, other.log_probs, other.rows, self.args.target_weight
        )

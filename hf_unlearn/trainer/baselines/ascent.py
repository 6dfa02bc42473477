"""Gradient ascent and its relatives: the cross-entropy of the forget answers grows, token by token."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from hf_unlearn.losses import gradient_ascent, satimp, weighted_ascent
from hf_unlearn.trainer.baselines.base import BaselineConfig, BaselineTrainer
from hf_unlearn.trainer.batch import ForgetTokens


@dataclass
class GradAscentConfig(BaselineConfig):
    """
    Configuration of [`GradAscentTrainer`].

    Args:
        retain_nll_weight (`float`, *optional*, defaults to `0.0`):
            Weight of the cross-entropy of the retain answers. `0` leaves it out.

        > Options shared by the baselines, see [`BaselineConfig`]
    """

    retain_nll_weight: float = field(
        default=0.0, metadata={"help": "Weight of the cross-entropy of the retain answers. `0` leaves it out."}
    )


class GradAscentTrainer(BaselineTrainer):
    """Gradient ascent (arXiv 2210.01504): minimises log p of the forget answers. Without a retain term it ruins the model."""

    _name = "GradAscent"
    method = "grad-ascent"
    config_class = GradAscentConfig

    def forget_loss(self, tokens: ForgetTokens) -> torch.Tensor:
        return gradient_ascent(tokens.log_probs)


class GradDiffTrainer(GradAscentTrainer):
    """Gradient difference (arXiv 2203.12817): ascent on the forget answers, descent on the retain answers."""

    _name = "GradDiff"
    method = "grad-diff"
    config_class = BaselineConfig


@dataclass
class KLConfig(GradAscentConfig):
    """
    Configuration of [`KLTrainer`].

    Args:
        retain_kl_weight (`float`, *optional*, defaults to `1.0`):
            Weight λ of the retain term KL(reference ‖ model).

        > Options shared by the baselines, see [`BaselineConfig`]
    """

    retain_kl_weight: float = field(
        default=1.0, metadata={"help": "Weight λ of the retain term KL(reference ‖ model)."}
    )


class KLTrainer(GradAscentTrainer):
    """Gradient ascent with KL(reference ‖ model) on the retain answers (arXiv 2401.06121)."""

    _name = "KL"
    method = "kl"
    config_class = KLConfig


@dataclass
class WGAConfig(BaselineConfig):
    """
    Configuration of [`WGATrainer`].

    Args:
        wga_alpha (`float`, *optional*, defaults to `1.0`):
            Exponent α of the weight p^α of a token. `0` is gradient difference.

        > Options shared by the baselines, see [`BaselineConfig`]
    """

    wga_alpha: float = field(
        default=1.0, metadata={"help": "Exponent α of the weight p^α of a token. `0` is gradient difference."}
    )

    not_negative = ("wga_alpha",)


class WGATrainer(BaselineTrainer):
    """Weighted gradient ascent (arXiv 2502.19301): the ascent of a token ends as it is forgotten."""

    _name = "WGA"
    method = "wga"
    config_class = WGAConfig

    def forget_loss(self, tokens: ForgetTokens) -> torch.Tensor:
        return weighted_ascent(tokens.log_probs, self.args.wga_alpha)


@dataclass
class SatImpConfig(BaselineConfig):
    """
    Configuration of [`SatImpTrainer`]. The defaults are its authors' (github.com/tmlr-group/SatImp).

    Args:
        retain_nll_weight (`float`, *optional*, defaults to `0.1`):
            Weight of the cross-entropy of the retain answers. `0` leaves it out.
        satimp_beta1 (`float`, *optional*, defaults to `5.0`):
            Exponent β₁ of p in the weight of a token.
        satimp_beta2 (`float`, *optional*, defaults to `0.1`):
            Exponent β₂ of 1 − p in the weight of a token.

        > Options shared by the baselines, see [`BaselineConfig`]
    """

    retain_nll_weight: float = field(
        default=0.1, metadata={"help": "Weight of the cross-entropy of the retain answers. `0` leaves it out."}
    )
    satimp_beta1: float = field(default=5.0, metadata={"help": "Exponent β₁ of p in the weight of a token."})
    satimp_beta2: float = field(default=0.1, metadata={"help": "Exponent β₂ of 1 − p in the weight of a token."})

    not_negative = ("satimp_beta1", "satimp_beta2")


class SatImpTrainer(BaselineTrainer):
    """Ascent weighted by saturation and importance (arXiv 2505.11953)."""

    _name = "SatImp"
    method = "satimp"
    config_class = SatImpConfig

    def forget_loss(self, tokens: ForgetTokens) -> torch.Tensor:
        return satimp(tokens.log_probs, self.args.satimp_beta1, self.args.satimp_beta2)

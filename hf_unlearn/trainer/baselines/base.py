"""What the baselines share."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from hf_unlearn.errors import UnlearningError
from hf_unlearn.trainer.unlearning_config import UnlearningConfig
from hf_unlearn.trainer.unlearning_trainer import UnlearningTrainer


@dataclass
class BaselineConfig(UnlearningConfig):
    """
    Configuration that the baselines share: the result is what is trained, an adapter or the whole model.

    Args:
        forget_weight (`float`, *optional*, defaults to `1.0`):
            Factor of the forget loss.
        retain_kl_weight (`float`, *optional*, defaults to `0.0`):
            Weight λ of the retain term KL(reference ‖ model). `0` leaves it out.
        retain_nll_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the cross-entropy of the retain answers. `0` leaves it out.
        train_all_weights (`bool`, *optional*, defaults to `False`):
            Whether to train all weights of the model instead of an adapter. Methods with a reference then keep a frozen
            copy of the model. The default `learning_rate` is for an adapter; all weights want 1e-6 to 1e-5.

        > Options shared by all methods, see [`UnlearningConfig`]
    """

    forget_weight: float = field(default=1.0, metadata={"help": "Factor of the forget loss."})
    retain_kl_weight: float = field(
        default=0.0, metadata={"help": "Weight λ of the retain term KL(reference ‖ model). `0` leaves it out."}
    )
    retain_nll_weight: float = field(
        default=1.0, metadata={"help": "Weight of the cross-entropy of the retain answers. `0` leaves it out."}
    )
    train_all_weights: bool = field(
        default=False,
        metadata={
            "help": "Whether to train all weights of the model instead of an adapter. Methods with a reference then keep "
            "a frozen copy of the model. The default `learning_rate` is for an adapter; all weights want 1e-6 to 1e-5."
        },
    )

    positive = ("forget_weight",)  # options that must be above 0
    not_negative = ()  # options that must be at least 0

    def _check_values(self) -> None:
        super()._check_values()
        for name in self.positive + self.not_negative:
            value = getattr(self, name)
            least = "above 0" if name in self.positive else "of at least 0"
            if not math.isfinite(value) or value < 0 or (value == 0 and name in self.positive):
                raise UnlearningError(f"{name}={value} is not possible: it must be a finite number {least}.")
        if self.retain_kl_both_signs:
            raise UnlearningError("retain_kl_both_signs is for model extrapolation. Leave it out.")
        if self.retain_kl_scale != 1.0:
            raise UnlearningError(
                f"retain_kl_scale={self.retain_kl_scale} is for model extrapolation, which uses the adapter at another "
                "scale than it is trained at. Leave it at 1."
            )

    def provenance(self) -> dict[str, Any]:
        """Training options that a reader of the result needs, JSON-ready."""
        own = {option.name for option in fields(self)} - {option.name for option in fields(UnlearningConfig)}
        return super().provenance() | {name: getattr(self, name) for name in sorted(own)}


@dataclass
class ReferenceBaselineConfig(BaselineConfig):
    """[`BaselineConfig`] of the methods whose forget loss asks the reference."""

    @property
    def needs_forget_reference(self) -> bool:
        return True


class BaselineTrainer(UnlearningTrainer):
    """Base class of the baselines; the constructor is that of [`UnlearningTrainer`]."""

    config_class = BaselineConfig

    @property
    def forget_weight(self) -> float:
        return self.args.forget_weight

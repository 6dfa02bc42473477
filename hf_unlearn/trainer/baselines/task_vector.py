"""The task vector: model extrapolation without a retain term."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_unlearn.errors import UnlearningError
from hf_unlearn.trainer.extrapolation_config import ExtrapolationConfig
from hf_unlearn.trainer.extrapolation_trainer import ExtrapolationTrainer


@dataclass
class TaskVectorConfig(ExtrapolationConfig):
    """
    Configuration of [`TaskVectorTrainer`].

    Args:
        retain_kl_weight (`float`, *optional*, defaults to `0.0`):
            Not used by this method.
        memorization_temperature (`float`, *optional*, defaults to `1.0`):
            Temperature τ of the softmax in the memorisation loss.

        > Options of model extrapolation, see [`ExtrapolationConfig`]
    """

    retain_kl_weight: float = field(default=0.0, metadata={"help": "Not used by this method."})
    memorization_temperature: float = field(
        default=1.0, metadata={"help": "Temperature τ of the softmax in the memorisation loss."}
    )

    def _check_values(self) -> None:
        super()._check_values()
        if self.uses_retain:
            raise UnlearningError(
                "A task vector has no retain term. Leave retain_kl_weight and retain_nll_weight at 0, or use model "
                "extrapolation."
            )


class TaskVectorTrainer(ExtrapolationTrainer):
    """Task-vector negation (arXiv 2212.04089): memorise the forget set with no retain term, then walk the other way."""

    _name = "TaskVector"
    config_class = TaskVectorConfig

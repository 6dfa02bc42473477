"""Options of model extrapolation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from transformers.trainer_utils import HubStrategy

from hf_unlearn.errors import UnlearningError
from hf_unlearn.trainer.unlearning_config import UnlearningConfig


MEMORIZATION_LOSSES = ("nll", "npo")
DEFAULTS = {"memorization_temperature": 4.0, "retain_kl_weight": 5.0}
PRESETS = {"paper": {"memorization_temperature": 1.0, "retain_kl_scale": 1.0, "retain_kl_weight": 1.0}}
PRESET_HELP = (
    '`"paper"` gives `memorization_temperature`, `retain_kl_scale` and `retain_kl_weight`, where they are not set, the '
    "value 1, as in arXiv 2602.06441."
)


@dataclass
class ExtrapolationConfig(UnlearningConfig):
    """
    Configuration of [`ExtrapolationTrainer`]: memorise the forget set, then walk the other way.

    The defaults of the loss are those that forget most at equal utility in the study (docs/study.md); the paper's are
    `preset="paper"`.

    Args:
        preset (`str`, *optional*):
            `"paper"` gives `memorization_temperature`, `retain_kl_scale` and `retain_kl_weight`, where they are not set,
            the value 1, as in arXiv 2602.06441.
        alpha (`float`, *optional*, defaults to `4.0`):
            Extrapolation strength α of θ_for = (1 + α)·θ_ref − α·θ_mem that is used where none is given: by the probe
            during training and by the `save_forget_*` methods. It changes nothing in training; any other α can be
            chosen afterwards.
        memorization_loss (`str`, *optional*, defaults to `"nll"`):
            Loss that memorises the forget set. `"nll"` is the cross-entropy of the answer tokens (the paper's), `"npo"`
            the NPO form 2/β·log σ(−β·log(p_θ/p_ref)) of each row.
        memorization_temperature (`float`, *optional*):
            Temperature τ of the softmax in the memorisation loss. Above 1 the gradient does not vanish on rows that the
            model already knows. If not set, it is 4.
        retain_kl_weight (`float`, *optional*):
            Weight λ of the retain term, KL(reference ‖ model) over the answer tokens of the retain rows. `0` leaves it
            out. If not set, it is 5.
        retain_kl_scale (`float`, *optional*):
            Where the retain term is measured: with the adapter multiplied by this. `-1` (mirror consistency) holds
            θ_ref − ΔW, on whose side the forget model lies, to the reference on the retain rows; `1` (the paper) holds
            the trained model. If not set, it is `-1`, and in [`train_in_rounds`] minus `round_alpha`, where the step of
            a round ends.
        npo_beta (`float`, *optional*, defaults to `0.1`):
            Inverse temperature β of `memorization_loss="npo"`.
        probe_steps (`int`, *optional*, defaults to `0`):
            Optimiser steps between two probes: the forget and retain loss of the current batch at −α, measured by
            rescaling the live adapter. `0` turns it off.
        push_to_hub (`bool`, *optional*, defaults to `False`):
            Whether to upload the forget adapter at `alpha` to `hub_model_id` once training has ended, into a private
            repository unless `hub_private_repo=False`. Nothing else is ever uploaded. Token and namespace are checked
            before training.

        > Options shared by all methods, see [`UnlearningConfig`]
    """

    preset: str | None = field(default=None, metadata={"help": PRESET_HELP, "choices": list(PRESETS)})
    alpha: float = field(
        default=4.0,
        metadata={
            "help": "Extrapolation strength α of θ_for = (1 + α)·θ_ref − α·θ_mem that is used where none is given: by "
            "the probe during training and by the `save_forget_*` methods. It changes nothing in training; any other α "
            "can be chosen afterwards."
        },
    )
    memorization_loss: str = field(
        default="nll",
        metadata={
            "help": 'Loss that memorises the forget set. `"nll"` is the cross-entropy of the answer tokens (the '
            'paper\'s), `"npo"` the NPO form 2/β·log σ(−β·log(p_θ/p_ref)) of each row.',
            "choices": list(MEMORIZATION_LOSSES),
        },
    )
    retain_kl_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight λ of the retain term, KL(reference ‖ model) over the answer tokens of the retain rows. `0` "
            "leaves it out. If not set, it is 5."
        },
    )
    retain_kl_scale: float | None = field(
        default=None,
        metadata={
            "help": "Where the retain term is measured: with the adapter multiplied by this. `-1` (mirror consistency) "
            "holds θ_ref − ΔW, on whose side the forget model lies, to the reference on the retain rows; `1` (the paper) "
            "holds the trained model. If not set, it is `-1`, and with rounds minus `round_alpha`, where the step of a "
            "round ends."
        },
    )
    memorization_temperature: float | None = field(
        default=None,
        metadata={
            "help": "Temperature τ of the softmax in the memorisation loss. Above 1 the gradient does not vanish on "
            "rows that the model already knows. If not set, it is 4."
        },
    )
    npo_beta: float = field(default=0.1, metadata={"help": 'Inverse temperature β of `memorization_loss="npo"`.'})
    probe_steps: int = field(
        default=0,
        metadata={
            "help": "Optimiser steps between two probes: the forget and retain loss of the current batch at −α, "
            "measured by rescaling the live adapter. `0` turns it off."
        },
    )
    push_to_hub: bool = field(
        default=False,
        metadata={
            "help": "Whether to upload the forget adapter at `alpha` to `hub_model_id` once training has ended, into a "
            "private repository unless `hub_private_repo=False`. Nothing else is ever uploaded. Token and namespace are "
            "checked before training."
        },
    )

    pushes_result = True

    def __post_init__(self) -> None:
        self._apply_preset()
        super().__post_init__()

    def _apply_preset(self) -> None:
        if self.preset is not None and self.preset not in PRESETS:
            raise UnlearningError(f"preset={self.preset!r} is not known. Use one of {', '.join(PRESETS)}, or none.")
        for name, value in PRESETS.get(self.preset, DEFAULTS).items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    def _check_values(self) -> None:
        super()._check_values()
        if self.memorization_loss not in MEMORIZATION_LOSSES:
            raise UnlearningError(
                f"memorization_loss={self.memorization_loss!r} is not known. Use one of {', '.join(MEMORIZATION_LOSSES)}."
            )
        for name in ("alpha", "memorization_temperature", "npo_beta"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise UnlearningError(f"{name}={value} is not possible: it must be a finite number above 0.")
        if self.probe_steps < 0:
            raise UnlearningError(f"probe_steps={self.probe_steps} is not possible. Use 0 to turn the probe off.")
        if self.push_to_hub and not self.hub_model_id:
            raise UnlearningError("push_to_hub needs a repository. Name it with hub_model_id, e.g. me/forgetful.")
        if self.push_to_hub and self.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise UnlearningError(
                f"hub_strategy={self.hub_strategy.value!r} would upload checkpoints, and those hold what is to be "
                "forgotten. Leave it out: the forget adapter is uploaded at the end."
            )

    @property
    def needs_forget_reference(self) -> bool:
        return self.memorization_loss == "npo"

    def provenance(self) -> dict[str, Any]:
        """Training options that a reader of the result needs, JSON-ready."""
        return super().provenance() | {
            "memorization_loss": self.memorization_loss,
            "memorization_temperature": self.memorization_temperature,
        }

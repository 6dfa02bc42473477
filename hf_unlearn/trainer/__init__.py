"""Trainers: what every method shares, and model extrapolation."""

from hf_unlearn.trainer.batch import ForgetTokens
from hf_unlearn.trainer.evaluation_callback import EvaluationCallback
from hf_unlearn.trainer.extrapolation_config import ExtrapolationConfig
from hf_unlearn.trainer.extrapolation_trainer import ExtrapolationTrainer
from hf_unlearn.trainer.unlearning_config import UnlearningConfig
from hf_unlearn.trainer.unlearning_trainer import UnlearningTrainer


__all__ = [
    "EvaluationCallback",
    "ExtrapolationConfig",
    "ExtrapolationTrainer",
    "ForgetTokens",
    "UnlearningConfig",
    "UnlearningTrainer",
]

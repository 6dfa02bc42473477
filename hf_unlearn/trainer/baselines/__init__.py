"""The methods that model extrapolation is compared with, and all methods by their name on the command line."""

from hf_unlearn.trainer.baselines.ascent import (
    GradAscentConfig,
    GradAscentTrainer,
    GradDiffTrainer,
    KLConfig,
    KLTrainer,
    SatImpConfig,
    SatImpTrainer,
    WGAConfig,
    WGATrainer,
)
from hf_unlearn.trainer.baselines.base import BaselineConfig, BaselineTrainer
from hf_unlearn.trainer.baselines.distillation import CEUConfig, CEUTrainer, UNDIALConfig, UNDIALTrainer
from hf_unlearn.trainer.baselines.preference import (
    AlternateConfig,
    AltPOConfig,
    AltPOTrainer,
    DPOConfig,
    DPOTrainer,
    IDKTrainer,
    NPOConfig,
    NPOTrainer,
    SimNPOConfig,
    SimNPOTrainer,
)
from hf_unlearn.trainer.baselines.primal_dual import PDUConfig, PDUTrainer
from hf_unlearn.trainer.baselines.representation import RMUConfig, RMUTrainer
from hf_unlearn.trainer.baselines.targeted import TargetedConfig, TargetedTrainer
from hf_unlearn.trainer.baselines.task_vector import TaskVectorConfig, TaskVectorTrainer
from hf_unlearn.trainer.extrapolation_config import ExtrapolationConfig
from hf_unlearn.trainer.extrapolation_trainer import ExtrapolationTrainer
from hf_unlearn.trainer.unlearning_config import UnlearningConfig
from hf_unlearn.trainer.unlearning_trainer import UnlearningTrainer


METHODS: dict[str, tuple[type[UnlearningTrainer], type[UnlearningConfig]]] = {
    "extrapolation": (ExtrapolationTrainer, ExtrapolationConfig),
    "task-vector": (TaskVectorTrainer, TaskVectorConfig),
    "targeted": (TargetedTrainer, TargetedConfig),
    "grad-ascent": (GradAscentTrainer, GradAscentConfig),
    "grad-diff": (GradDiffTrainer, BaselineConfig),
    "kl": (KLTrainer, KLConfig),
    "npo": (NPOTrainer, NPOConfig),
    "simnpo": (SimNPOTrainer, SimNPOConfig),
    "dpo": (DPOTrainer, DPOConfig),
    "idk": (IDKTrainer, AlternateConfig),
    "altpo": (AltPOTrainer, AltPOConfig),
    "rmu": (RMUTrainer, RMUConfig),
    "wga": (WGATrainer, WGAConfig),
    "satimp": (SatImpTrainer, SatImpConfig),
    "undial": (UNDIALTrainer, UNDIALConfig),
    "ceu": (CEUTrainer, CEUConfig),
    "pdu": (PDUTrainer, PDUConfig),
}

__all__ = [
    "METHODS",
    "AltPOConfig",
    "AltPOTrainer",
    "AlternateConfig",
    "BaselineConfig",
    "BaselineTrainer",
    "CEUConfig",
    "CEUTrainer",
    "DPOConfig",
    "DPOTrainer",
    "GradAscentConfig",
    "GradAscentTrainer",
    "GradDiffTrainer",
    "IDKTrainer",
    "KLConfig",
    "KLTrainer",
    "NPOConfig",
    "NPOTrainer",
    "PDUConfig",
    "PDUTrainer",
    "RMUConfig",
    "RMUTrainer",
    "SatImpConfig",
    "SatImpTrainer",
    "SimNPOConfig",
    "SimNPOTrainer",
    "TargetedConfig",
    "TargetedTrainer",
    "TaskVectorConfig",
    "TaskVectorTrainer",
    "UNDIALConfig",
    "UNDIALTrainer",
    "WGAConfig",
    "WGATrainer",
]

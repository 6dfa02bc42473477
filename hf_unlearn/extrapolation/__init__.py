"""From memorising adapters to a forget model: operators, checks, arithmetic, files and the live model."""

from hf_unlearn.extrapolation.adapter import LoraAdapter, LoraPair, save_forget_adapter
from hf_unlearn.extrapolation.arithmetic import RealisedError
from hf_unlearn.extrapolation.checkpoint import (
    SafetensorsCheckpoint,
    SafetensorsFile,
    atomic_folder,
    find_tensor,
    resolve_model,
    write_shard,
)
from hf_unlearn.extrapolation.consensus import SignConsensus
from hf_unlearn.extrapolation.fingerprint import (
    BaseFingerprint,
    fingerprint_files,
    fingerprint_model,
    verify_fingerprint,
    verify_fingerprint_files,
)
from hf_unlearn.extrapolation.fisher import layer_fisher
from hf_unlearn.extrapolation.linearity import check_lora_config, check_target_modules
from hf_unlearn.extrapolation.live import adapter_scale, extrapolated, merged_state_dict, save_live_forget_model
from hf_unlearn.extrapolation.low_rank import LowRankUpdate, truncate
from hf_unlearn.extrapolation.merge import MergeReport, extrapolate
from hf_unlearn.extrapolation.operators import (
    average,
    fisher_factors,
    momentum,
    momentum_weights,
    project,
    run_checkpoints,
    scale_layers,
    subtract,
)
from hf_unlearn.extrapolation.plan import MergePlan, plan_merge
from hf_unlearn.extrapolation.provenance import (
    PROVENANCE_FILE,
    package_versions,
    read_provenance,
    write_provenance,
)


__all__ = [
    "PROVENANCE_FILE",
    "BaseFingerprint",
    "LoraAdapter",
    "LoraPair",
    "LowRankUpdate",
    "MergePlan",
    "MergeReport",
    "RealisedError",
    "SafetensorsCheckpoint",
    "SafetensorsFile",
    "SignConsensus",
    "adapter_scale",
    "atomic_folder",
    "average",
    "check_lora_config",
    "check_target_modules",
    "extrapolate",
    "extrapolated",
    "find_tensor",
    "fingerprint_files",
    "fingerprint_model",
    "fisher_factors",
    "layer_fisher",
    "merged_state_dict",
    "momentum",
    "momentum_weights",
    "package_versions",
    "plan_merge",
    "project",
    "read_provenance",
    "resolve_model",
    "run_checkpoints",
    "save_forget_adapter",
    "save_live_forget_model",
    "scale_layers",
    "subtract",
    "truncate",
    "verify_fingerprint",
    "verify_fingerprint_files",
    "write_provenance",
    "write_shard",
]

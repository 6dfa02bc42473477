"""Training all weights instead of an adapter: what it cannot go with, and its reference."""

from __future__ import annotations

import copy
import os

from peft import PeftConfig
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from hf_unlearn.errors import UnlearningError
from hf_unlearn.extrapolation.fingerprint import is_quantised


def check_full_training(
    model: str | PreTrainedModel, peft_config: PeftConfig | None, quantization_config: BitsAndBytesConfig | None
) -> None:
    """Raise where `train_all_weights` contradicts another option or the launch."""
    if peft_config is not None:
        raise UnlearningError("`train_all_weights` trains no adapter, and `peft_config` describes one. Leave one out.")
    if quantization_config is not None or (isinstance(model, PreTrainedModel) and is_quantised(model)):
        raise UnlearningError(
            "`train_all_weights` needs weights that can be trained, and the model is quantised. Load it in 16 or 32 "
            "bits, or train an adapter."
        )
    if is_deepspeed_zero3_enabled() or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise UnlearningError(
            "`train_all_weights` keeps a frozen copy of the model, whole, in each process, and the launch configuration "
            "shards the weights (ZeRO-3, FSDP). Train an adapter, or launch with DDP or ZeRO-2."
        )


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """
    The model as it is now, for good. To be run by [`~hf_unlearn.lm_head.forward_and_score`]: a `forward` that was put on
    the instance still is the original's.
    """
    return copy.deepcopy(model).requires_grad_(False).eval()
